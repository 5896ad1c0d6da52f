"""Sharding by FSDP2, and when it gathers whole weights and reduces gradients: in every micro-batch or once a step.

Once an optimiser step is what `config.memory.gathers_once` grants: weights then stay whole from the first
micro-batch's forward pass to the last one's backward pass, gradients add up whole on each rank, and one reduce-scatter
ends the step. The sum is the same; only the order of its additions differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as as_forward

from gadcli.config.memory import gathers_once, is_sharded, reshards
from gadcli.config.schema import FsdpConfig
from gadcli.distributed.world import World


def shard(model: Any, world: World, cfg: FsdpConfig, dtype: str, *, offload: bool = False) -> Any:
    """FSDP2: each decoder layer a unit, the rest the root. bf16 compute keeps float32 masters of what trains.

    Gradients are reduced in float32. Frozen weights (an adapter's base, a reference) are kept in the compute type.

    Returns the same model; its parameters are DTensors on `world.mesh`, or plain tensors on the device where FSDP2
    would only copy them (`config.memory.is_sharded`). `gad_gathers_once`: see above.
    """
    compute = resolve_dtype(dtype, world.device)
    offload = offload and world.device.type == "cuda"
    model.gad_gathers_once, model.gad_ends_step = False, True
    alone = world.size == 1 and not offload
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for p in frozen:  # what does not train needs no masters: float32 copies of a base would be for nothing
        p.data = p.data.to(compute)
    total, trainable = (sum(p.numel() for p in some) for some in (model.parameters(), trainable_parameters(model)))
    if not is_sharded(world.size, compute.itemsize, offload) or (alone and not trainable):
        _own_copy(world.device, (*model.parameters(), *model.buffers()))
        return model
    if alone:  # FSDP2 would copy frozen weights as well, where it has nothing to gather
        _own_copy(world.device, frozen)
    model.gad_gathers_once = gathers_once(cfg.gather, world.size, total, trainable, compute.itemsize)
    # Inputs are token ids; to cast them FSDP2 would copy the layout for every layer, and the masks it keeps with it.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if compute != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {
        "mesh": world.mesh,
        "reshard_after_forward": reshards(cfg.reshard_after_forward, world.size) and not model.gad_gathers_once,
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        "ignored_params": frozen if alone else None,
    }
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for method in ("answer_logprobs", "answer_values", "answer_values_and_embeds"):
        if hasattr(model, method):
            as_forward(model, method)
    return model


def _own_copy(device: torch.device, tensors: Iterable[torch.Tensor]) -> None:
    """Weights are mapped from the checkpoint's file until they move: what becomes of that file must not matter."""
    for tensor in tensors:
        tensor.data = tensor.data.to(device, copy=True)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


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
