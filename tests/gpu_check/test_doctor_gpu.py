"""`gad doctor --gpu --device cpu`: the checks for a card, rehearsed at toy size; every one must run and hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gadcli.cli.app import run
from gadcli.cli.doctor import gpu_table
from gadcli.gpu_check.__main__ import run_checks
from gadcli.gpu_check.bench import Bench, Finding, at_least, at_most

CHECKS = {"attention", "packing", "scores", "resume", "rate", "mask", "head", "update", "memory", "sync"}


@pytest.mark.slow
def test_the_rehearsal_passes_and_covers_every_check(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert run(["doctor", "--gpu", "--device", "cpu", "--report", str(report)]) == 0
    found = json.loads(report.read_text())
    assert {one["check"] for one in found["findings"]} == CHECKS
    assert "all checks hold" in capfd.readouterr().out


def test_a_figure_over_its_limit_fails_and_is_listed() -> None:
    findings = [at_most("mask", "masks", 3, 2), at_least("update", "tokens/s", 9.0, None)]
    assert [one.holds for one in findings] == [False, None]
    found = {"device": "cpu", "torch": "2", "shape": "toy", "findings": [vars(one) for one in findings]}
    assert gpu_table(found, Path("r.json"))[-1] == "failed: mask: masks"


def test_a_check_that_breaks_fails_alone() -> None:
    class OnCpu:
        on_gpu = False

    def check_broken(bench: Bench) -> list[Finding]:
        raise RuntimeError("no kernel")

    def check_sound(bench: Bench) -> list[Finding]:
        return [at_least("sound", "x", 1.0, 1.0)]

    found = run_checks(OnCpu(), (check_broken, check_sound))  # type: ignore[arg-type]
    assert [(one.check, one.holds) for one in found] == [("broken", False), ("sound", True)]


def test_an_existing_report_is_not_overwritten(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text("mine")
    assert run(["doctor", "--gpu", "--device", "cpu", "--report", str(report)]) == 2
    assert report.read_text() == "mine"
