"""Float32 matrix products on CPUs: oneDNN's kernels where MKL, which torch takes, leaves half of the machine idle.

MKL uses its AVX2 paths on CPUs that are not Intel's. One core of an EPYC of the fifth generation: 109 GFLOP/s through
MKL, 245 through oneDNN, both true float32. torch ships both, and asks oneDNN for bfloat16.
The products are replaced below autograd, so that layers, their backward passes, adapters and heads all gain alike.
"""

from __future__ import annotations

import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.library import Library

SMALLEST = 2**20  # multiplications: below, the call costs more than the product
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_KEPT: list[Library] = []  # torch drops a library's kernels with the object


def choose_products() -> None:
    """Once a process that computes on a CPU; the choice depends on the machine alone, so that a resumed run repeats."""
    if not _KEPT and mkl_is_slow(cpu_vendor()):
        _KEPT.append(use_onednn())


def mkl_is_slow(vendor: str) -> bool:
    """Whether this is a CPU with AVX-512 on which MKL does not use it."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkldnn.is_available() and vendor not in ("", "GenuineIntel")


def cpu_vendor() -> str:
    """`vendor_id` of the first core (AuthenticAMD, GenuineIntel, …); empty where this is no x86 Linux."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def use_onednn() -> Library:
    """Put oneDNN under `aten::mm` and `aten::addmm` of float32 CPU tensors, until the library returned is gone.

    What it does not take (other types, tiny products, odd strides, sums other than a bias) goes where it went before.
    """
    from torch.library import get_kernel  # newer than what a GPU build may bring along

    onednn = torch.ops.mkldnn._linear_pointwise.default
    usual_mm, usual_addmm = get_kernel("aten::mm", "CPU"), get_kernel("aten::addmm", "CPU")

    def mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if _suits(left, right):
            return onednn(left, right.t(), None, "none", [], "")
        return usual_mm.call_boxed(_CPU, left, right)

    def addmm(
        bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> torch.Tensor:
        is_bias = bias.dim() == 1 and bias.is_contiguous() and len(bias) == right.shape[1] and beta == alpha == 1
        if is_bias and bias.dtype == torch.float32 and _suits(left, right):
            return onednn(left, right.t(), bias, "none", [], "")
        return usual_addmm.call_boxed(_CPU, bias, left, right, beta=beta, alpha=alpha)

    library = Library("aten", "IMPL")
    with warnings.catch_warnings():  # torch warns of every kernel that is replaced
        warnings.simplefilter("ignore")
        library.impl("mm", mm, "CPU")
        library.impl("addmm", addmm, "CPU")
    return library


def _suits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dim() != 2 or right.dim() != 2:  # torch has words for it
        return False
    if left.dtype != torch.float32 or right.dtype != torch.float32 or left.shape[1] != right.shape[0]:
        return False
    work = left.shape[0] * left.shape[1] * right.shape[1]
    return work >= SMALLEST and _dense(left) and _dense(right)


def _dense(matrix: torch.Tensor) -> bool:
    """Rows or columns without gaps inside: a stride of 1 one way, and no repeats the other way."""
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    return (across == 1 and down >= columns) or (down == 1 and across >= rows)
