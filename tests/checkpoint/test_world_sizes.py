"""A checkpoint of any world size fills any other, bit for bit where the arithmetic is the same; real FSDP2 on gloo.

Pinned here: 2 -> 1, 1 -> 2, 2 -> 3 (with an empty shard), generator states only at the same world size, one rank's
failure raised on all, an existing folder never overwritten.
"""

from __future__ import annotations

from pathlib import Path

from checkpoint.ranks import run_jobs

SAVE = "checkpoint.rank_jobs:save_after"
LOAD = "checkpoint.rank_jobs:load_and_compare"


def test_weights_and_adam_moments_move_between_world_sizes(tmp_path: Path) -> None:
    run_jobs(
        (2, SAVE, tmp_path / "two", 4, 3),
        (1, LOAD, tmp_path / "two/global_step_4", 3),
        (3, LOAD, tmp_path / "two/global_step_4", 3),
        (1, SAVE, tmp_path / "one", 4, 3),
        (2, LOAD, tmp_path / "one/global_step_4", 3),
    )


def test_generator_states_return_only_at_the_world_size_that_saved_them(tmp_path: Path) -> None:
    run_jobs(
        (2, SAVE, tmp_path, 1, 1),
        (2, "checkpoint.rank_jobs:rng_is_mine", tmp_path / "global_step_1", "yes"),
        (1, "checkpoint.rank_jobs:rng_is_mine", tmp_path / "global_step_1", "no"),
    )


def test_two_ranks_refuse_to_overwrite_and_both_raise(tmp_path: Path) -> None:
    run_jobs((2, SAVE, tmp_path, 1, 1))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    run_jobs((2, "checkpoint.rank_jobs:second_save_is_refused", tmp_path, 1))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_failure_on_one_rank_raises_on_all_and_commits_nothing(tmp_path: Path) -> None:
    run_jobs((2, "checkpoint.rank_jobs:one_rank_fails", tmp_path))
    assert list(tmp_path.iterdir()) == []
