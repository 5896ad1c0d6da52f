"""TensorBoard beside a run: the next free port, loopback, ended by its own pid, and never a reason to stop.

A broken installation is played by a package of that name that ends at once; the real one answers over HTTP.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import urllib.request
from pathlib import Path

import pytest

from gadcli.config.schema import GadConfig
from gadcli.launch.environment import LOOPBACK, free_port
from gadcli.launch.tensorboard import TensorBoard, next_free_port, wanted
from launch.processes import Start, alive, wait_until


def board_in(tmp_path: Path, port: int, keep: bool = False) -> TensorBoard:
    return TensorBoard(tmp_path / "tb", tmp_path / "tb.log", port=port, keep=keep)


def broken_package(tmp_path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package named tensorboard that comes before the real one, whose main does `body`."""
    (tmp_path / "fake" / "tensorboard").mkdir(parents=True)
    (tmp_path / "fake" / "tensorboard" / "__init__.py").write_text("")
    (tmp_path / "fake" / "tensorboard" / "main.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))


def test_a_busy_port_gives_the_next_free_one() -> None:
    first = free_port()
    with socket.socket() as busy:
        busy.bind((LOOPBACK, first))
        busy.listen()
        taken = next_free_port(LOOPBACK, first)
    assert taken is not None and taken > first
    assert next_free_port(LOOPBACK, first) == first


@pytest.mark.slow
def test_the_real_one_answers_on_loopback_says_where_and_ends_by_its_pid(tmp_path: Path) -> None:
    port = free_port()
    with socket.socket() as busy:
        busy.bind((LOOPBACK, port))
        busy.listen()
        board = board_in(tmp_path, port)
        line = board.start({})
    assert board.process is not None and board.port is not None and board.port > port
    url = f"http://127.0.0.1:{board.port}/"
    assert url in line and f"pid {board.process.pid}" in line
    assert f"ssh -N -L {board.port}:127.0.0.1:{board.port} " in line

    def answers() -> bool:
        try:
            return urllib.request.urlopen(url, timeout=2).status == 200
        except OSError:
            return False

    try:
        assert wait_until(answers, 40), board.output.read_text()
    finally:
        board.stop()
    assert not alive(board.process.pid)
    assert board.trouble() == ""  # an end that we brought about is none


def test_one_that_dies_is_a_warning_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_package(tmp_path, "import sys; sys.exit(3)", monkeypatch)
    board = board_in(tmp_path, free_port())
    board.start({})
    assert wait_until(lambda: board.process is not None and board.process.poll() is not None)
    said = board.trouble()
    assert "warning" in said and "code 3" in said and str(tmp_path / "tb.log") in said
    assert board.trouble() == ""


def test_a_missing_one_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # type: ignore[arg-type]  what python holds for "not there"
    board = board_in(tmp_path, free_port())
    assert "not installed" in board.start({})
    assert board.process is None and board.trouble() == ""
    board.stop()


def test_kept_ones_live_on_and_others_end_with_the_run(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid_board"
    broken_package(tmp_path, f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(300)",
                   monkeypatch)  # fmt: skip
    for mode, lives in (("end", False), ("keep", True)):
        pid_file.unlink(missing_ok=True)
        parent = start("steps=15 sleep=0.1", more=(mode, str(free_port())))
        pid = parent.pid_of("pid_board")
        code, _, err = parent.end()
        assert code == 0 and f"(pid {pid}" in err
        assert alive(pid) == lives
        assert ("stays after the run" in err) == lives
    os.kill(pid, signal.SIGKILL)


def test_one_that_dies_with_a_killed_parent(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid_board"
    broken_package(tmp_path, f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(300)",
                   monkeypatch)  # fmt: skip
    parent = start("steps=1000 sleep=0.1", more=("end", str(free_port())))
    pid = parent.pid_of("pid_board")
    parent.process.kill()
    assert wait_until(lambda: not alive(pid), 10)


def test_it_starts_with_the_gad_stage_unless_told_otherwise() -> None:
    config = GadConfig(stage="gad")
    assert wanted(config)
    assert not wanted(GadConfig(stage="seqkd"))
    config.trainer.logger = ["console"]  # nothing writes event files
    assert not wanted(config)
    config = GadConfig(stage="seqkd")
    config.trainer.tensorboard.auto_start = "always"
    assert wanted(config)
