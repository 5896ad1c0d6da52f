"""Semantics of metrics.jsonl: one line a record, torn and foreign lines survive, a resume replaces steps."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gadcli.metrics.history import History, StepRecord
from gadcli.metrics.record import METRICS_FILE, MetricsWriter, RunLog, read_status, write_status
from gadcli.metrics.samples import SampleTail, drop_after


def read(run_dir: Path) -> RunLog:
    log = RunLog(run_dir)
    log.poll()
    return log


def test_what_is_written_is_read_back_bit_equal(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, append=False)
    writer.run(stage="gad", critic_loss="final", total_steps=3, start_step=0)
    writer.step(1, 0, {"critic/d_acc": 0.1 + 0.2, "critic/d_loss": 1e-300})
    writer.eval(1, {"val/rouge_l": 0.25})
    writer.event("save", "saved", path="x")
    writer.end(0, "done")
    log = read(tmp_path)
    assert log.run["critic_loss"] == "final" and log.loss == "final"
    assert log.history.last is not None
    assert log.history.last.metrics == {"critic/d_acc": 0.1 + 0.2, "critic/d_loss": 1e-300}
    assert log.evals[0].metrics == {"val/rouge_l": 0.25}
    assert (log.events[0].kind, log.events[0].step) == ("save", 1)
    assert log.state(time.time()).kind == "done"
    assert log.bad_lines == 0


def test_non_finite_values_are_strict_json_and_come_back_as_nan(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, append=False)
    writer.step(1, 0, {"critic/d_loss": math.inf, "critic/d_acc": math.nan})
    text = (tmp_path / METRICS_FILE).read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert math.isnan(read(tmp_path).series("critic/d_loss")[1][0])


def test_a_torn_last_line_waits_for_its_end(tmp_path: Path) -> None:
    line = json.dumps({"type": "step", "time": 1.0, "step": 1, "epoch": 0, "metrics": {"critic/d_acc": 0.5}})
    path = tmp_path / METRICS_FILE
    path.write_text(line[:20])
    log = RunLog(tmp_path)
    assert log.poll() is False and len(log.history) == 0 and log.bad_lines == 0
    path.write_text(line + "\n")
    assert log.poll() is True
    assert log.series("critic/d_acc") == ([1], [0.5])
    assert log.poll() is False


def test_an_appending_writer_ends_a_torn_line_first(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"type":"step","time":1,"st')
    writer = MetricsWriter(tmp_path, append=True)
    writer.step(5, 0, {"critic/d_acc": 0.6})
    log = read(tmp_path)
    assert log.series("critic/d_acc") == ([5], [0.6])
    assert log.bad_lines == 1


def test_missing_and_empty_files_are_states_not_errors(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "nowhere")
    assert log.poll() is False and log.state(0.0).kind == "missing"
    (tmp_path / METRICS_FILE).touch()
    log = RunLog(tmp_path)
    assert log.poll() is False and log.state(0.0).kind == "empty"


@pytest.mark.parametrize(
    "line",
    [b"not json", b"[1,2]", b'{"type":"step"}', b'{"type":"step","step":true,"metrics":{}}', b"\x00\x00\xff",
     b'{"type":"step","step":1,"metrics":[]}', b"[" * 100_000, b'{"type":"later"}'],
)  # fmt: skip
def test_foreign_lines_are_counted_and_do_no_harm(tmp_path: Path, line: bytes) -> None:
    good = b'{"type":"step","step":2,"metrics":{"critic/d_acc":0.5,"note":"x","flag":true}}'
    (tmp_path / METRICS_FILE).write_bytes(line + b"\n" + good + b"\n\n")
    log = read(tmp_path)
    assert log.bad_lines == 1
    assert log.history.names() == {"critic/d_acc"}


def test_a_resume_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, append=False)
    writer.run(start_step=0, total_steps=9)
    for step in range(1, 8):
        writer.step(step, 0, {"critic/d_acc": 0.1})
    writer.eval(2, {"val/d_acc": 0.1})
    writer.eval(6, {"val/d_acc": 0.1})
    writer.close()
    writer = MetricsWriter(tmp_path, append=True)
    writer.run(start_step=4, resumed=True, total_steps=9)
    log = read(tmp_path)
    # steps 5-7 were written after the checkpoint at 4 and are no part of the story
    assert log.series("critic/d_acc")[0] == [1, 2, 3, 4]
    assert [e.step for e in log.evals] == [2]
    writer.step(5, 0, {"critic/d_acc": 0.9})
    log.poll()
    assert log.series("critic/d_acc") == ([1, 2, 3, 4, 5], [0.1] * 4 + [0.9])
    assert len(log.runs) == 2


def test_a_rotated_file_goes_on_and_a_copied_one_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    writer = MetricsWriter(tmp_path, append=False)
    writer.run(start_step=0)
    for step in (1, 2):
        writer.step(step, 0, {"critic/d_acc": 0.1})
    log = read(tmp_path)
    copy = path.read_bytes()
    path.rename(tmp_path / "metrics.jsonl.1")
    writer = MetricsWriter(tmp_path, append=False)
    writer.step(3, 0, {"critic/d_acc": 0.3})
    log.poll()
    assert log.series("critic/d_acc")[0] == [1, 2, 3]
    fresh = read_copy = tmp_path / "copy"
    read_copy.mkdir()
    (fresh / METRICS_FILE).write_bytes(copy)
    log = read(fresh)
    other = fresh / "other"
    other.write_bytes(copy + b'{"type":"step","step":3,"metrics":{"critic/d_acc":0.7}}\n')
    os.replace(other, fresh / METRICS_FILE)
    log.poll()
    assert log.series("critic/d_acc")[0] == [1, 2, 3]
    assert len(log.runs) == 1


def test_memory_stays_bounded_and_the_first_and_last_steps_stay(tmp_path: Path) -> None:
    history = History(recent=100, overview=200)
    for step in range(1, 50_001):
        history.append(StepRecord(step, 0.0, 0.0, {"critic/d_acc": float(step)}))
    steps, values = history.series("critic/d_acc")
    assert len(steps) <= 400
    assert steps[0] == 1 and steps[-100:] == list(range(49_901, 50_001))
    assert steps == sorted(set(steps)) and values == [float(s) for s in steps]
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert max(gaps) <= 2 * 50_000 / 100, "thinned evenly, not with one hole"


def test_a_long_file_is_sampled_and_then_followed(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    with path.open("w") as file:
        file.write('{"type":"run","start_step":0,"critic_loss":"v2","total_steps":20000}\n')
        for step in range(1, 12_001):
            file.write(f'{{"type":"step","time":{step},"step":{step},"epoch":0,"metrics":{{"critic/d_acc":0.5}}}}\n')
        file.write('{"type":"run","start_step":10000,"critic_loss":"final","resumed":true,"total_steps":20000}\n')
        for step in range(10_001, 20_001):
            file.write(f'{{"type":"step","time":{step},"step":{step},"epoch":1,"metrics":{{"critic/d_acc":0.7}}}}\n')
    log = RunLog(tmp_path, full_read_bytes=4 << 10)
    assert log.poll() and log.sampled
    steps, values = log.series("critic/d_acc")
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == 20_000
    assert all(v == (0.5 if s <= 10_000 else 0.7) for s, v in zip(steps, values, strict=True))
    assert log.loss == "final" and len(log.runs) == 2 and log.bad_lines == 0
    with path.open("a") as file:
        file.write('{"type":"step","step":20001,"metrics":{"critic/d_acc":0.8}}\n')
    log.poll()
    assert log.latest("critic/d_acc") == 0.8


def test_a_run_whose_process_is_gone_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (tmp_path / METRICS_FILE).write_text('{"type":"step","step":3,"metrics":{}}\n')
    write_status(tmp_path, state="running", stage="gad", step=3, phase="actor")
    assert read(tmp_path).state(time.time()).kind == "running"
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**status, "pid": child.pid}))
    state = read(tmp_path).state(time.time())
    assert state.kind == "dead" and "actor of step 3" in state.text


def test_a_reused_pid_does_not_make_a_dead_run_live(tmp_path: Path) -> None:
    # Our own pid lives, but it cannot have written a status dated before this machine's process began.
    (tmp_path / METRICS_FILE).write_text('{"type":"step","step":3,"metrics":{}}\n')
    write_status(tmp_path, state="running", stage="gad", step=3, phase="actor")
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**status, "time": 1000.0}))
    assert read(tmp_path).state(time.time()).kind == "dead"


def test_a_run_on_another_host_is_not_called_dead(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"type":"step","step":3,"metrics":{}}\n')
    write_status(tmp_path, state="running", stage="gad", step=3, phase="actor")
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**status, "host": "elsewhere", "pid": 1 << 22}))
    now = status["time"]
    assert read(tmp_path).state(now).kind == "running"
    assert read(tmp_path).state(now + 3600).kind == "silent"
    assert read_status(tmp_path / "nowhere") is None


def test_a_resume_takes_overtaken_samples_out_and_keeps_the_rest_byte_for_byte(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, append=False)
    for step in (10, 20, 25):
        writer.samples(step, "train" if step == 25 else "val", [{"prompt": f"p{step}", "student": "s", "teacher": "t"}])
    writer.close()
    path = tmp_path / "samples.jsonl"
    before = path.read_bytes()
    tail = SampleTail(tmp_path)
    tail.poll()
    assert drop_after(tmp_path, 30) == 0 and path.read_bytes() == before
    with path.open("ab") as file:
        file.write(b'{"step":26,"ki')  # torn by the kill
    assert drop_after(tmp_path, 10) == 20, "the last evaluation that was there already"
    assert path.read_bytes() == before.splitlines(keepends=True)[0]
    tail.poll()
    assert [row.step for row in tail.rows] == [10] and [p.name for p in tmp_path.glob(".samples*")] == []
    assert drop_after(tmp_path / "nowhere", 0) == 0
