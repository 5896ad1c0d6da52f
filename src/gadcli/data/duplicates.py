"""Repeated rows and overlapping sets by 64-bit hashes, in bounded memory at any number of rows (torch-free)."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
PARTS = 64
IN_MEMORY = 1_000_000  # hashes kept before they go to disk: 16 MB with their row ids
ENTRY = np.dtype([("hash", "<u8"), ("row", "<i8")])
NOTHING = np.empty(0, ENTRY)


def content_hash(data: bytes) -> int:
    """64 bits of BLAKE2b: the same on every machine and in every process, unlike Python's hash()."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Repeats:
    """Counts rows whose hash occurred before. Two different rows collide with chance n²/2⁶⁵ (2e-5 at 3e7 rows).

    Beyond IN_MEMORY rows, hashes are dealt by their top bits to PARTS temporary files, each small enough to sort.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: list[npt.NDArray[np.void]] = []
        self._count = 0
        self._spill: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Repeats:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:  # fmt: skip
        if self._spill is not None:
            self._spill.cleanup()
            self._spill = None

    def add(self, hashes: Hashes, first_row: int | npt.NDArray[np.int64]) -> None:
        """`first_row`: the row id of the first hash (the others follow), or the ids themselves."""
        entries = np.empty(len(hashes), ENTRY)
        entries["hash"] = hashes
        entries["row"] = first_row if isinstance(first_row, np.ndarray) else first_row + np.arange(len(hashes))
        self._held.append(entries)
        self._count += len(entries)
        if self._count >= IN_MEMORY:
            self._flush()

    def _flush(self) -> None:
        if self._spill is None:
            self._spill = tempfile.TemporaryDirectory(prefix="gad-repeats-", dir=self._folder)
        entries = np.concatenate([NOTHING, *self._held])
        part = (entries["hash"] >> np.uint64(58)).astype(np.int64)
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(PARTS + 1))
        for p in range(PARTS):
            with open(Path(self._spill.name) / str(p), "ab") as file:
                entries[order[bounds[p] : bounds[p + 1]]].tofile(file)
        self._held, self._count = [], 0

    def _parts(self) -> Iterator[npt.NDArray[np.void]]:
        """All entries in parts; equal hashes are in one."""
        if self._spill is None:
            yield np.concatenate([NOTHING, *self._held])
            return
        self._flush()
        for p in range(PARTS):
            yield np.fromfile(Path(self._spill.name) / str(p), ENTRY)

    def shared_with(self, other: Repeats) -> Iterator[npt.NDArray[np.int64]]:
        """Ids of the rows whose hash `other` has too, a part at a time: memory grows with neither."""
        if self._spill is not None or other._spill is not None:
            self._flush()
            other._flush()
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            yield mine["row"][np.isin(mine["hash"], theirs["hash"])]

    def result(self, examples: int = 1000) -> tuple[int, list[tuple[int, int]]]:
        """How many rows repeat an earlier one, and some of them as (row, the row it repeats)."""
        count = 0
        found: list[tuple[int, int]] = []
        for entries in self._parts():
            hashes = np.sort(entries["hash"])  # a plain sort is vectorised; most data needs no more
            if not (hashes[1:] == hashes[:-1]).any():
                continue
            # Rows came in rising order, and a stable sort keeps that among equals.
            entries = entries[np.argsort(entries["hash"], kind="stable")]
            same = np.flatnonzero(entries["hash"][1:] == entries["hash"][:-1])
            count += len(same)
            shown = same[: max(0, examples - len(found))]
            found += zip(entries["row"][shown + 1].tolist(), entries["row"][shown].tolist(), strict=True)
        return count, sorted(found)


def smallest(hashes_file: Path, k: int, chunk: int = 1 << 20) -> Hashes:
    """The k-th smallest hash of a file of uint64 decides: all hashes up to it, sorted; streamed in chunks."""
    best = np.empty(0, np.uint64)
    with open(hashes_file, "rb") as file:
        while len(part := np.fromfile(file, "<u8", chunk)):
            if len(best) == k:
                part = part[part < best[-1]]  # few are left to sort
            best = np.unique(np.concatenate([best, part]))[:k]
    return best
