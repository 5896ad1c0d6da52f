"""Arrow arrays from Python and numpy values (torch-free).

`pyarrow.array`, `pyarrow.scalar` and `Array.to_numpy` import pandas where it is installed, only to ask whether a
value is one of its objects: 1.2 seconds of CPU in a process that has no other use for it. These do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def indexes(values: npt.NDArray[np.int64]) -> pa.Array:
    """Row numbers, for `take`; the memory is shared."""
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values, np.int64))])


def truths(array: pa.Array) -> npt.NDArray[np.bool_]:
    """Of an array of booleans; null counts as false."""
    values = _bits(array, array.buffers()[1])
    return values & _bits(array, array.buffers()[0]) if array.null_count else values


def whole_numbers(array: pa.Array, null: int) -> npt.NDArray[np.int64]:
    """Of an array of 32- or 64-bit integers, with a number in place of null."""
    if len(array) == 0:
        return np.zeros(0, np.int64)
    validity, data = array.buffers()
    kind = f"i{array.type.bit_width // 8}"
    values = np.frombuffer(data, kind)[array.offset : array.offset + len(array)].astype(np.int64)
    if array.null_count:
        values[~_bits(array, validity)] = null
    return values


def _bits(array: pa.Array, bitmap: pa.Buffer) -> npt.NDArray[np.bool_]:
    """A bitmap's part that belongs to the array."""
    if len(array) == 0:
        return np.zeros(0, bool)
    start, end = array.offset, array.offset + len(array)
    octets = np.frombuffer(bitmap, np.uint8)[start // 8 : (end + 7) // 8]
    return np.unpackbits(octets, bitorder="little")[start % 8 : start % 8 + len(array)].view(bool)


def strings(values: Sequence[str | None], large: bool = True) -> pa.Array:
    """Text; None becomes null. Raises UnicodeEncodeError for halves of surrogate pairs."""
    data = [b"" if v is None else v.encode() for v in values]
    offsets = np.zeros(len(data) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, data), np.int64, len(data)), out=offsets[1:])
    valid = None
    if None in values:
        known = np.fromiter((v is not None for v in values), bool, len(values))
        valid = pa.py_buffer(np.packbits(known, bitorder="little"))
    kind = pa.large_string() if large else pa.string()
    starts = pa.py_buffer(offsets if large else offsets.astype(np.int32))
    return pa.Array.from_buffers(kind, len(data), [valid, starts, pa.py_buffer(b"".join(data))])
