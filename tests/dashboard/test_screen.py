"""The picture: it fits any screen, says what matters, and is safe to show whatever a model wrote."""

from __future__ import annotations

import io
import json
import math
import os
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from gadcli.dashboard import RunView, plain_line
from gadcli.dashboard.draw import band_text, chart, clean, duration, sparkline, wrap
from gadcli.dashboard.report import export_html
from gadcli.dashboard.screen import render, render_runs, screen_lines, share_rows
from gadcli.dashboard.words import run_json, why_lines
from gadcli.metrics.record import MetricsWriter, RunLog, write_status
from gadcli.metrics.table import Range
from metrics.generated import SYMPTOMS, healthy, write

SIZES = [(20, 6), (20, 40), (40, 12), (60, 20), (80, 24), (100, 30), (120, 10), (160, 45), (250, 80)]


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    view = RunView(write(tmp_path_factory.mktemp("runs") / "collapsed", SYMPTOMS["runaway_gap"](1)))
    view.poll()
    return view


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    view = RunView(write(tmp_path_factory.mktemp("runs") / "good", healthy(1)))
    view.poll()
    return view


def text_of(view: RunView, width: int, height: int) -> str:
    return "\n".join(line.plain for line in screen_lines(view, width, height, time.time()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interactive", [True, False])
def test_no_line_is_wider_and_no_picture_higher_than_the_screen(
    collapsed: RunView, size: tuple[int, int], interactive: bool
) -> None:
    collapsed.interactive = interactive
    lines = screen_lines(collapsed, *size, time.time())
    assert len(lines) <= size[1]
    assert max(cell_len(line.plain) for line in lines) <= size[0]
    assert all("\n" not in line.plain for line in lines)


def test_sixty_by_twenty_shows_every_group_the_fault_its_cure_and_a_sample(collapsed: RunView) -> None:
    text = text_of(collapsed, 60, 20)
    for word in ("step 141/141", "runs off", "critic.loss=final", "discriminator", "actor", "answers", "engine",
                 "score_diff", "117", ".3–2", "student", "teacher", "rollout", "saved global_step_100"):  # fmt: skip
        assert word in text, f"{word!r} is missing in\n{text}"


def test_a_wide_screen_uses_its_room(good: RunView) -> None:
    text = text_of(good, 160, 45)
    for word in ("kl_loss", "zero_std", "teacher length", "val rouge_l", "prompt", "┈"):
        assert word in text
    lines = text.splitlines()
    assert sum(len(line.strip()) > 110 for line in lines) > 8, "three columns"


def test_a_healthy_run_shows_no_advice(good: RunView) -> None:
    assert "try " not in text_of(good, 100, 30)
    assert why_lines(good, 0.0)[1].endswith("nothing is unhealthy in its metrics")
    assert "why ·" not in text_of(good, 160, 45)


def test_why_says_that_a_few_steps_are_too_few(tmp_path: Path) -> None:
    view = RunView(write(tmp_path / "run", healthy(1, steps=3)))
    view.poll()
    assert "only 3 steps yet: collapses show from 8 on" in why_lines(view, 0.0)[1]


def test_a_wide_screen_of_a_collapsed_run_says_why_with_evidence_cause_and_cure(collapsed: RunView) -> None:
    text = text_of(collapsed, 160, 45)
    for word in (
        "why · 95% certain",
        "evidence",
        "the loss v1 keeps paying",
        "critic.loss=v2_raw",
        "advice",
        "best-scored answer",
    ):
        assert word in text, f"{word!r} is missing in\n{text}"


def test_the_group_switched_to_gets_its_rows_first_on_a_wide_screen_too(good: RunView) -> None:
    assert "zero_std" in text_of(good, 160, 45) and "entropy" not in text_of(good, 100, 20)
    good.focus = "actor"
    assert "entropy" in text_of(good, 100, 20) and "d_acc" in text_of(good, 100, 20)
    good.focus = "discriminator"


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100])
def test_every_key_is_in_the_footer_at_any_width(good: RunView, width: int) -> None:
    good.interactive = True
    foot = screen_lines(good, width, 20, time.time())[-1].plain
    good.interactive = False
    assert all(f" {key} " in foot for key in "qngp") and "…" not in foot


def test_tensorboards_address_is_in_the_footer_where_there_is_room(good: RunView) -> None:
    good.interactive, good.link = True, "http://127.0.0.1:6006/"
    feet = [screen_lines(good, width, 20, time.time())[-1].plain for width in (60, 120)]
    good.interactive, good.link = False, ""
    assert feet[1].endswith(" http://127.0.0.1:6006/") and cell_len(feet[1]) == 120
    assert "http" not in feet[0] and " pause" in feet[0]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    views = [RunView(write(tmp_path / stage, healthy(1, steps=20))) for stage in ("warmup", "gad")]
    for view in views:
        view.poll()
    text = "\n".join(line.plain for line in render_runs(views, 240, 30, time.time()).renderables)  # type: ignore[union-attr]
    assert f"{tmp_path}/warmup" in text and f"{tmp_path}/gad" in text


