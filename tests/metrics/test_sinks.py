"""TensorBoard through its own reader: steps never double after resumes, values are finite, failures are loud early."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gadcli.errors import ConfigError
from gadcli.metrics.sinks import TensorBoardSink, WandbSink, layout
from gadcli.metrics.table import GROUPS, METRICS


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
    assert events.Histograms("scores/student")[0].histogram_value.num == 2


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


def test_wandb_offline_writes_beside_the_run_and_never_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="optional: pip install wandb")
    canary = "canary0" + "a" * 33
    monkeypatch.setenv("WANDB_API_KEY", canary)
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = WandbSink(tmp_path, project="p", name="n", config={"actor.optim.lr": 1e-6})
    for step in range(1, 4):
        sink.scalars(step, {"critic/d_acc": 0.6, "critic/d_loss": math.nan})
    sink.samples(3, [{"prompt": "p", "student": "s", "teacher": "t"}])
    sink.close()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    shown = "".join(capfd.readouterr()) + caplog.text
    assert canary.encode() not in written and canary not in shown
