"""Floating dtypes of raw bytes, by torch, which only merges that convert, fuse or take apart load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gadcli.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def tensor_of(data: memoryview | bytearray, dtype: str) -> Tensor:
    """Raw little-endian bytes as a flat tensor, on the same memory where that may be written to."""
    import torch

    data = bytearray(data) if memoryview(data).readonly else data  # torch warns of memory it could not write to
    return torch.frombuffer(data, dtype=getattr(torch, dtype))


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements in row-major order as bytes, without a copy where they lie so already."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def convert(data: memoryview, source: str, target: str) -> memoryview:
    """Raw bytes of dtype `source` as raw bytes of `target`; both floating. CheckpointError where float16 overflows."""
    if source == target:
        return data
    import torch

    values = tensor_of(data, source)
    if source == "float64":
        values = values.float()
    new = values.to(getattr(torch, target))
    if target == "float16" and new.isinf().sum() != values.isinf().sum():
        raise CheckpointError("a weight is too large for float16", "--dtype bfloat16")
    return raw_bytes(new)
