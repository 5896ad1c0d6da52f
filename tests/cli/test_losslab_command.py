"""`gad losslab` from its words to its output: numbers in force, stored scores, verdicts and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gadcli.cli.app import run
from gadcli.config.resolve import resolve


def losslab(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = run(["losslab", *words])
    out, err = capsys.readouterr()
    return code, out, err


def json_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, _ = losslab(capsys, *words, "--json")
    assert code == 0
    tree: dict[str, Any] = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return tree


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A run with `final`, whose two stored evaluations lie far from and at the loss's resting point."""
    (tmp_path / "config.yaml").write_text(resolve("gad", overrides=["critic.loss=final"]).to_yaml())
    rows = []
    for step, teacher, student in ((10, 3.0, 0.0), (20, 0.25, -0.15), (20, 0.25, -0.15)):
        rows.append({"step": step, "kind": "val", "prompt": "p", "student": "s", "teacher": "t",
                     "teacher_score": teacher, "student_score": student,
                     "teacher_length": 150, "student_length": 250})  # fmt: skip
    rows.append({"step": 30, "kind": "train", "student_score": 1.0, "teacher_score": None})  # no pair
    text = "\n".join(json.dumps(row) for row in rows) + '\n{"step": 40, "teach'  # still being written
    (tmp_path / "samples.jsonl").write_text(text)
    return tmp_path


def test_it_says_that_finals_resting_gap_is_no_measure_of_quality(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = losslab(capsys, "synthetic", "--loss", "final")
    assert code == 0
    text = " ".join(out.split())
    assert "final rests at norm gap 0.0023, ranking_loss 0.6926, at d_acc 0.51, 0.59, 0.76, 0.99 alike" in text
    assert "\x1b" not in out  # not a terminal: no escape codes


def test_overrides_reach_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    # Twice the regulariser, half the gap: .8 k at score_reg .005, .4 k at .01 (k ~ 1/2).
    tree = json_of(capsys, "synthetic", "--loss", "final", "critic.final.score_reg=0.01")
    assert tree["losses"][0]["rests"]["1.0"]["raw_gap"] == pytest.approx(0.2, rel=1e-2)


def test_all_losses_in_one_json_document_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    tree = json_of(capsys, "synthetic")
    rests = {loss["spec"]["name"]: loss["rests"]["1.0"] for loss in tree["losses"]}
    assert list(rests) == ["original", "v1", "v2", "v2_raw", "final"]
    assert rests["original"]["kind"] == "none" and rests["original"]["raw_gap"] is None
    said = " ".join(tree["verdicts"])
    assert "original never rests" in said and "v2 holds the norm gap at 5" in said and "by length alone" in said


def test_a_runs_last_scored_step_is_read_with_the_runs_numbers(
    capsys: pytest.CaptureFixture[str], finished_run: Path
) -> None:
    tree = json_of(capsys, str(finished_run), "--loss", "final")
    stored = tree["losses"][0]["stored"]
    assert tree["scores"]["step"] == 20 and stored["pairs"] == 2 and tree["used"] == "final"
    assert stored["raw_gap"] == pytest.approx(0.4)
    # .25/150 + .15/250 = .002267 is the resting point: said so, since it would be taken for convergence
    assert any("is that resting point: not convergence" in line for line in tree["verdicts"])


def test_another_step_can_be_asked_for(capsys: pytest.CaptureFixture[str], finished_run: Path) -> None:
    tree = json_of(capsys, str(finished_run), "--loss", "final", "--step", "10")
    assert tree["losses"][0]["stored"]["raw_gap"] == 3.0
    assert not any("not convergence" in line for line in tree["verdicts"])


def test_the_table_fits_sixty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, finished_run: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _ = losslab(capsys, str(finished_run), "--loss", "final", "--loss", "v1")
    assert code == 0 and max(map(len, out.splitlines())) <= 60


def test_curves_are_drawn_into_a_png(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "deep" / "lab.png"
    code, _, err = losslab(capsys, "synthetic", "--loss", "final", "--png", str(target))
    assert code == 0 and str(target) in err
    assert target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere"], 2, "there is no run nowhere"),
        (["synthetic", "--loss", "v9"], 2, "v9"),
        (["synthetic", "critic.final.score=1"], 2, "critic.final.score"),
    ],
)
def test_errors_name_what_is_wrong(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    got, out, err = losslab(capsys, *words)
    assert got == code and message in err and out == ""


def test_a_folder_that_holds_no_run_is_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = losslab(capsys, str(tmp_path))
    assert code == 3 and "not a run's folder" in err and out == ""


def test_a_run_refuses_foreign_numbers_and_unknown_steps(
    capsys: pytest.CaptureFixture[str], finished_run: Path
) -> None:
    assert losslab(capsys, str(finished_run), "critic.final.score_reg=0.01")[0] == 2
    code, _, err = losslab(capsys, str(finished_run), "--step", "11")
    assert code == 3 and "10, 20" in err
