"""Floating dtypes in numpy, bfloat16 included (round to nearest even, as torch does): the merge needs no torch."""

from __future__ import annotations

import numpy as np

from gadcli.errors import CheckpointError

FLOATS = ("float64", "float32", "float16", "bfloat16")


def to_float32(data: memoryview, dtype: str) -> np.ndarray:
    """Values of raw little-endian bytes as float32 (a view where they are float32 already)."""
    if dtype == "float32":
        return np.frombuffer(data, "<f4")
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    if dtype in ("float16", "float64"):
        return np.frombuffer(data, "<f2" if dtype == "float16" else "<f8").astype("<f4")
    raise CheckpointError(f"cannot convert {dtype}", "leave out --dtype")


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values in `dtype`, as an array of raw elements. float16: CheckpointError where a value overflows."""
    if dtype == "float32":
        return values
    if dtype == "bfloat16":
        bits = values.view("<u4")
        # Round to nearest even: add half an ulp of bfloat16, less one unless the kept part is odd, then cut.
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        out = rounded.astype("<u2")
        nan = np.isnan(values)
        if nan.any():
            out[nan] = 0x7FC0
        return out
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        if np.isinf(half).sum() != np.isinf(values).sum():
            raise CheckpointError("a weight is too large for float16", "--dtype bfloat16")
        return half
    if dtype == "float64":
        return values.astype("<f8")
    raise CheckpointError(f"cannot convert to {dtype}", "--dtype float32, bfloat16 or float16")


def convert(data: memoryview, source: str, target: str) -> memoryview:
    """Raw bytes of dtype `source` as raw bytes of `target`; both floating."""
    if source == target:
        return data
    return raw_bytes(from_float32(to_float32(data, source), target))


def raw_bytes(values: np.ndarray) -> memoryview:
    """An array's elements in row-major order as bytes, without a copy where they lie so already."""
    return np.ascontiguousarray(values).reshape(-1).view("u1").data
