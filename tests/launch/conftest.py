"""The `start` fixture: a real parent process over small workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.processes import HERE, SOURCE, Parent, Start, alive


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a parent over small workers; whatever of it is left at the test's end is killed."""
    parents: list[Parent] = []

    def starter(
        does: str, nproc: int = 1, timeout_s: float = 600.0, display: str = "json", more: tuple[str, ...] = ()
    ) -> Parent:
        env = {
            **os.environ,
            "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{SOURCE}:{HERE}",
            "SMALL_WORKER": does,
            "OMP_NUM_THREADS": "1",
        }
        words = [sys.executable, str(HERE / "parent_process.py"), str(tmp_path), str(nproc), str(timeout_s), display]
        process = subprocess.Popen(
            [*words, *more], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        parents.append(Parent(tmp_path, process))
        return parents[-1]

    yield starter
    for parent in parents:
        if parent.process.poll() is None:
            parent.process.kill()
            parent.process.wait()
    for path in [*tmp_path.glob("pid_*"), *tmp_path.glob("child_*")]:
        if path.read_text() and alive(int(path.read_text())):
            os.kill(int(path.read_text()), signal.SIGKILL)
