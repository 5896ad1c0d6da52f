"""The demo from end to end, real engines on a tiny student in the place of SmolLM2: stages, control, merge, table.

Killed in the middle of gad it goes on where it stopped and ends with the table; done once, it only shows the table.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gadcli.demo.docstring_data import Entry, stdlib_entries
from tiny import write_tiny_model
from train.training import environment, records


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache in which the demo's model is already converted: it is a 12-layer dwarf with a tokenizer of its own."""
    cache = tmp_path_factory.mktemp("cache")
    words = "\n".join(Entry.answer(entry) for entry in stdlib_entries())  # merges that keep answers below the limit
    write_tiny_model(cache / "SmolLM2-135M-Instruct", layers=12, text=words, vocabulary=4000)
    return environment() | {"GAD_CACHE": str(cache)}


def demo(folder: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gadcli", "demo", "--quick", "--output-dir", str(folder)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_demo_killed_in_gad_goes_on_and_ends_with_the_table(env: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    first = demo(folder, env)
    deadline = time.monotonic() + 300
    metrics = folder / "gad" / "metrics.jsonl"
    while not (metrics.exists() and '"step":1' in metrics.read_text()) and time.monotonic() < deadline:
        assert first.poll() is None, first.communicate()[1][-3000:]
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()

    second = demo(folder, env)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err[-3000:]
    for row in ("before", "after seqkd", "after warmup", "after gad", "control", "teacher"):
        assert row in out
    assert "paired" in out and "Traceback" not in err
    assert "--exp-name seqkd" not in err and "--exp-name warmup" not in err  # done before the kill
    assert (folder / "merged" / "model.safetensors").exists()

    control = [r["metrics"]["timing_s/step"] for r in records(folder / "control") if r["type"] == "step"]
    played = [r["metrics"]["timing_s/step"] for name in ("warmup", "gad") for r in records(folder / name)
              if r["type"] == "step"]  # fmt: skip
    assert sum(control) >= 0.8 * sum(played)  # the control got the wall time (a resumed step counts twice)

    third = demo(folder, env)
    again, err = third.communicate(timeout=60)
    assert third.returncode == 0 and again.startswith("Held-out results") and out.endswith(again)
    assert "gad train" not in err
