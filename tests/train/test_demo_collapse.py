"""`gad demo --collapse v1`: the settings that ruin a run do ruin one, and the health rules name what happened.

The cheap form: the very settings of the demo's ruinous stage in a real worker, on a model of two layers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gadcli.cli.app import run as gad
from gadcli.demo.collapse import COLLAPSES, RUIN, render
from gadcli.metrics.diagnose import judge
from train.training import environment, prepare, records, start, write_inputs


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with `health.on_bad=stop`, so that it ends where the rules speak: no later, and not by itself."""
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"))
    stop = ["health.on_bad=stop", "trainer.total_steps=200", "trainer.total_epochs=100", "data.val_rows=4"]
    run_dir = prepare(tmp_path_factory.mktemp("runs") / "collapse", inputs, "warmup", *RUIN["v1"], *stop)
    (worker,) = start(run_dir)
    assert worker.wait(240) == 5, (run_dir / "logs" / "rank_0.log").read_text()[-3000:]
    return run_dir


def test_the_gap_runs_off_and_the_rules_name_it(ruined: Path) -> None:
    named = {found.name: found for found in judge(ruined).diagnoses if found.level == "bad"}
    assert named["runaway_gap"].cures == ("critic.loss=final", "critic.loss=v2_raw")


def test_health_on_bad_stop_ends_the_run_with_its_reason(ruined: Path) -> None:
    end = records(ruined)[-1]
    assert end["type"] == "end" and end["code"] == 5
    assert "the score gap runs off without bound (health.on_bad=stop; saved)" in end["message"]
    steps = [r["step"] for r in records(ruined) if r["type"] == "step"]
    assert (ruined / f"global_step_{steps[-1]}" / "MANIFEST.json").exists()


def test_the_report_shows_the_way_down_and_the_cure(ruined: Path) -> None:
    text = render(ruined)
    first, last = (next(r["step"] for r in order if r["type"] == "step")
                   for order in (records(ruined), records(ruined)[::-1]))  # fmt: skip
    shown = [line.split()[0] for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert (shown[0], shown[-1]) == (str(first), str(last))
    assert "runaway_gap" in text and "critic.loss=final" in text and f"gad why {ruined}" in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_itself_goes_down_as_the_notes_say(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gadcli", "demo", "--collapse", "v1", "--quiet", "-o", str(tmp_path / "demo")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The health rules name it: the score gap runs off without bound (runaway_gap)" in done.stdout
    steps = [r["metrics"] for r in records(tmp_path / "demo" / "collapse") if r["type"] == "step"]
    lengths = [metrics["response_length/mean"] for metrics in steps]
    assert lengths[0] > 30 and max(lengths[-5:]) < 10  # tokens; the teacher's are 27 on average
    assert max(metrics["critic/score_diff"] for metrics in steps) > 5 > 1 > abs(steps[0]["critic/score_diff"])


@pytest.mark.parametrize("words", [["--collapse", "v9"], ["--collapse", "v1", "--quick"]])
def test_an_unknown_collapse_and_a_quick_one_are_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert gad(["demo", *words]) == 2
    assert "--collapse" in capsys.readouterr().err


def test_every_collapse_on_show_has_its_settings() -> None:
    assert set(COLLAPSES) == set(RUIN)
