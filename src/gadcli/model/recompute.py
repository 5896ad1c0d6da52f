"""Norms and gated MLPs that keep for the backward pass only what it cannot cheaply compute again.

transformers computes both operation by operation, and autograd keeps every operand: of an MLP the gate, its activation,
the other half and their product, of a norm its input and the normalised input too. Here one function stands for each:
a quarter of a layer's activations less (`config.memory.layer_bytes_per_token`), the same numbers, no more time.
A norm is replaced only where it answers as ours does: families differ (Gemma's weight is added to 1), and names do not
tell.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Norm(torch.autograd.Function):
    """weight * x / sqrt(mean(x²) + eps), in float32 up to the weight (RMSNorm, Zhang and Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        grad_weight = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            by_normed = (grad * weight).float()
            along = (by_normed * normed).mean(-1, keepdim=True)
            grad_x = by_normed.sub_(normed.mul_(along)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up, from which the gate's activation is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def keep_less(model: nn.Module) -> None:
    """Replace the forward passes of the norms and gated MLPs that ours equal bit for bit. First derivatives only."""
    known: dict[Any, bool] = {}
    for module in model.modules():
        ours = _mlp if _looks_gated(module) else _norm if _looks_like_norm(module) else None
        if ours is None:
            continue
        kind = (type(module), *(tuple(p.shape) for p in module.parameters()))
        if kind not in known:
            known[kind] = _answers_as(module, ours)
        if known[kind]:
            module.forward = types.MethodType(ours, module)


def _mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(_GatedSilu.apply(self.gate_proj(x), self.up_proj(x)))


def _norm(self: Any, x: Tensor) -> Tensor:
    return _Norm.apply(x, self.weight, self.variance_epsilon)


def _looks_gated(module: nn.Module) -> bool:
    return {name for name, _ in module.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}


def _looks_like_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor) and weight.dim() == 1 and isinstance(getattr(module, "variance_epsilon", 0), float)
    )


@torch.no_grad()
def _answers_as(module: Any, ours: Callable[[Any, Tensor], Tensor]) -> bool:
    draw = torch.Generator().manual_seed(0)
    weight = module.weight if ours is _norm else module.gate_proj.weight
    x = (3 * torch.randn(3, weight.shape[-1], generator=draw)).to(weight)
    try:
        return torch.equal(module(x), ours(module, x))
    except (TypeError, RuntimeError):
        return False
