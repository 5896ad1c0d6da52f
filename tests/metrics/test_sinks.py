"""TensorBoard through its own reader: steps never double after resumes, values are finite, failures are loud early."""

from __future__ import annotations

import http.server
import importlib.util
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gadcli.errors import ConfigError
from gadcli.metrics.diagnose import Watch
from gadcli.metrics.facts import RunFacts
from gadcli.metrics.record import MetricsWriter
from gadcli.metrics.sinks import TensorBoardSink, WandbSink, layout, own_id
from gadcli.metrics.table import GROUPS, METRICS
from metrics.generated import healthy


def test_a_twice_resumed_run_shows_each_step_once_in_rising_order(tmp_path: Path) -> None:
    for first, last, purge in ((1, 10, None), (7, 12, 7), (9, 15, 9)):
        sink = TensorBoardSink(tmp_path, purge)
        for step in range(first, last + 1):
            sink.scalars(step, {"critic/d_acc": step / 100, "critic/d_loss": math.nan})
        sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = events.Scalars("critic/d_acc")
    assert [s.step for s in scalars] == list(range(1, 16))
    assert all(math.isfinite(s.value) for s in scalars)
    assert "critic/d_loss" not in events.Tags()["scalars"], "a NaN is left out, not drawn"


def test_a_killed_run_whose_events_end_torn_is_read_on_past_its_resumes(tmp_path: Path) -> None:
    steps = [(1, 40, 1), (31, 60, 31), (51, 80, 51)]
    for first, last, purge in steps:
        sink = TensorBoardSink(tmp_path, purge)
        sink.hparams({"actor.optim.lr": 1e-6})
        for step in range(first, last + 1):
            sink.scalars(step, {"critic/d_acc": step / 100})
            sink.histograms(step, {"scores/student": [step, step + 1.0]})
        sink.close()
        newest = max(tmp_path.glob("events*"), key=lambda path: path.stat().st_mtime_ns)
        if last < 80:  # killed: the last record is cut in its middle
            newest.write_bytes(newest.read_bytes()[:-37])
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    for found in (events.Scalars("critic/d_acc"), events.Histograms("scores/student")):
        seen = [event.step for event in found]
        assert seen == sorted(set(seen)) and seen[0] == 1 and seen[-1] == 80 and len(seen) >= 79


def test_texts_do_not_double_where_a_resume_repeats_an_evaluation(tmp_path: Path) -> None:
    row = {"prompt": "p", "student": "s", "teacher": "t", "student_score": 0.1, "teacher_score": 0.2}
    # the first start evaluated at 10 and 20 and was killed at 25; it goes on from a checkpoint of step 10
    for evals, purge, until in (((10, 20), 1, 0), ((20, 30), 11, 20)):
        sink = TensorBoardSink(tmp_path, purge, until)
        sink.hparams({"actor.optim.lr": 1e-6})
        for step in evals:
            sink.samples(step, [row])
        sink.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    assert [e.step for e in events.Tensors("samples/text_summary")] == [10, 20, 30]
    assert [e.step for e in events.Tensors("hparams/text_summary")] == [0]


