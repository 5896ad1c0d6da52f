"""Semantics pinned: an arena killed in the middle and started again ends in the same table; its commands are runs'."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gadcli.launch.run_folder import ended_well
from train.training import SMALL, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def command(inputs: Path, folder: Path, *more: str) -> list[str]:
    settings = [*(word for word in SMALL if "batch_size" not in word), "data.train_batch_size=4", "trainer.save_freq=1"]
    return [sys.executable, "-m", "gadcli", "arena", str(inputs / "train.parquet"), "--model", str(inputs / "model"),
            "--preset", "demo", "--arms", "gad", "--steps", "3", "--start-epochs", "1", "--temperatures", "0,1",
            "--held-out", "0.5", "-o", str(folder), "--json", *more, *settings]  # fmt: skip


def run(inputs: Path, folder: Path, *more: str) -> dict[str, Any]:
    done = subprocess.run(
        command(inputs, folder, *more), capture_output=True, text=True, timeout=900, env=environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def kill_in(inputs: Path, folder: Path, arm: str) -> None:
    """Start the arena, and kill it and its workers once `arm` has saved its first step."""
    child = subprocess.Popen(command(inputs, folder), env=environment(), start_new_session=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    first = folder / "seed1" / arm / "global_step_1"
    try:
        while not first.exists() and child.poll() is None:
            time.sleep(0.02)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert first.exists() and not ended_well(folder / "seed1" / arm)


def test_a_killed_arena_goes_on_to_the_table_of_one_that_was_not(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "arena"
    kill_in(inputs, folder, "gad")
    resumed = run(inputs, folder)
    (folder / "seed1" / "gad").rename(tmp_path / "resumed")
    (folder / "answers" / "gad-seed1.json").unlink()
    whole = run(inputs, folder)  # gad once more from the same start, without a kill
    for part in ("measures", "variety", "verdicts", "teacher_variety", "prompts"):
        assert resumed[part] == whole[part], part
    assert [(arm["arm"], arm["steps"]) for arm in whole["arms"]][1:] == [("gad", 3.0)]
    assert all(arm["seconds"] > 0 for arm in whole["arms"])
    assert (folder / "report.html").read_text().count("<svg") == len(whole["measures"])
    warmup, gad = whole["commands"]["gad"]  # what a user would type
    assert warmup.startswith("gad train warmup") and gad.startswith("gad train gad")
    assert "critic.model.path=" in gad and "trainer.total_steps=3" in gad
    # Another measure needs no training; other training is another arena.
    scored = run(inputs, folder, "--measure", "ended=regex:.")
    assert "ended" in scored["measures"] and scored["measures"]["ROUGE-L"] == whole["measures"]["ROUGE-L"]
    other = subprocess.run([*command(inputs, folder), "rollout.n=2"], capture_output=True, text=True,
                           env=environment(), timeout=120, check=False)  # fmt: skip
    assert other.returncode == 2 and "another overrides" in other.stderr
