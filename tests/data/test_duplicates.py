"""Counting repeats gives the same answer in memory and on disk."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gadcli.data import duplicates
from gadcli.data.duplicates import DuplicateCounter, smallest


@pytest.mark.parametrize("at_once", [7, 100, 1 << 20])
def test_repeats_and_overlap_are_those_of_a_plain_count(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory and from a file; with hashes that differ in their last bit alone, and one that a third of rows have."""
    monkeypatch.setattr(duplicates, "SORTED_AT_ONCE", at_once)
    rng = np.random.default_rng(5)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    hashes[::3] = 2**64 - 1
    hashes[1::30] = 2**64 - 2
    hashes[200] = hashes[2]
    rows = np.arange(1000, 1600, 2)  # ids with gaps, as dropped rows leave
    asked = np.array([2**64 - 1, int(hashes[4]), 17], np.uint64)
    with DuplicateCounter() as counter, DuplicateCounter() as other:
        for start in range(0, 300, 60):
            counter.add(hashes[start : start + 60], rows[start : start + 60])
        other.add(asked, np.arange(3))
        before: dict[int, int] = {}
        expected = []
        for row, value in zip(rows.tolist(), hashes.tolist(), strict=True):
            if value in before:
                expected.append((row, before[value]))
            before[value] = row
        assert counter.result(examples=10**6) == (len(expected), expected)
        count, few = counter.result(examples=5)  # reading is repeatable, and adding may go on after it
        assert (count, len(few)) == (len(expected), 5) and set(few) <= set(expected)
        for mine, theirs, ids in ((counter, other, rows[np.isin(hashes, asked)]), (other, counter, np.array([0, 1]))):
            assert np.sort(np.concatenate(list(mine.shared_with(theirs)))).tolist() == ids.tolist()
        counter.add(hashes[7:8], np.array([1600]))
        assert counter.result()[0] == len(expected) + 1


def test_a_full_disk_under_the_parts_is_told_as_one_and_where(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the write fails with an errno, in a process of its own."""
    program = (
        "import resource, signal, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from gadcli.data import duplicates\n"
        "duplicates.SORTED_AT_ONCE = 100\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with duplicates.DuplicateCounter(Path(sys.argv[1])) as counter:\n"
        "    try:\n"
        "        for i in range(100): counter.add(np.zeros(1000, np.uint64), np.arange(1000))\n"
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
