"""Products through oneDNN: the numbers of double precision, for every shape, layout and type that reaches them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gadcli.distributed import cpu_matmul as products


@pytest.fixture(autouse=True)
def onednn() -> Iterator[None]:
    """The replaced kernels, whatever this machine would choose; those from before are put back."""
    had = list(products._KEPT)
    for library in had:
        library._destroy()
    library = products.use_onednn()
    yield
    library._destroy()
    products._KEPT[:] = [products.use_onednn()] if had else []


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def check_product(left: Tensor, right: Tensor) -> None:
    """To float32's rounding of a sum of K products: one in bfloat16 would be off by 4e-3 of the terms."""
    exact = left.double() @ right.double()
    bound = 1e-5 * left.double().abs() @ right.double().abs() + 1e-12
    assert ((left @ right).double() - exact).abs().le(bound).all()


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 576, 7), (130, 64, 257), (257, 1536, 96), (8, 20_000, 30), (64, 5, 9999)]
)
@pytest.mark.parametrize("layout", ["rows", "columns", "gaps", "reversed", "repeated"])
def test_every_layout_is_a_true_float32_product(shape: tuple[int, int, int], layout: str) -> None:
    m, k, n = shape
    left, right = drawn(m, k), drawn(k, n)
    if layout == "columns":
        left, right = left.t().contiguous().t(), right.t().contiguous().t()
    elif layout == "gaps":
        left, right = drawn(m, k + 3)[:, 1 : k + 1], drawn(2 * k, n)[::2]
    elif layout == "reversed":
        left = drawn(m, 2 * k)[:, ::2]
    elif layout == "repeated":
        left, right = drawn(1, k).expand(m, k), drawn(k, 1).expand(k, n)
    check_product(left, right)


def test_the_replaced_kernel_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else everything above would compare torch with itself."""
    asked = []
    monkeypatch.setattr(products, "_suits", lambda left, right: asked.append(left.shape) or False)
    drawn(200, 100) @ drawn(100, 60)
    torch.nn.Linear(100, 60)(drawn(200, 100))
    assert asked == [(200, 100), (200, 100)]


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_gradients(bias: bool) -> None:
    layer = torch.nn.Linear(192, 320, bias=bias)
    x = drawn(5, 40, 192).requires_grad_()
    weighing = drawn(5, 40, 320)
    (layer(x) * weighing).sum().backward()
    twin = torch.nn.Linear(192, 320, bias=bias).double()
    twin.load_state_dict(layer.state_dict())
    y = x.detach().double().requires_grad_()
    (twin(y) * weighing).sum().backward()
    torch.testing.assert_close(x.grad, y.grad.float(), rtol=1e-4, atol=1e-4)
    for ours, exact in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, exact.grad.float(), rtol=1e-4, atol=1e-4)


def test_second_derivatives_pass_through() -> None:
    """The gradient penalty's: below autograd, products have whatever derivatives torch gives them."""
    weight = drawn(128, 160).requires_grad_()
    x = drawn(96, 128).requires_grad_()
    (slope,) = torch.autograd.grad((x @ weight).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    exact = weight.detach().double().requires_grad_()
    y = x.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad((y @ exact).square().sum(), y, create_graph=True)
    slope.square().sum().backward()
    assert (weight.grad - exact.grad).abs().max() < 1e-5 * exact.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_types_go_where_they_went(dtype: torch.dtype) -> None:
    left, right = (4 * drawn(128, 96)).to(dtype), (4 * drawn(96, 128)).to(dtype)
    ours = left @ right
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), left.double() @ right.double(), rtol=1e-2, atol=0.5)


def test_sums_empty_products_and_wrong_shapes_are_torchs_own() -> None:
    left, right, total = drawn(128, 96), drawn(96, 128), drawn(128, 128)
    product = (left.double() @ right.double()).float()
    for summand, beta, alpha in ((total, 2, 3), (total[:1], 1, 1), (total[0, :1], 1, 1), (total[:, :1], 1, 0.5)):
        found = torch.addmm(summand, left, right, beta=beta, alpha=alpha)
        torch.testing.assert_close(found, beta * summand + alpha * product, rtol=1e-4, atol=1e-4)
    assert (torch.zeros(3, 0) @ torch.zeros(0, 4)).tolist() == [[0.0] * 4] * 3
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        left @ left
    with pytest.raises(RuntimeError):
        left @ right.double()
    with pytest.raises(RuntimeError, match="must be a matrix"):
        torch.mm(left[0], right)


@pytest.mark.parametrize(("vendor", "expected"), [("GenuineIntel", False), ("", False), ("AuthenticAMD", True)])
def test_only_where_mkl_leaves_avx512_idle(vendor: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert products.mkl_is_slow(vendor) is expected
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not products.mkl_is_slow(vendor)
