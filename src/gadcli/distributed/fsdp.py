"""When FSDP2 gathers whole weights and reduces gradients: in every micro-batch, or once an optimiser step.

Once a step is what `config.memory.gathers_once` grants: weights then stay whole from the first micro-batch's forward
pass to the last one's backward pass, gradients add up whole on each rank, and one reduce-scatter ends the step. The sum
is the same; only the order of its additions differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def begin_micro_batch(model: Any, *, last: bool) -> None:
    """Before a micro-batch's passes: whether its backward pass is the one that reduces gradients and frees weights."""
    if model.gad_gathers_once:
        _end_with_next_backward(model, last)
        model.gad_ends_step = last


def free_gathered(model: nn.Module) -> None:
    """After a pass without gradients: FSDP2 frees what it gathered in a backward pass, and here none follows.

    Otherwise a reference's weights would lie gathered for ever, and the student's while the critic is updated.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def kept_gathered(model: Any) -> Iterator[None]:
    """Around a backward pass that another of the same micro-batch will follow: nothing is reduced or freed."""
    _end_with_next_backward(model, False)
    try:
        yield
    finally:
        _end_with_next_backward(model, model.gad_ends_step)


def _end_with_next_backward(model: Any, ends: bool) -> None:
    if not isinstance(model, FSDPModule):  # a world of one (`config.memory.is_sharded`)
        return
    model.set_reshard_after_backward(ends)
    model.set_requires_gradient_sync(ends)
