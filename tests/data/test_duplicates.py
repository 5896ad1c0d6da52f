"""Counting repeats gives the same answer in memory and on disk."""

from __future__ import annotations

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


def test_the_smallest_hashes_come_from_a_stream(tmp_path: Path) -> None:
    hashes = np.random.default_rng(4).integers(0, 2**64, 5000, dtype=np.uint64)
    hashes.tofile(tmp_path / "h")
    assert smallest(tmp_path / "h", 20, chunk=64).tolist() == sorted(hashes.tolist())[:20]
