"""Reduces one step's means over all ranks in one collective, so that no mean of means is ever taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from gadcli.metrics.table import METRICS


class MeanLike(Protocol):
    """A sum and the weight it is over (`algo.mean.Mean`)."""

    @property
    def total(self) -> Any: ...

    @property
    def count(self) -> Any: ...


_SLOTS = {name: slot for slot, name in enumerate(METRICS)}
_EXTREMES = {name for name, row in METRICS.items() if row.reduction in ("max", "min")}


def reduce_means(means: Mapping[str, MeanLike], group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """Σ total / Σ count over the ranks of `group`, for every name that any rank brings (count > 0).

    Each name has its slot in the metric table, so ranks may bring different names (a rank without rows brings
    none) and still take part in the same one all_reduce. Names whose reduction is max or min reduce
    total / count that way; only then is a second all_reduce made, by every rank alike, since which extremes
    exist is written into the first.

    Raises ValueError for a name that the table lacks. Without a process group it is the local means.
    """
    unknown = sorted(set(means) - set(_SLOTS))
    if unknown:
        raise ValueError(f"not in metrics/table.py: {', '.join(unknown)}")
    device = _device(group)
    totals, counts = _vectors({n: m for n, m in means.items() if n not in _EXTREMES}, device)
    extremes = {name: mean for name, mean in means.items() if name in _EXTREMES}
    present = torch.tensor([float(bool(extremes))], dtype=torch.float64, device=device)
    sums = torch.cat([totals, counts, present])
    if _distributed():
        dist.all_reduce(sums, group=group)
    values = sums.tolist()
    size = len(_SLOTS)
    result = {name: values[slot] / values[size + slot] for name, slot in _SLOTS.items() if values[size + slot] > 0}
    if values[-1] > 0:
        result.update(_reduce_extremes(extremes, device, group))
    return result


def _reduce_extremes(
    extremes: Mapping[str, MeanLike], device: torch.device, group: dist.ProcessGroup | None
) -> dict[str, float]:
    """Largest (or, negated on the way, smallest) total / count over ranks."""
    totals, counts = _vectors(extremes, device)
    sign = torch.tensor([-1.0 if METRICS[n].reduction == "min" else 1.0 for n in _SLOTS], device=device).double()
    largest = torch.where(counts > 0, totals / counts * sign, -torch.inf)
    if _distributed():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return {name: (largest * sign)[slot].item() for name, slot in _SLOTS.items() if largest[slot] != -torch.inf}


def _vectors(means: Mapping[str, MeanLike], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    totals = torch.zeros(len(_SLOTS), dtype=torch.float64, device=device)
    counts = torch.zeros_like(totals)
    if means:
        slots = torch.tensor([_SLOTS[name] for name in means], device=device)
        totals[slots] = torch.stack([_scalar(mean.total, device) for mean in means.values()])
        counts[slots] = torch.stack([_scalar(mean.count, device) for mean in means.values()])
    return totals, counts


def _scalar(value: Any, device: torch.device) -> torch.Tensor:
    # float64 so that a count of tokens above 2^24 stays exact.
    return torch.as_tensor(value, device=device).detach().to(torch.float64).reshape(())


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's backend wants its tensors."""
    if _distributed() and "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
