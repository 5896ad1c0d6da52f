"""Real parents and workers as processes, for the tests of launching: starting, waiting, looking for the living."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"


def wait_until(happens: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if happens():
            return True
        time.sleep(0.05)
    return happens()


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


class Parent:
    """A parent process under test, with its workers' folder."""

    def __init__(self, run_dir: Path, process: subprocess.Popen[str]) -> None:
        self.run_dir = run_dir
        self.process = process

    def pid_of(self, name: str) -> int:
        """The pid a worker (or its child) wrote down, once it has."""
        path = self.run_dir / name
        assert wait_until(lambda: path.exists() and path.read_text() != "", 20), f"{name} never appeared"
        return int(path.read_text())

    def stepping(self) -> None:
        """Wait until the first step is recorded."""
        path = self.run_dir / "metrics.jsonl"
        assert wait_until(lambda: path.exists() and '"step"' in path.read_text(), 20), "no step was recorded"

    def end(self, within_s: float = 20.0) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        out, err = self.process.communicate(timeout=within_s)
        return self.process.returncode, out, err


Start = Callable[..., Parent]
