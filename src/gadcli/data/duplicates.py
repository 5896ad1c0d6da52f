"""Repeated rows and overlapping sets by sorted 64-bit hashes, in bounded memory at any number of rows (torch-free)."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Entries = npt.NDArray[np.void]
ENTRY = np.dtype([("hash", "<u8"), ("row", "<i8")])
SORTED_AT_ONCE = 1 << 20  # rows: 16 MB


def content_hash(data: bytes) -> int:
    """64 bits of BLAKE2b: the same on every machine and in every process, unlike Python's hash()."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hashes(texts: Iterable[bytes]) -> Hashes:
    return np.fromiter(map(content_hash, texts), np.uint64)


class DuplicateCounter:
    """Counts rows whose hash occurred before. Two different rows collide with chance n²/2⁶⁵ (2e-5 at 3e7 rows).

    Hashes go to a file when they are many; it is read once for each range of hashes that is sorted at once.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = str(folder or tempfile.gettempdir())
        self._file = tempfile.SpooledTemporaryFile(SORTED_AT_ONCE * ENTRY.itemsize, dir=self._folder)  # noqa: SIM115
        self.rows = 0

    def __enter__(self) -> DuplicateCounter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:  # fmt: skip
        self._file.close()

    def add(self, found: Hashes, rows: npt.NDArray[np.int64]) -> None:
        """Hashes and ids of some rows; ids come in rising order."""
        entries = np.empty(len(found), ENTRY)
        entries["hash"], entries["row"] = found, rows
        self.rows += len(entries)
        try:
            self._file.write(entries.tobytes())
            self._file.flush()
        except OSError as error:  # a write's error does not say where: TMPDIR, which the user may point elsewhere
            raise OSError(error.errno, error.strerror, self._folder) from error

    def result(self, examples: int = 1000) -> tuple[int, list[tuple[int, int]]]:
        """How many rows repeat an earlier one, and some of them as (row, the row it repeats)."""
        count = 0
        found: list[tuple[int, int]] = []
        for entries in self._ranges(_parts(self.rows)):
            entries = entries[
                np.argsort(entries["hash"], kind="stable")
            ]  # equal hashes stay in the order of their rows
            same = np.flatnonzero(entries["hash"][1:] == entries["hash"][:-1])
            count += len(same)
            shown = same[: max(0, examples - len(found))]
            found += zip(entries["row"][shown + 1].tolist(), entries["row"][shown].tolist(), strict=True)
        return count, sorted(found)

    def shared_with(self, other: DuplicateCounter) -> Iterator[npt.NDArray[np.int64]]:
        """Ids of the rows whose hash `other` has too, a range of hashes at a time."""
        parts = _parts(max(self.rows, other.rows))
        for mine, theirs in zip(self._ranges(parts), other._ranges(parts), strict=True):
            yield mine["row"][np.isin(mine["hash"], theirs["hash"])]

    def _ranges(self, parts: int) -> Iterator[Entries]:
        """The entries of each of `parts` equal ranges of hashes, in the order they were added."""
        width = np.uint64(-(-(2**64) // parts) if parts > 1 else 2**64 - 1)
        for part in range(parts):
            self._file.seek(0)
            kept = [np.empty(0, ENTRY)]
            while data := self._file.read(SORTED_AT_ONCE * ENTRY.itemsize):
                entries = np.frombuffer(data, ENTRY)
                kept.append(entries if parts == 1 else entries[entries["hash"] // width == part])
            yield np.concatenate(kept)
        self._file.seek(0, 2)


def _parts(rows: int) -> int:
    return 1 + rows // SORTED_AT_ONCE


def smallest(hashes_file: Path, k: int, chunk: int = 1 << 20) -> Hashes:
    """The k-th smallest hash of a file of uint64 decides: all hashes up to it, sorted; streamed in chunks."""
    best = np.empty(0, np.uint64)
    with open(hashes_file, "rb") as file:
        while len(part := np.fromfile(file, "<u8", chunk)):
            if len(best) == k:
                part = part[part < best[-1]]  # few are left to sort
            best = np.unique(np.concatenate([best, part]))[:k]
    return best