def test_texts_histograms_and_hparams_arrive(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.samples(1, [{"prompt": "a|b", "student": "s\nt", "teacher": "t", "student_score": 0.1, "teacher_score": 0.2}])
    sink.histograms(1, {"scores/student": [0.1, 0.2, math.inf], "none": []})
    sink.hparams({"actor.optim.lr": 1e-6})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert tags["histograms"] == ["scores/student"]
    assert {"samples/text_summary", "hparams/text_summary"} <= set(tags["tensors"])
    columns = events.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert columns.plugin_name == "hparams" and b"actor.optim.lr" in columns.content
    assert len(list(tmp_path.rglob("events*"))) == 1, "no second run for the hparams"
    assert events.Histograms("scores/student")[0].histogram_value.num == 2


def test_a_steps_records_cost_under_five_milliseconds_of_cpu(tmp_path: Path) -> None:
    info, rows = healthy(1, steps=200)
    writer, sink = MetricsWriter(tmp_path, append=False), TensorBoardSink(tmp_path / "tb")
    watch = Watch(RunFacts.of(info))
    scores = [math.sin(i) for i in range(1024)]
    begin = time.process_time()
    for step, metrics in enumerate(rows, start=1):
        writer.step(step, 0, metrics)
        writer.samples(step, "train", [{"prompt": "p" * 400, "student": "s" * 800, "teacher": "t" * 800}])
        sink.scalars(step, metrics)
        sink.histograms(step, {"scores/student": scores, "scores/teacher": scores[:128], "response_length": scores})
        watch.step(step, metrics)
    assert (time.process_time() - begin) / len(rows) < 5e-3
    sink.close()


def test_the_layout_has_the_four_groups_and_only_names_of_the_table() -> None:
    import re

    charts = layout()
    assert tuple(charts) == GROUPS
    for group in charts.values():
        for kind, tags in group.values():
            assert kind == "Multiline"
            for tag in tags:
                known = tag == "timing_s/.*" or any(re.fullmatch(tag, name) for name in METRICS)
                assert known, tag


def test_an_unwritable_folder_fails_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        TensorBoardSink(tmp_path / "file" / "tensorboard")


def test_wandb_missing_fails_at_the_start_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-5f1d")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        WandbSink(tmp_path, project="p", name="n", config={})
    assert caught.value.hint == "pip install wandb"
    assert "canary" not in f"{caught.value.message}{caught.value.hint}"


def history(run: Path) -> list[dict[str, Any]]:
    """The rows of a .wandb file, by the client's own message type: LevelDB's log format around protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, rows, whole = run.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's end has no room for another header
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, or the last piece
            record, whole = Record.FromString(whole), b""
            if record.HasField("history"):
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return rows


def test_wandb_offline_writes_beside_the_run_and_never_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb", reason="optional: pip install wandb")
    canary = "canary0" + "a" * 33
    monkeypatch.setenv("WANDB_API_KEY", canary)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first, last, fresh in ((1, 3, True), (3, 5, False)):  # the second goes on from step 2, as a resume does
        sink = WandbSink(tmp_path, project="p", name="n", config={"actor.optim.lr": 1e-6}, fresh=fresh)
        for step in range(first, last + 1):
            sink.scalars(step, {"critic/d_acc": step / 10, "critic/d_loss": math.nan})
        sink.samples(last, [{"prompt": "p", "student": "s", "teacher": "t"}])
        sink.close()
    wandb.teardown()  # its service writes a file's end on its way out
    begun = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(begun) == 2 and len({path.name for path in begun}) == 1, "one run at W&B, two starts"
    steps = [[row["step"] for row in history(path) if "critic/d_acc" in row] for path in begun]
    assert steps == [[1, 2, 3], [3, 4, 5]]
    assert all("critic/d_loss" not in row for path in begun for row in history(path))
    assert any("samples" in key for row in history(begun[1]) for key in row)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    shown = "".join(capfd.readouterr()) + caplog.text
    assert canary.encode() not in written and canary not in shown


def test_wandb_names_a_rerun_anew_and_a_resume_alike(tmp_path: Path) -> None:
    first = own_id(tmp_path, fresh=True)
    assert own_id(tmp_path, fresh=False) == first != own_id(tmp_path, fresh=True)


def test_wandb_without_a_server_is_a_warning_and_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb", reason="optional: pip install wandb")
    wandb.teardown()  # its address is read once a process
    canary = "canary0" + "b" * 33
    monkeypatch.setenv("WANDB_API_KEY", canary)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setattr("gadcli.metrics.sinks.WANDB_START_S", 3)
    sink = WandbSink(tmp_path, project="p", name="n", config={})
    sink.scalars(1, {"critic/d_acc": 0.6})
    sink.close()
    assert "cannot be reached" in caplog.text and "wandb sync" in sink.note
    assert canary not in "".join(capfd.readouterr()) + caplog.text
    wandb.teardown()  # its service writes the file's end on its way out
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert [row["critic/d_acc"] for row in history(run) if "critic/d_acc" in row] == [0.6]


class RefusesEveryKey(http.server.BaseHTTPRequestHandler):
    """What W&B's server says to a key that it does not know."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        said = b'{"errors":[{"message":"user is not logged in"}]}'
        self.send_response(401)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("key", ["canary0" + "c" * 33, "canary-too-short"])
def test_a_wrong_wandb_key_fails_at_the_start_and_is_never_shown(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    wandb = pytest.importorskip("wandb", reason="optional: pip install wandb")
    wandb.teardown()  # its address is read once a process
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RefusesEveryKey) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_API_KEY", key)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ConfigError, match="did not accept") as caught:
            WandbSink(tmp_path, project="p", name="n", config={})
        wandb.teardown()
        server.shutdown()
    assert caught.value.exit_code == 2 and "wandb login" in str(caught.value.hint)
    said = f"{caught.value.message}{caught.value.hint}{caplog.text}" + "".join(capfd.readouterr())
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert key not in said and key.encode() not in written
    assert "cannot be reached" not in said, "a server that refuses has been reached"
