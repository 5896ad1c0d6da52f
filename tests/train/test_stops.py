"""What ends a run early, in this process with the real loop: signals in every phase, alarms.

Pinned here: a signal that arrives in any phase of a step lets the step end, saves, and the run resumes bit-equal · one
that asks for a save saves and goes on · health.on_bad=stop saves and ends with 5.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from gadcli.checkpoint.manifest import latest_valid, list_checkpoints
from gadcli.errors import UnhealthyError
from gadcli.metrics.health import Alarm
from gadcli.train import loop
from gadcli.train.build import build_run
from gadcli.train.stages import train_adversarial
from train.in_process import begin, process_as_it_was, send_in, to_the_end
from train.training import manifest_hashes, records, steps

pytestmark = pytest.mark.usefixtures("left_as_it_was")

CANARY = "canary-4711-0815"


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with process_as_it_was():
        os.environ["HF_TOKEN"] = os.environ["WANDB_API_KEY"] = CANARY
        to_the_end(begin(run_dir, inputs, "trainer.logger=[console,tensorboard]"))
    return run_dir


def test_a_secret_of_the_environment_is_in_no_file_of_a_run(whole: Path) -> None:
    files = [path for path in whole.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files) and any(path.name == "MANIFEST.json" for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


PHASES = ("sync", "rollout", "critic", "actor", "eval", "save")
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) * 2


@pytest.mark.parametrize(("phase", "number"), list(zip(PHASES, NUMBERS, strict=True)))
def test_a_signal_in_any_phase_saves_after_the_step_and_the_rest_is_bit_equal(
    phase: str, number: signal.Signals, inputs: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run = begin(run_dir, inputs, "trainer.save_freq=1" if phase == "save" else "trainer.save_freq=0")
    send_in(run, phase, number)
    to_the_end(run)
    assert run.stop.number == number and list(steps(run_dir)) == [1, 2]
    saved = latest_valid(run_dir, pytest.fail)
    assert saved == run_dir / "global_step_2"
    to_the_end(build_run(run.cfg, run_dir, resume_from=saved))
    assert steps(run_dir) == steps(whole)
    assert manifest_hashes(run_dir, 3) == manifest_hashes(whole, 3)


def test_a_request_to_save_saves_that_step_and_goes_on(inputs: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = begin(run_dir, inputs, "trainer.save_freq=0")
    send_in(run, "rollout", signal.SIGUSR1)
    to_the_end(run)
    assert run.stop.number == 0 and steps(run_dir) == steps(whole)
    assert [path.name for path in list_checkpoints(run_dir)] == ["global_step_2", "global_step_3"]


def test_a_collapse_with_on_bad_stop_saves_and_ends_with_5(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = begin(run_dir, inputs, "trainer.save_freq=0", "health.on_bad=stop")
    run.records._tell([Alarm(1, "critic/score_diff", "bad", "scores run away", "critic.loss=final")])
    train_adversarial(run)
    with pytest.raises(UnhealthyError, match="scores run away") as stopped:
        loop.finish(run)
    assert stopped.value.exit_code == 5 and stopped.value.hint == "critic.loss=final"
    assert list(steps(run_dir)) == [1] and latest_valid(run_dir, pytest.fail) == run_dir / "global_step_1"
    assert any(r.get("kind") == "alarm" for r in records(run_dir))


def test_the_same_alarm_with_on_bad_warn_is_told_and_the_run_goes_on(inputs: Path, tmp_path: Path) -> None:
    run = begin(tmp_path / "run", inputs, "trainer.save_freq=0", "trainer.total_steps=2")
    run.records._tell([Alarm(1, "critic/score_diff", "bad", "scores run away", "critic.loss=final")])
    to_the_end(run)
    assert list(steps(tmp_path / "run")) == [1, 2]
