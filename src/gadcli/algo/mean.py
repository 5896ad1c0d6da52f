"""Mean(total, count): a metric that still adds up after micro-batches, accumulation steps and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Op = Literal["mean", "max", "min"]


@dataclass(frozen=True)
class Mean:
    """A sum and its weight; divided once, after everything was added, so never a mean of means.

    `op` "max" and "min" are for extremes: `total` is then the extreme itself and `count` is 1 (0 where nothing was
    seen), and adding keeps the larger or smaller one. Tensors stay on their device until `.value` reads them.
    """

    total: Tensor | float
    count: Tensor | float
    op: Op = "mean"

    def __add__(self, other: Mean) -> Mean:
        if self.op != other.op:
            raise ValueError(f"cannot add a {other.op} to a {self.op}")
        if self.op == "mean":
            return Mean(self.total + other.total, self.count + other.count)
        pick = torch.maximum if self.op == "max" else torch.minimum
        total = pick(_tensor(self.total), _tensor(other.total))
        return Mean(total, torch.maximum(_tensor(self.count), _tensor(other.count)), self.op)

    @property
    def value(self) -> float:
        """total / count (or the extreme); nan where nothing was counted. Waits for the device."""
        total, count = float(self.total), float(self.count)
        if count == 0:
            return float("nan")
        return total / count if self.op == "mean" else total


def mean_of(x: Tensor) -> Mean:
    """The mean over all elements of `x` (any shape, empty too), detached."""
    return Mean(x.detach().float().sum(), float(x.numel()))


def extreme_of(x: Tensor, op: Literal["max", "min"]) -> Mean:
    """The largest or smallest element of `x` (any shape, empty too), detached."""
    if x.numel() == 0:
        # Ranks must hold the same keys for one all-reduce, so an empty rank reports the neutral element.
        return Mean(x.new_tensor(float("-inf") if op == "max" else float("inf"), dtype=torch.float32), 0.0, op)
    x = x.detach().float()
    return Mean(x.max() if op == "max" else x.min(), 1.0, op)


def add_metrics(into: dict[str, Mean], more: dict[str, Mean]) -> dict[str, Mean]:
    """Add `more` into `into` key by key (in place) and return it: accumulation over micro-batches."""
    for name, mean in more.items():
        into[name] = into[name] + mean if name in into else mean
    return into


def _tensor(x: Tensor | float) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(float(x))
