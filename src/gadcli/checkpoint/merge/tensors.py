"""Tensors of a checkpoint as places in files: read in pieces, checked by their CRC, never whole in memory unless cut
along a later axis. Torch-free; numpy only where values, not bytes, are needed.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gadcli.checkpoint.safe_unpickle import DTYPES, Strided
from gadcli.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

PIECE = 4 << 20  # bytes read at once


@dataclass(frozen=True)
class Part:
    """One stored piece of a tensor; `offsets` is where its first element goes in the whole."""

    offsets: tuple[int, ...]
    at: Strided


@dataclass(frozen=True)
class SourceTensor:
    """A whole tensor as its stored parts, sorted by offset. `dtype` is torch's name without 'torch.'."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis (of the whole for 0-d)."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else max(self.nbytes, self.itemsize)

    @property
    def rowwise(self) -> bool:
        """Whether the parts are runs of whole rows in order, so that the bytes only need to be concatenated."""
        return all(p.at.contiguous and p.at.shape[1:] == self.shape[1:] for p in self.parts)

    def check(self) -> None:
        """CheckpointError unless the parts cover every element exactly once."""
        stored = sum(p.at.numel for p in self.parts)
        bad = f"{self.name}: its stored pieces hold {stored:,} of {self.numel:,} elements"
        if stored != self.numel or any(p.at.dtype != self.dtype for p in self.parts):
            raise CheckpointError(bad, "a rank's file is missing or from another run")
        boxes = [(p.offsets, tuple(o + n for o, n in zip(p.offsets, p.at.shape, strict=True))) for p in self.parts]
        boxes = [b for b, p in zip(boxes, self.parts, strict=True) if p.at.numel]
        inside = all(end <= size for _, ends in boxes for end, size in zip(ends, self.shape, strict=True))
        overlap = any(_overlap(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
        if not inside or overlap:
            raise CheckpointError(f"{self.name}: its stored pieces overlap", "files of two checkpoints are mixed")


Box = tuple[tuple[int, ...], tuple[int, ...]]


def _overlap(a: Box, b: Box) -> bool:
    return all(x < v and u < y for x, y, u, v in zip(a[0], a[1], b[0], b[1], strict=True)) if a[0] else True


def whole(name: str, at: Strided) -> SourceTensor:
    """A tensor stored in one place."""
    return SourceTensor(name, at.dtype, at.shape, (Part((0,) * len(at.shape), at),))


@dataclass
class Files:
    """Read-only descriptors shared by the threads of one merge."""

    _open: dict[Path, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _apart: dict[str, dict[str, memoryview]] = field(default_factory=dict)
    _apart_lock: threading.Lock = field(default_factory=threading.Lock)

    def descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._open[path]

    def kept(self, key: SourceTensor, make: Callable[[], dict[str, memoryview]]) -> dict[str, memoryview]:
        """What `make` gave for `key`, while it is among the last two asked for: pieces of a packed weight."""
        with self._apart_lock:
            if key.name not in self._apart:
                while len(self._apart) > 1:
                    self._apart.pop(next(iter(self._apart)))
                self._apart[key.name] = make()
            return self._apart[key.name]

    def close(self) -> None:
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()

    def read(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from `offset`; CheckpointError if the file ends before."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self.descriptor(path), [buffer[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{path}: ends early: cut while it was read", "copy the checkpoint again")
            done += count


Segments = list[tuple[int, int]]  # (bytes, CRC-32) of consecutive runs


def read_pieces(
    files: Files, tensor: SourceTensor, segments: Segments | None = None, *, check: bool = True
) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order, in pieces of whole rows where a row fits into PIECE.

    A piece is valid until the next one is asked for. check: CheckpointError where a stored CRC does not fit.
    segments: gets (bytes, CRC) of each part as it was read, so that a plain copy need not be hashed twice.
    """
    if not tensor.rowwise:
        data = memoryview(_assemble(files, tensor).tobytes())
        if segments is not None:
            segments.append((len(data), zlib.crc32(data)))
        yield data
        return
    rows = max(1, PIECE // tensor.row_bytes)
    buffer = bytearray(min(rows * tensor.row_bytes, max(tensor.nbytes, 1)))
    view = memoryview(buffer)
    for part in sorted(tensor.parts, key=lambda p: p.offsets):
        crc, done = 0, 0
        while done < part.at.nbytes:
            take = view[: min(len(view), part.at.nbytes - done)]
            files.read(part.at.file, part.at.offset + done, take)
            if check:
                crc = zlib.crc32(take, crc)
            done += len(take)
            yield take
        if check and part.at.crc not in (None, crc) and _whole_storage(part.at):
            raise CheckpointError(f"{part.at.file}: {tensor.name}: CRC differs: damaged", "copy the checkpoint again")
        if segments is not None:
            segments.append((part.at.nbytes, crc))


def _whole_storage(at: Strided) -> bool:
    return at.offset == at.storage_offset and at.nbytes == at.storage_bytes


def unchecked_storages(tensors: list[SourceTensor]) -> dict[tuple[Path, int], Strided]:
    """Storages with a recorded CRC that `read_pieces` cannot check (views, or cut along a later axis), once each."""
    left: dict[tuple[Path, int], Strided] = {}
    for tensor in tensors:
        for part in tensor.parts:
            at = part.at
            if at.crc is not None and at.storage_bytes and not (tensor.rowwise and _whole_storage(at)):
                left[at.file, at.storage_offset] = at
    return left


def check_storage(files: Files, at: Strided) -> None:
    """CheckpointError if a storage's bytes do not fit its recorded CRC."""
    buffer = memoryview(bytearray(min(PIECE, at.storage_bytes)))
    crc, done = 0, 0
    while done < at.storage_bytes:
        take = buffer[: min(len(buffer), at.storage_bytes - done)]
        files.read(at.file, at.storage_offset + done, take)
        crc = zlib.crc32(take, crc)
        done += len(take)
    if crc != at.crc:
        raise CheckpointError(f"{at.file}: CRC of a storage differs: damaged", "copy the checkpoint again")


def _assemble(files: Files, tensor: SourceTensor) -> np.ndarray:
    """The whole tensor as raw elements [shape], for pieces cut along a later axis or stored with other strides."""
    import numpy as np

    raw = np.dtype(f"u{tensor.itemsize}")
    out = np.empty(tensor.shape, raw)
    for part in tensor.parts:
        if part.at.numel == 0:
            continue
        last = sum((n - 1) * s for n, s in zip(part.at.shape, part.at.stride, strict=True))
        span = memoryview(bytearray((last + 1) * tensor.itemsize))
        files.read(part.at.file, part.at.offset, span)
        strides = [s * tensor.itemsize for s in part.at.stride]
        piece = np.lib.stride_tricks.as_strided(np.frombuffer(span, raw), part.at.shape, strides)
        where = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.at.shape, strict=True))
        out[where] = piece
    return out


def read_whole(files: Files, tensor: SourceTensor, *, check: bool = True) -> bytes:
    """All bytes of a (small) tensor."""
    return b"".join(bytes(piece) for piece in read_pieces(files, tensor, check=check))


def same_bytes(files: Files, a: SourceTensor, b: SourceTensor) -> bool:
    """Whether two tensors hold the same shape, dtype and bits."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    pieces_a, pieces_b = ([(p.offsets, p.at.shape) for p in t.parts] for t in (a, b))
    if not (a.rowwise and b.rowwise and pieces_a == pieces_b):
        return read_whole(files, a) == read_whole(files, b)
    one, two = bytearray(PIECE), bytearray(PIECE)
    for left, right in zip(a.parts, b.parts, strict=True):
        done = 0
        while done < left.at.nbytes:
            size = min(PIECE, left.at.nbytes - done)
            files.read(left.at.file, left.at.offset + done, memoryview(one)[:size])
            files.read(right.at.file, right.at.offset + done, memoryview(two)[:size])
            # bytearrays compare by memcmp; memoryviews element by element
            if (one != two) if size == PIECE else (one[:size] != two[:size]):
                return False
            done += size
    return True