def test_a_finished_run_says_how_long_it_took(good: RunView) -> None:
    # 200 steps of about 40 s from the header's time to the end record's: about 8,000 s
    assert "took 2 h" in text_of(good, 100, 30)


def test_keys_switch_group_and_sample_and_pause(good: RunView) -> None:
    good.interactive = True
    before = text_of(good, 60, 20)
    good.key("g")
    good.key("n")
    good.key("p")
    after = text_of(good, 60, 20)
    assert "─" in before and "group: actor" in after and "sample 2/" in after and "picture paused" in after
    for key in "gggp":
        good.key(key)
    good.sample_back = 0


def test_without_colour_there_is_no_escape_code(good: RunView) -> None:
    console = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False)
    console.print(render(good, 100, 30, time.time()))
    assert isinstance(console.file, io.StringIO)
    assert "\x1b" not in console.file.getvalue()


def test_model_text_cannot_drive_the_terminal(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, append=False)
    writer.run(stage="gad", exp_name="\x1b]0;owned\x07x", total_steps=1, start_step=0)
    writer.step(1, 0, {"critic/d_acc": 0.6})
    nasty = "\x1b[2Jwiped\r\x9b31m\x00[bold]not markup[/bold]"
    writer.samples(1, "val", [{"prompt": nasty, "student": nasty, "teacher": nasty, "student_score": 0.0}])
    writer.event("note", nasty)
    view = RunView(tmp_path)
    view.poll()
    for size in SIZES:
        text = text_of(view, *size)
        assert all(c.isprintable() or c == "\n" for c in text)
    assert "[bold]not markup[/bold]" in text_of(view, 160, 45)
    assert "\x1b" not in export_html(view, 0.0)


@pytest.mark.parametrize("content", [b"", b'{"type":"run","total_steps":5}\n', b"torn", b"\xff\xfe\n\n"])
@pytest.mark.parametrize("size", SIZES[:4])
def test_a_run_without_steps_says_that_it_waits(tmp_path: Path, content: bytes, size: tuple[int, int]) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    view = RunView(tmp_path)
    view.poll()
    assert "wait" in text_of(view, *size)
    assert why_lines(view, 0.0)[1:]


def test_a_starting_run_shows_its_plan_and_for_how_long_it_has_been_starting(tmp_path: Path) -> None:
    plan = {"rows": {"kept": 384}, "steps": {"total": 96, "critic_only": 10}, "tokens_per_step": {"prompts": 4},
            "models": {"student": 134_500_000, "critic": 0}, "world_size": 2, "device": "cpu", "engine": "vllm",
            "unusual": ["no --reward-model: scores are noise"]}  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    view = RunView(tmp_path)
    view.poll()
    began = (tmp_path / "plan.json").stat().st_mtime
    text = "\n".join(line.plain for line in screen_lines(view, 60, 20, began + 12))
    for words in ("step 0/96", "workers are starting · 12 s", "96 steps of 4 prompts, 384 rows", "the critic alone",
                  "student 134.5M", "scores are noise"):  # fmt: skip
        assert words in text, f"{words!r} is missing in\n{text}"
    later = "\n".join(line.plain for line in screen_lines(view, 60, 20, began + 3600))
    assert "missing" in later.splitlines()[0] and "workers" not in later, "an hour of nothing is no start"
    for broken in ("[1]", "{", '{"steps": 3}'):
        (tmp_path / "plan.json").write_text(broken)
        assert screen_lines(view, 60, 20, time.time())


def test_a_resumed_run_is_starting_and_not_what_it_ended_as(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", healthy(1, steps=20))
    view = RunView(folder)
    view.poll()
    assert view.log.state(time.time()).kind == "done"
    (folder / "plan.json").write_text("{}")  # what a resume writes first
    os.utime(folder / "metrics.jsonl", (time.time() - 60,) * 2)
    assert view.log.state(time.time()).kind == "starting"
    os.utime(folder / "metrics.jsonl", (time.time() + 1,) * 2)  # its first record is there
    assert view.log.state(time.time()).kind == "done"


def test_a_dead_run_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "dead", healthy(1, steps=20), ended=False)
    write_status(folder, state="running", stage="gad", step=20, phase="actor")
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "time": 1000.0}))  # before our process began
    view = RunView(folder)
    view.poll()
    assert "dead" in text_of(view, 60, 20) and "is gone" in text_of(view, 100, 30)


