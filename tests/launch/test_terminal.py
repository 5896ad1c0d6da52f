"""The parent on a real terminal (a pseudo one): what it draws there, and that it gives it back however it ends."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.processes import HERE, SOURCE, alive, wait_until

ENTER, LEAVE, SHOW_CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"


class Terminal:
    """A pseudo terminal with a parent on it that is its session's leader, as under a shell."""

    def __init__(self, run_dir: Path, does: str) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        env = {**os.environ, "PYTHONPATH": f"{SOURCE}:{HERE}", "SMALL_WORKER": does, "TERM": "xterm-256color",
               "COLUMNS": "80", "LINES": "24"}  # fmt: skip
        words = [sys.executable, str(HERE / "parent_process.py"), str(run_dir), "1", "600", "live"]
        self.process = subprocess.Popen(
            words, env=env, stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            preexec_fn=lambda: take_terminal(0),
        )  # fmt: skip
        self.screen = b""

    def read(self, seconds: float = 0.1) -> None:
        while select.select([self.master], [], [], seconds)[0]:
            self.screen += os.read(self.master, 65536)

    def until(self, text: bytes, within_s: float = 20.0) -> None:
        def seen() -> bool:
            self.read()
            return text in self.screen

        assert wait_until(seen, within_s), self.screen[-2000:].decode("utf-8", "replace")

    def end(self) -> int:
        deadline = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read()
        self.read()
        return self.process.wait(1)

    def is_as_before(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before


def take_terminal(fd: int) -> None:
    import fcntl

    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        if terminal.process.poll() is None:
            terminal.process.kill()
            terminal.process.wait()


def gave_back(terminal: Terminal) -> bool:
    """Left the second screen after it was entered, cursor shown after that, modes as before."""
    screen = terminal.screen
    return (
        screen.rfind(LEAVE) > screen.rfind(ENTER)
        and SHOW_CURSOR in screen[screen.rfind(LEAVE) :]
        and (terminal.is_as_before())
    )


def test_the_dashboard_is_drawn_and_the_terminal_given_back_at_the_end(
    tmp_path: Path, terminals: list[Terminal]
) -> None:
    terminals.append(terminal := Terminal(tmp_path, "steps=20 sleep=0.1"))
    terminal.until(ENTER)
    terminal.until(b"seqkd")
    assert terminal.end() == 0
    assert gave_back(terminal)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_the_terminal_is_given_back_after_a_signal(
    tmp_path: Path, terminals: list[Terminal], number: signal.Signals, code: int
) -> None:
    terminals.append(terminal := Terminal(tmp_path, "steps=1000 sleep=0.1"))
    terminal.until(b"seqkd")
    os.kill(terminal.process.pid, number)
    assert terminal.end() == code
    assert gave_back(terminal)
    assert b"finishing this step and saving" in terminal.screen


def test_ctrl_c_typed_at_the_terminal_reaches_the_workers_once(tmp_path: Path, terminals: list[Terminal]) -> None:
    terminals.append(terminal := Terminal(tmp_path, "steps=1000 sleep=0.1"))
    terminal.until(b"seqkd")
    os.write(terminal.master, b"\x03")
    assert terminal.end() == 130  # 130 with a save: a second, unwanted signal would have killed before saving
    assert b"saved at step" in (tmp_path / "metrics.jsonl").read_bytes()
    assert gave_back(terminal)


def test_the_terminal_is_given_back_after_a_worker_was_killed(tmp_path: Path, terminals: list[Terminal]) -> None:
    terminals.append(terminal := Terminal(tmp_path, "steps=1000 sleep=0.1"))
    terminal.until(b"seqkd")
    os.kill(int((tmp_path / "pid_0").read_text()), signal.SIGKILL)
    assert terminal.end() == 7
    assert gave_back(terminal)


def test_q_closes_the_picture_and_the_run_goes_on(tmp_path: Path, terminals: list[Terminal]) -> None:
    terminals.append(terminal := Terminal(tmp_path, "steps=60 sleep=0.1"))
    terminal.until(b"seqkd")
    os.write(terminal.master, b"q")
    terminal.until(b"the run goes on")
    assert terminal.process.poll() is None
    assert terminal.end() == 0
    assert gave_back(terminal)


def test_a_terminal_that_is_closed_lets_the_run_save_and_leave(tmp_path: Path, terminals: list[Terminal]) -> None:
    terminals.append(terminal := Terminal(tmp_path, "steps=1000 sleep=0.1"))
    terminal.until(b"seqkd")
    worker = int((tmp_path / "pid_0").read_text())
    os.close(terminal.slave)
    os.close(terminal.master)  # what closing a window does: SIGHUP, and every write fails
    assert terminal.process.wait(20) == 143
    assert not alive(worker)
    assert b"saved at step" in (tmp_path / "metrics.jsonl").read_bytes()
