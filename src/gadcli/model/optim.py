"""AdamW, a schedule that is a pure function of the step, global clipping, the guard against non-finite values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gadcli.config.schema import OptimConfig
from gadcli.distributed.fsdp import trainable_parameters
from gadcli.errors import UnhealthyError


def lr_at(update: int, total_updates: int, cfg: OptimConfig) -> float:
    """Learning rate of the `update`-th optimiser step (0-based) of `total_updates`.

    Linear from 0 over `lr_warmup_steps` updates (the first already moves), then constant, linear or half a cosine
    down to `min_lr_ratio * lr`.
    """
    if update < cfg.lr_warmup_steps:
        return cfg.lr * (update + 1) / cfg.lr_warmup_steps
    if cfg.lr_scheduler == "constant":
        return cfg.lr
    span = max(1, total_updates - cfg.lr_warmup_steps)
    progress = min(1.0, (update - cfg.lr_warmup_steps) / span)
    falling = 1.0 - progress if cfg.lr_scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return cfg.lr * (cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * falling)


@dataclass
class Losses:
    """The losses of an update with the rows they are of, left on the device: to read each would make the host wait."""

    what: str
    seen: list[tuple[torch.Tensor, list[int]]] = field(default_factory=list)

    def add(self, loss: torch.Tensor, rows: list[int]) -> None:
        self.seen.append((loss.detach(), rows))

    def check(self) -> None:
        """UnhealthyError, which names the rows, if one of them is not finite. Ranks whose own are finite learn of it
        from the gradient norm."""
        if not self.seen:
            return
        for value, (_, rows) in zip(
            torch.stack([loss for loss, _ in self.seen]).cpu().tolist(), self.seen, strict=True
        ):
            if not math.isfinite(value):
                raise non_finite(f"{self.what} is {value}", rows)


class Optimizer:
    """AdamW over a model's trainable parameters; `step` clips, refuses non-finite gradients and counts updates."""

    def __init__(self, model: nn.Module, cfg: OptimConfig, grad_clip: float, total_updates: int) -> None:
        self.cfg, self.grad_clip, self.total_updates = cfg, grad_clip, total_updates
        self.updates = 0
        self.parameters = trainable_parameters(model)
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=cfg.lr,
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            fused=True,
        )

    def step(self, who: str, rows: Sequence[int], losses: Losses | None = None) -> dict[str, float]:
        """One update from the accumulated gradients; returns `grad_norm` (before clipping) and `lr`.

        Raises UnhealthyError, with no update made, when a loss or the norm is not finite; `rows` are the data rows to
        name.
        """
        norm = _full(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        try:
            (losses or Losses(who)).check()
        except UnhealthyError:
            self.zero_grad()
            raise
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            self.zero_grad()
            raise non_finite(f"{who}'s gradient norm is {grad_norm}", rows)
        if self.grad_clip and grad_norm > self.grad_clip:
            scale = self.grad_clip / (grad_norm + 1e-6)
            for p in self.parameters:
                if p.grad is not None:
                    p.grad.mul_(scale)
        lr = lr_at(self.updates, self.total_updates, self.cfg)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.zero_grad()
        self.updates += 1
        return {"grad_norm": grad_norm, "lr": lr}

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)


def non_finite(what: str, rows: Sequence[int]) -> UnhealthyError:
    shown = ", ".join(map(str, sorted(set(rows))[:8])) + (" …" if len(set(rows)) > 8 else "")
    return UnhealthyError(
        f"{what}; no update was made (rows {shown})",
        "look at these rows with `gad data head`; a lower learning rate or grad_clip helps against overflow",
    )


def _full(norm: Any) -> torch.Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
