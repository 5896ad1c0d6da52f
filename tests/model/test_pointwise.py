"""Norms and MLPs that keep less: transformers' own numbers, forward bit for bit, and gradients in double precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gadcli.model import recompute as pointwise
from mutants import mutated
from tiny import write_tiny_model

REPLACED = {"llama": {"mlp", "norm"}, "qwen2": {"mlp", "norm"}, "qwen3": {"mlp", "norm"}, "mistral": {"mlp", "norm"}}
FAMILIES = [*REPLACED, "gemma2", "gemma3"]


def loaded(folder: Path, family: str) -> Any:
    if not (folder / family).exists():
        write_tiny_model(folder / family, family)
    model = AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32, attn_implementation="eager")
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:  # ones, which would hide a weight that is left out
                p.add_(0.3 * torch.randn(p.shape, generator=draw))
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    ids = torch.arange(2, 26).view(2, 12)
    model.zero_grad()
    model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[..., 5].sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def check(module: Any, plain: Any) -> None:
    """A copy of `plain` through `module.keep_less`: its logits bit for bit, its gradients to rounding."""
    ours = copy.deepcopy(plain)
    module.keep_less(ours)
    ids = torch.arange(2, 26).view(2, 12)
    assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
    found, expected = gradients(ours), gradients(plain)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def replaced(model: nn.Module) -> set[str]:
    kinds = {pointwise._mlp: "mlp", pointwise._norm: "norm"}
    found = (getattr(vars(module).get("forward"), "__func__", None) for module in model.modules())
    return {kinds[function] for function in found if function is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_it_did(family: str, tmp_path: Path) -> None:
    check(pointwise, loaded(tmp_path, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_answers_otherwise_is_left_alone(family: str, tmp_path: Path) -> None:
    """Gemma's norms add 1 to their weight and its MLPs have another activation."""
    model = loaded(tmp_path, family)
    pointwise.keep_less(model)
    assert replaced(model) == REPLACED.get(family, set())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("by_normed.sub_(normed.mul_(along))", "by_normed"),
        ("(grad * weight).float()", "grad.float()"),
        ("(grad.float() * normed).flatten", "grad.float().flatten"),
        ("aten.silu_backward(grad * up, gate)", "aten.silu_backward(grad, gate)"),
        ("F.silu(gate).mul_(grad)\n", "grad\n"),
    ],
)
def test_a_wrong_gradient_would_be_caught(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check(mutated("model.recompute", old, new), loaded(tmp_path, "llama"))


def test_gradients_are_those_of_finite_differences() -> None:
    draw = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(2, 3, 4, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(pointwise._GatedSilu.apply, (gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_lower_precision_is_no_further_from_the_truth_than_autograds(dtype: torch.dtype) -> None:
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    draw = torch.Generator().manual_seed(2)
    x64, w64, g64 = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((40, 64), (64,), (40, 64)))

    def slopes(function: Any, dtype: torch.dtype) -> list[Tensor]:
        x, weight = x64.to(dtype).requires_grad_(), w64.to(dtype).requires_grad_()
        function(x, weight).backward(g64.to(dtype))
        return [x.grad.double(), weight.grad.double()]

    x, weight = x64.clone().requires_grad_(), w64.clone().requires_grad_()
    (weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)).backward(g64)
    for ours, theirs, exact in zip(
        slopes(lambda x, w: pointwise._Norm.apply(x, w, 1e-5), dtype), slopes(plain, dtype), (x.grad, weight.grad),
        strict=True,
    ):  # fmt: skip
        assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm() + 1e-6


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(pointwise._GatedSilu.apply(x, x.detach()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
