"""The watchdog: no progress ends a worker with 7, the phase's name and its stacks; slow work that goes on does not.

Each case is a process of its own, since a watchdog ends the process it lives in.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gadcli.distributed.watchdog import WATCHDOG
from gadcli.distributed.world import World
from gadcli.model.micro_batches import passes
from gadcli.model.packing import Group
from train.training import end_of_hung_worker, environment, prepare, write_inputs

TIMEOUT = 2.0
PROGRAM = """
import sys, time
from pathlib import Path
from gadcli.distributed.watchdog import Watchdog

def stuck_in_here():
    time.sleep(60)

dog = Watchdog()
dog.start({timeout}, lambda message: Path(sys.argv[1]).write_text(message))
{body}
dog.stop()
"""


def run(body: str, record: Path) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(timeout=TIMEOUT, body=body)
    return subprocess.run(
        [sys.executable, "-c", program, str(record)], env=environment(), capture_output=True, text=True, timeout=50
    )


def test_a_phase_without_progress_ends_with_7_its_name_and_the_stacks(tmp_path: Path) -> None:
    start = time.monotonic()
    done = run("dog.enter('rollout', 12)\nstuck_in_here()", tmp_path / "record")
    assert done.returncode == 7
    assert time.monotonic() - start < 40
    assert re.fullmatch(r"no progress for \d+ s in step 12, phase rollout", (tmp_path / "record").read_text())
    assert "stuck_in_here" in done.stderr


@pytest.mark.parametrize(
    "body",
    [
        # a phase of 20 micro-batches, twice as long as the limit
        "dog.enter('actor', 1)\nfor _ in range(20):\n    time.sleep({timeout} / 10)\n    dog.beat()",
        # a save writes files, and says nothing meanwhile
        "dog.enter('save', 1)\nwith open(sys.argv[1], 'wb', 0) as f:\n    for _ in range(20):\n"
        "        time.sleep({timeout} / 10)\n        f.write(b'x' * 4096)",
        # after the end nothing is watched
        "dog.stop()\ntime.sleep(2 * {timeout})",
    ],
    ids=["micro-batches", "saving", "stopped"],
)
def test_slow_work_that_goes_on_is_left_alone(body: str, tmp_path: Path) -> None:
    done = run(body.format(timeout=TIMEOUT), tmp_path / "record")
    assert done.returncode == 0, done.stderr


def test_a_save_that_writes_nothing_is_a_hang_too(tmp_path: Path) -> None:
    assert run("dog.enter('save', 3)\nstuck_in_here()", tmp_path / "record").returncode == 7
    assert (tmp_path / "record").read_text().endswith("in step 3, phase save")


def test_a_failing_record_does_not_keep_the_process(tmp_path: Path) -> None:
    done = run("stuck_in_here()", tmp_path / "no" / "such" / "folder")
    assert done.returncode == 7


def test_every_micro_batch_is_a_beat(world: World) -> None:
    groups = [Group([0] * 5, [[0]]) for _ in range(4)]
    beats = []
    for _ in passes(SimpleNamespace(gad_shares=True, gad_gathers_once=False), groups, 6, world):
        beats.append(WATCHDOG._beaten_at)
        time.sleep(0.001)
    assert len(set(beats)) == 4


def test_a_hung_worker_leaves_a_record_that_names_the_phase(tmp_path: Path) -> None:
    """The real worker, with a training loop that stops moving in its first rollout."""
    run_dir = prepare(
        tmp_path / "run", write_inputs(tmp_path / "inputs"), "seqkd", "fsdp.timeout_s=2", "data.val_files=[]"
    )
    record, stderr = end_of_hung_worker(
        run_dir,
        "import threading, gadcli.train.stages as seqkd\n"
        "def hang(run):\n"
        "    for step, _ in seqkd.steps(run):\n"
        "        run.on_phase('rollout', step)\n"
        "        threading.Event().wait()\n"
        "seqkd.train_seqkd = hang",
    )
    assert "in step 1, phase rollout" in record["message"]
    assert "fsdp.timeout_s" in record["hint"]
    assert "in hang" in stderr
