"""Counting repeats gives the same answer in memory and on disk."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gadcli.data import duplicates
from gadcli.data.duplicates import Repeats, smallest


@pytest.mark.parametrize("in_memory", [10, 1000, 10**9])
def test_repeats_are_counted_alike_wherever_they_are_kept(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "IN_MEMORY", in_memory)
    rng = np.random.default_rng(3)
    hashes = rng.integers(0, 2**63, 3000, dtype=np.uint64)
    hashes[2000:2200] = hashes[:200]
    hashes[2990] = hashes[2000]  # a third time
    with Repeats() as repeats:
        for start in range(0, 3000, 100):
            repeats.add(hashes[start : start + 100], start)
        count, examples = repeats.result(examples=10**6)
        # 200 second occurrences and one third; each names the row before it.
        assert count == 201
        assert len(examples) == 201
        assert examples[0] == (2000, 0)
        assert examples[-1] == (2990, 2000)
        with Repeats() as other:
            other.add(np.append(hashes[:3], np.uint64(2**64 - 1)), 0)
            found = np.sort(np.concatenate(list(repeats.shared_with(other))))
        assert found.tolist() == [0, 1, 2, 2000, 2001, 2002, 2990]


@pytest.mark.parametrize("part_entries", [1, 7, 10**6])
def test_parts_too_large_to_sort_are_divided_and_one_hash_may_fill_many(
    part_entries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a plain count, with hashes that differ in their last bit alone and one that most rows have."""
    monkeypatch.setattr(duplicates, "IN_MEMORY", 50)
    monkeypatch.setattr(duplicates, "PART_BYTES", part_entries * duplicates.ENTRY.itemsize)
    rng = np.random.default_rng(5)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    hashes[::3] = 2**64 - 1
    hashes[1::30] = 2**64 - 2
    hashes[200] = hashes[2]
    asked = np.array([2**64 - 1, int(hashes[4]), 17], np.uint64)
    with Repeats(tmp_path) as repeats, Repeats(tmp_path) as other:
        for start in range(0, 300, 60):
            repeats.add(hashes[start : start + 60], start)
        other.add(asked, 0)
        before: dict[int, int] = {}
        expected = []
        for row, value in enumerate(hashes.tolist()):
            if value in before:
                expected.append((row, before[value]))
            before[value] = row
        count, examples = repeats.result(examples=10**6)
        assert count == len(expected) and set(examples) <= set(expected)
        if part_entries > 1:
            assert (200, 2) in examples
        if part_entries > 300:
            assert len(examples) == len(expected)
        for mine, theirs, rows in (
            (repeats, other, np.flatnonzero(np.isin(hashes, asked))),
            (other, repeats, np.array([0, 1])),
        ):
            found = np.concatenate(list(mine.shared_with(theirs)))
            assert np.sort(found).tolist() == rows.tolist()
    assert list(tmp_path.iterdir()) == []  # nothing is left on disk


def test_a_full_disk_under_the_parts_is_told_as_one_and_where(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the write fails with an errno, in a process of its own."""
    program = (
        "import resource, signal, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from gadcli.data import duplicates\n"
        "duplicates.IN_MEMORY = 1000\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with duplicates.Repeats(Path(sys.argv[1])) as repeats:\n"
        "    try:\n"
        "        for i in range(100): repeats.add(np.arange(1000, dtype=np.uint64) << np.uint64(54), 1000 * i)\n"
        "    except OSError as error: print(error.errno, error.filename)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    number, where = done.stdout.split()
    assert int(number) == errno.EFBIG and where.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_hashes_come_from_a_stream(tmp_path: Path) -> None:
    hashes = np.random.default_rng(4).integers(0, 2**64, 5000, dtype=np.uint64)
    hashes.tofile(tmp_path / "h")
    assert smallest(tmp_path / "h", 20, chunk=64).tolist() == sorted(hashes.tolist())[:20]
