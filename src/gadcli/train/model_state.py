"""A model's and its optimiser's state as DCP takes it, at any world size; RNG states as tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gadcli.model.optim import Optimizer


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under their Hugging Face names (DTensors that share the model's storage)."""
    return {name: value.detach() for name, value in model.state_dict().items()}


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Adam's moments and step as `<parameter>/<slot>`; made where the optimiser has not stepped, to be loaded into."""
    state: dict[str, Tensor] = {}
    known = {id(p) for p in optimizer.parameters}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # FSDP2 swaps parameters for gathered ones between forward and backward; those would be saved as zeros.
        assert id(p) in known, f"{name} is gathered: take the model's state first"
        slots = optimizer.adamw.state[p]
        if not slots:
            slots["step"] = torch.zeros((), dtype=torch.float32, device=_local(p).device)
            slots["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            slots["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state.update({f"{name}/{slot}": value.detach() for slot, value in slots.items()})
    return state


def _local(p: Any) -> Tensor:
    return p.to_local() if hasattr(p, "to_local") else p


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """This rank's generators. Sampling has seeds of its own, so these matter only to what draws without one."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
