"""Semantics pinned: the probe set (one scale for all students of a run) and the release of the actor by held-out d_acc.

A real worker on a tiny model: while the actor has not moved its answers are the start model's, so it beats it on
exactly half of the prompts; a resumed run does not look into its own future.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gadcli.metrics.table import METRICS
from gadcli.train import probe_set
from gadcli.train.probe_set import PROBE_FILE, probe_metrics
from train.training import prepare, records, train

# The critic is told apart from noise at any accuracy of .01 or more: the second evaluation's d_acc releases the actor.
SETTINGS = ["trainer.total_steps=6", "trainer.critic_warmup=5", "trainer.critic_warmup_until=0.01",
            "trainer.test_freq=2", "trainer.save_freq=2", "actor.optim.lr=1e-2"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = prepare(tmp_path_factory.mktemp("runs") / "whole", inputs, "warmup", *SETTINGS)
    train(run_dir)
    return run_dir


def evals(run_dir: Path) -> dict[int, dict[str, float]]:
    return {r["step"]: r["metrics"] for r in records(run_dir) if r["type"] == "eval"}


def test_a_student_that_has_not_moved_beats_its_beginning_on_half_of_the_prompts(whole: Path) -> None:
    found = evals(whole)
    assert list(found) == [2, 4, 6]
    assert found[2]["val/probe_beats_start"] == 0.5
    assert found[2]["val/probe_student"] == pytest.approx(found[2]["val/probe_start"], abs=1e-5)
    assert "val/probe_beats_earlier" not in found[2]  # nobody has been there in between
    assert found[6]["val/probe_student"] != pytest.approx(found[6]["val/probe_start"], abs=1e-4)
    assert "val/probe_beats_earlier" in found[6]
    assert found[2]["val/probe_start"] != found[6]["val/probe_start"]  # the same answers, by another day's critic


def test_the_probe_holds_the_beginning_and_every_evaluation(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / PROBE_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert all([index for index, _ in line["answers"]] == list(range(6)) for line in lines)
    assert lines[0]["answers"] == lines[1]["answers"] != lines[3]["answers"]


def test_held_out_d_acc_releases_the_actor_before_the_steps_do(whole: Path) -> None:
    steps = {r["step"]: r["metrics"] for r in records(whole) if r["type"] == "step"}
    assert [step for step, metrics in steps.items() if "actor/grad_norm" in metrics] == [3, 4, 5, 6]
    notes = [r["message"] for r in records(whole) if r["type"] == "event" and "actor learns" in r["message"]]
    assert len(notes) == 1 and "held-out d_acc" in notes[0] and ">= 0.01" in notes[0]


@pytest.mark.slow
def test_a_resumed_run_does_not_look_into_its_own_future(whole: Path, tmp_path: Path) -> None:
    again = tmp_path / "whole"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "global_step_6")  # as if killed before the last save, after the last evaluation
    (again / "latest").write_text("4")
    train(again, resume=True)
    assert evals(again)[6] == evals(whole)[6]


def rows(*scores: tuple[float, float, dict[int, float]]) -> list[dict[str, Any]]:
    return [{"student_score": s, "teacher_score": t, "probe_scores": old} for s, t, old in scores]


def test_the_probes_metrics_by_hand() -> None:
    # Against the start: 1 > 0 wins, 2 < 3 loses, 1 = 1 ties: 1.5 of 3. Against steps 5 and 9: 1 < 2 and 1 > .5, then
    # 2 > 0 and 2 > 1, then a tie and 1 < 4: (0 + 1 + 1 + 1 + .5 + 0) / 6.
    found = probe_metrics(rows((1.0, 4.0, {0: 0.0, 5: 2.0, 9: 0.5}), (2.0, 5.0, {0: 3.0, 5: 0.0, 9: 1.0}),
                               (1.0, 0.0, {0: 1.0 + 1e-7, 5: 1.0, 9: 4.0}), (50.0, 50.0, {})))  # fmt: skip
    assert found == {
        "val/probe_teacher": pytest.approx(3.0), "val/probe_start": pytest.approx(4 / 3),
        "val/probe_student": pytest.approx(4 / 3), "val/probe_beats_start": pytest.approx(0.5),
        "val/probe_beats_earlier": pytest.approx(3.5 / 6),
    }  # fmt: skip
    assert set(found) <= set(METRICS)  # so that docs and dashboards know them
    assert probe_metrics(rows((1.0, 2.0, {}))) == {}


def test_earlier_students_are_spread_over_the_run_and_the_latest_is_among_them() -> None:
    assert probe_set.spread(list(range(10, 110, 10))) == [30, 60, 100]
    assert probe_set.spread([5, 6]) == [5, 6] and probe_set.spread([]) == []
