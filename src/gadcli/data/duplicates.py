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
PART_BITS = 6
PARTS = 2**PART_BITS
FIRST_SHIFT = 64 - PART_BITS
PART_BYTES = 8 * 2**20  # of a file that is read whole to be sorted: half a million rows
IN_MEMORY = 1_000_000  # hashes kept before they go to disk: 16 MB with their row ids
ENTRY = np.dtype([("hash", "<u8"), ("row", "<i8")])
NOTHING = np.empty(0, ENTRY)


def content_hash(data: bytes) -> int:
    """64 bits of BLAKE2b: the same on every machine and in every process, unlike Python's hash()."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Repeats:
    """Counts rows whose hash occurred before. Two different rows collide with chance n²/2⁶⁵ (2e-5 at 3e7 rows).

    Beyond IN_MEMORY rows, hashes are dealt by their top bits to PARTS temporary files, and again by the next bits where
    these are too large to sort.
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
        _deal(self._in_memory(), FIRST_SHIFT, Path(self._spill.name))
        self._held, self._count = [], 0

    def shared_with(self, other: Repeats) -> Iterator[npt.NDArray[np.int64]]:
        """Ids of the rows whose hash `other` has too, a part at a time: memory grows with neither."""
        if self._spill is None and other._spill is None:
            mine, theirs = self._in_memory(), other._in_memory()
            yield mine["row"][np.isin(mine["hash"], theirs["hash"])]
            return
        self._flush()
        other._flush()
        for (ours, others), equal in self._pieces(other):
            if equal:  # one hash, of any number of rows
                yield from (part["row"] for part in _chunks(ours) if _size(others))
            else:
                mine, theirs = _read(ours), _read(others)
                yield mine["row"][np.isin(mine["hash"], theirs["hash"])]

    def result(self, examples: int = 1000) -> tuple[int, list[tuple[int, int]]]:
        """How many rows repeat an earlier one, and some of them as (row, the row it repeats)."""
        count = 0
        found: list[tuple[int, int]] = []
        for entries, repeats in self._sorted_parts():
            same = np.flatnonzero(entries["hash"][1:] == entries["hash"][:-1])
            count += len(same) if repeats is None else repeats
            shown = same[: max(0, examples - len(found))]
            found += zip(entries["row"][shown + 1].tolist(), entries["row"][shown].tolist(), strict=True)
        return count, sorted(found)

    def _sorted_parts(self) -> Iterator[tuple[npt.NDArray[np.void], int | None]]:
        """Entries that have repeats, by hash and row; the repeats' number where they are not all of theirs."""
        if self._spill is None:
            parts: Iterator[tuple[npt.NDArray[np.void], int | None]] = iter([(self._in_memory(), None)])
        else:
            self._flush()
            parts = (
                (next(_chunks(path)), _size(path) // ENTRY.itemsize - 1) if equal else (_read(path), None)
                for (path,), equal in self._pieces()
            )
        for entries, repeats in parts:
            hashes = np.sort(entries["hash"])  # a plain sort is vectorised; most data needs no more
            if repeats is not None or (hashes[1:] == hashes[:-1]).any():
                # Rows came in rising order, and a stable sort keeps that among equals.
                yield entries[np.argsort(entries["hash"], kind="stable")], repeats

    def _in_memory(self) -> npt.NDArray[np.void]:
        return np.concatenate([NOTHING, *self._held])

    def _pieces(self, *others: Repeats) -> Iterator[tuple[list[Path], bool]]:
        """Files of each, small enough to sort, with all entries of their hashes; true where that is one hash alone."""
        folders = [Path(repeats._spill.name) for repeats in (self, *others) if repeats._spill is not None]
        for p in range(PARTS):
            yield from _divide([folder / str(p) for folder in folders], FIRST_SHIFT - PART_BITS, self._folder)


def _deal(entries: npt.NDArray[np.void], shift: int, folder: Path) -> None:
    """Append entries to PARTS files by the PART_BITS bits of their hashes above `shift`, in their order."""
    part = ((entries["hash"] >> np.uint64(shift)) % np.uint64(PARTS)).astype(np.int64)
    order = np.argsort(part, kind="stable")
    bounds = np.searchsorted(part[order], np.arange(PARTS + 1))
    try:
        for p in range(PARTS):
            with open(folder / str(p), "ab") as file:  # and not numpy's tofile, whose error does not say "disk full"
                file.write(entries[order[bounds[p] : bounds[p + 1]]].tobytes())
    except OSError as error:  # a write's error does not say where: TMPDIR, which the user may point elsewhere
        raise OSError(error.errno, error.strerror, str(folder.parent)) from error


def _divide(paths: list[Path], shift: int, folder: Path | None) -> Iterator[tuple[list[Path], bool]]:
    """Files too large to sort are dealt again by their hashes' next bits; when none are left all entries are equal."""
    if sum(map(_size, paths)) <= PART_BYTES:
        yield paths, False
    elif shift <= -PART_BITS:
        yield paths, True
    else:
        with tempfile.TemporaryDirectory(prefix="gad-repeats-", dir=folder) as name:
            dealt = [Path(name) / str(i) for i in range(len(paths))]
            for path, into in zip(paths, dealt, strict=True):
                into.mkdir()
                for entries in _chunks(path):
                    _deal(entries, max(0, shift), into)
            for p in range(PARTS):
                yield from _divide([into / str(p) for into in dealt], shift - PART_BITS, folder)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read(path: Path) -> npt.NDArray[np.void]:
    return np.fromfile(path, ENTRY) if path.exists() else NOTHING


def _chunks(path: Path) -> Iterator[npt.NDArray[np.void]]:
    """A file's entries, PART_BYTES at a time; none of a file that is not there."""
    if path.exists():
        with open(path, "rb") as file:
            while len(entries := np.fromfile(file, ENTRY, PART_BYTES // ENTRY.itemsize)):
                yield entries


def smallest(hashes_file: Path, k: int, chunk: int = 1 << 20) -> Hashes:
    """The k-th smallest hash of a file of uint64 decides: all hashes up to it, sorted; streamed in chunks."""
    best = np.empty(0, np.uint64)
    with open(hashes_file, "rb") as file:
        while len(part := np.fromfile(file, "<u8", chunk)):
            if len(best) == k:
                part = part[part < best[-1]]  # few are left to sort
            best = np.unique(np.concatenate([best, part]))[:k]
    return best