def test_runs_stand_side_by_side_or_below_each_other(good: RunView, collapsed: RunView) -> None:
    good.interactive = collapsed.interactive = False
    for width, height in ((160, 30), (80, 40), (60, 10)):
        lines = render_runs([good, collapsed], width, height, time.time()).renderables
        assert len(lines) <= height
        assert all(cell_len(line.plain) <= width for line in lines)  # type: ignore[union-attr]
    both = render_runs([good, collapsed], 160, 30, time.time()).renderables[1].plain  # type: ignore[union-attr]
    assert both.count("step ") >= 2


def test_what_render_takes_is_a_log_too(tmp_path: Path) -> None:
    log = RunLog(write(tmp_path / "run", healthy(2, steps=30)))
    log.poll()
    console = Console(file=io.StringIO(), width=60)
    console.print(render(log, 60, 20))
    assert isinstance(console.file, io.StringIO) and "step 30/30" in console.file.getvalue()


def test_the_sparkline_marks_what_lies_outside_the_band() -> None:
    bounds = Range(0.55, 0.8, warn_low=0.5, warn_high=0.9)
    line = sparkline([0.61, 0.7, 0.95, math.nan], 8, bounds)
    styles = [str(span.style) for span in line.spans]
    assert "green" in styles[0] and "yellow" in styles[2] and "red" in styles[3]
    assert line.plain[3] == "×" and cell_len(line.plain) == 8
    # low 0.55 (the band's edge), high 0.95: 0.95 is the top bar, 0.61 is bar int(0.15 * 8) = 1
    assert line.plain[0] == "▂" and line.plain[2] == "█"


def test_a_lone_spike_does_not_flatten_the_rest_and_a_lasting_rise_is_drawn_in_full() -> None:
    spiked = [1.0, 2.0, 1.0, 2.0, 90.0, 1.0, 2.0, 1.0, 2.0, 1.0]
    assert sparkline(spiked, 10, None).plain == "▁█▁██▁█▁█▁"
    risen = [1.0] * 8 + [80.0, 100.0]  # (80 - 1) / 99 * 8 = 6.4: the seventh bar
    assert sparkline(risen, 10, None).plain == "▁▁▁▁▁▁▁▁▇█"
    assert all(cell_len(line.plain) == 40 for line in chart(spiked, 40, 5, None))


def test_the_chart_draws_the_band_edges_and_joins_the_points() -> None:
    lines = [line.plain for line in chart([0.0, 1.0, 0.0, 1.0] * 20, 40, 5, Range(0.2, 0.8))]
    assert len(lines) == 5 and all(cell_len(line) == 40 for line in lines)
    flat = [line.plain for line in chart([0.5] * 50, 40, 5, Range(0.4, 0.6))]
    assert any("┈┈┈" in line for line in flat)


@pytest.mark.parametrize(
    ("bounds", "text"),
    [(Range(0.55, 0.8), ".55–.8"), (Range(0.01, math.inf), "≥.01"), (Range(0, 0.3), "≤.3"), (Range(-50, 50), "±50"),
     (None, "")],
)  # fmt: skip
def test_bands_are_written_short(bounds: Range | None, text: str) -> None:
    assert band_text(bounds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.24, "4.2 s"), (48, "48 s"), (725, "12 min 5 s"), (12000, "3 h 20 min"), (187200, "2 d 4 h"), (3600, "1 h"),
     (math.nan, "?")],
)  # fmt: skip
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_wide_characters_count_two_cells() -> None:
    assert wrap("散射散射", 5, 3) == ["散射", "散射"]
    assert wrap("why is the sky", 8, 3) == ["why is", "the sky"]
    assert wrap("a abcdefghij b", 4, 9) == ["a", "abcd", "efgh", "ij b"]
    pieces = wrap("散射散射散射", 5, 2)
    assert len(pieces) == 2 and pieces[1].endswith("…") and all(cell_len(p) <= 5 for p in pieces)
    assert clean("a\nb\tc\x1b[0m") == "a⏎b c[0m"


def test_rows_are_dealt_in_proportion_and_never_beyond_the_wish() -> None:
    assert share_rows(10, [2, 20]) == [1, 9]  # 1/2 of its wish against 9/20: the next row is the second's
    assert share_rows(50, [2, 3]) == [2, 3]
    assert share_rows(0, [2, 3]) == [0, 0]


def test_a_plain_line_has_the_same_words_each_step() -> None:
    record = {"type": "step", "step": 12, "metrics": {"critic/d_acc": 0.62, "timing_s/step": 40.2}}
    assert plain_line(record, 200) == "step 12/200  d_acc 0.62  s 40.2"
    assert "\x1b" not in plain_line(record)


def test_json_is_strict_and_has_state_verdicts_and_diagnoses(collapsed: RunView) -> None:
    text = json.dumps(run_json(collapsed, time.time()), allow_nan=False)
    found = json.loads(text)
    assert found["state"] == "done" and found["step"] == 141
    assert found["diagnoses"][0]["name"] == "runaway_gap" and found["groups"]["discriminator"] == "bad"
