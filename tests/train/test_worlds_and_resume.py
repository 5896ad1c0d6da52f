"""The same run, however it is cut: over ranks (losses within 1e-4) and over time (resume is bit-equal)."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from train.training import manifest_hashes, prepare, records, start, steps, train

RELATIVE = 1e-4  # float32, other orders of summation over five steps


GAD = ["trainer.total_steps=5", "trainer.critic_warmup=1", "actor.ppo_epochs=2", "actor.ppo_mini_batch_size=4",
       "actor.entropy_coeff=0.01", "trainer.save_freq=2"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five uninterrupted steps at world size 1: the reference of all that follows."""
    run_dir = prepare(tmp_path_factory.mktemp("runs") / "whole", inputs, "warmup", *GAD)
    train(run_dir)
    return run_dir


def assert_close(a: dict[str, float], b: dict[str, float], relative: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        # Means that cancel (advantages, on-policy losses) are compared on the scale of their terms, which is 1.
        assert abs(value - b[name]) <= relative * max(abs(value), abs(b[name]), 1.0 if "adv" in name else 0.01), name


def test_two_ranks_learn_what_one_rank_learns(inputs: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = prepare(tmp_path / "two", inputs, "warmup", *GAD)
    train(run_dir, world=2)
    one, two = steps(whole), steps(run_dir)
    assert list(one) == list(two) == [1, 2, 3, 4, 5]
    for step in one:
        assert_close(one[step], two[step], RELATIVE)
    assert "actor/grad_norm" not in one[1] and one[2]["actor/grad_norm"] > 0  # critic_warmup=1
    assert one[5]["critic/d_loss"] != one[1]["critic/d_loss"]


def test_a_killed_run_resumes_bit_equal_in_metrics_weights_and_moments(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = prepare(tmp_path / "killed", inputs, "warmup", *GAD, "trainer.async_save=always")
    (worker,) = start(run_dir)
    deadline = time.monotonic() + 120
    while not (run_dir / "global_step_2" / "MANIFEST.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert not (run_dir / "global_step_5").exists()
    train(run_dir, resume=True)
    starts = [r["start_step"] for r in records(run_dir) if r["type"] == "run"]
    assert starts[0] == 0 and starts[1] in (2, 4)
    assert steps(run_dir) == steps(whole)
    assert manifest_hashes(run_dir, 5) == manifest_hashes(whole, 5)


def test_a_stop_signal_saves_and_the_rest_follows_as_if_nothing_had_happened(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = prepare(tmp_path / "stopped", inputs, "warmup", *GAD, "trainer.save_freq=0")
    (worker,) = start(run_dir)
    deadline = time.monotonic() + 120
    while not ((run_dir / "metrics.jsonl").exists() and steps(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.02)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 143
    assert (run_dir / "latest").exists()
    train(run_dir, resume=True)
    assert steps(run_dir) == steps(whole)
    assert manifest_hashes(run_dir, 5) == manifest_hashes(whole, 5)


def test_seqkd_divides_by_the_teacher_tokens_of_all_ranks(inputs: Path, tmp_path: Path) -> None:
    runs = []
    for world in (1, 2):
        run_dir = prepare(tmp_path / f"seqkd{world}", inputs, "seqkd", "trainer.total_steps=5")
        train(run_dir, world=world)
        runs.append(steps(run_dir))
    for step in runs[0]:
        assert_close(runs[0][step], runs[1][step], RELATIVE)
    assert runs[0][5]["actor/sft_loss"] < runs[0][1]["actor/sft_loss"]
