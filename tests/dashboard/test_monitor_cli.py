"""`gad monitor|why|samples|compare` as a user runs them, on a real pseudo-terminal too."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len

from gadcli.metrics.record import MetricsWriter, write_status
from metrics.generated import SYMPTOMS, healthy, write

GAD = [sys.executable, "-m", "gadcli.cli.app"]
ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "COLUMNS": "100"}


def gad(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GAD, *words], capture_output=True, text=True, cwd=cwd, env=ENV, timeout=60, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    write(place / "runs" / "good", healthy(1))
    write(place / "runs" / "lost", SYMPTOMS["runaway_gap"](1))
    return place


def test_why_names_the_collapse_and_its_cure_and_json_says_the_same(place: Path) -> None:
    told = gad("why", "lost", cwd=place)
    assert told.returncode == 0 and "runaway_gap" in told.stdout and "critic.loss=final" in told.stdout
    found = json.loads(gad("why", "runs/lost", "--json", cwd=place).stdout)
    assert found["diagnoses"][0]["name"] == "runaway_gap"


def test_an_unknown_run_is_exit_2_with_the_nearest_name(place: Path) -> None:
    told = gad("why", "god", cwd=place)
    assert told.returncode == 2 and "good" in told.stderr and told.stdout == ""


def test_the_folder_of_a_row_of_stages_means_the_stage_written_last(tmp_path: Path) -> None:
    for age, stage in ((60, "seqkd"), (0, "warmup")):
        writer = MetricsWriter(tmp_path / "runs" / "row" / stage, append=False)
        writer.run(stage=stage, total_steps=1, start_step=0)
        writer.step(1, 0, {"actor/grad_norm": 1.0})
        writer.end(0, "done")
        then = time.time() - age
        os.utime(tmp_path / "runs" / "row" / stage / "metrics.jsonl", (then, then))
    (tmp_path / "runs" / "row" / "run.json").write_text("{}")
    told = gad("monitor", "row", "--once", cwd=tmp_path)
    assert told.returncode == 0 and "warmup" in told.stdout.splitlines()[0]


def test_why_says_that_a_run_has_died_and_how_it_goes_on(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run", append=False)
    writer.run(stage="gad", total_steps=9, start_step=0)
    writer.step(1, 0, {"critic/d_acc": 0.6})
    writer.end(7, "rank 0 was killed by SIGKILL")
    told = gad("why", "run", cwd=tmp_path).stdout
    assert "rank 0 was killed by SIGKILL" in told and "--resume" in told
    MetricsWriter(tmp_path / "run", append=True).end(5, "step 18: raw scores drift apart (health.on_bad=stop; saved)")
    told = gad("why", "run", cwd=tmp_path).stdout
    assert "raw scores drift apart" in told and "--resume" not in told, "a collapsed run would collapse again"


def test_once_prints_one_picture_without_escape_codes(place: Path) -> None:
    told = gad("monitor", "good", "--once", cwd=place)
    assert told.returncode == 0 and "step 200/200" in told.stdout and "\x1b" not in told.stdout


def test_twenty_columns_are_enough_for_monitor(place: Path) -> None:
    narrow = {**ENV, "COLUMNS": "20", "LINES": "12"}
    told = subprocess.run(
        [*GAD, "monitor", "lost", "--once"], capture_output=True, text=True, cwd=place, env=narrow, check=False
    )
    assert told.returncode == 0, told.stderr
    assert max(cell_len(line) for line in told.stdout.splitlines()) <= 20
    assert "141/141" in told.stdout and "the score gap" in told.stdout and "try critic.loss" in told.stdout


@pytest.mark.parametrize("content", [None, b"", b"torn", b"\xff\x00\n[]\n"])
def test_missing_empty_and_torn_logs_get_a_picture_and_exit_0(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "metrics.jsonl").write_bytes(content)
    for words in (["monitor"], ["why"]):
        told = gad(words[0], "run", *words[1:], cwd=tmp_path)
        assert told.returncode == 0 and told.stdout, told.stderr


def test_a_pipe_gets_a_line_a_step_until_the_run_ends(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run", append=False)
    writer.run(stage="gad", total_steps=3, start_step=0)
    write_status(tmp_path / "run", state="running", stage="gad", step=1, phase="actor")
    writer.step(1, 0, {"critic/d_acc": 0.6})
    follower = subprocess.Popen([*GAD, "monitor", "run"], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=ENV)
    assert follower.stdout is not None
    assert follower.stdout.readline() == "step 1/3  d_acc 0.6\n"
    writer.step(2, 0, {"critic/d_acc": 0.7})
    assert follower.stdout.readline() == "step 2/3  d_acc 0.7\n"
    writer.end(0, "done")
    assert follower.wait(20) == 0


def test_exports_land_as_files_and_other_endings_are_refused(place: Path) -> None:
    assert gad("monitor", "good", "--export", "report.html", cwd=place).returncode == 0
    assert (place / "report.html").read_text().startswith("<!doctype html>")
    assert gad("monitor", "good", "--export", "report.pdf", cwd=place).returncode == 2
    assert not list(place.glob(".report*"))


def test_samples_sort_by_the_students_score(place: Path) -> None:
    rows = json.loads(gad("samples", "good", "--sort", "student", "--limit", "3", "--json", cwd=place).stdout)
    # generated scores are 0, -0.1, -0.2 at every eval: the three best are all 0
    assert [row["student_score"] for row in rows] == [0.0, 0.0, 0.0]
    assert gad("samples", "good", "--step", "51", cwd=place).returncode == 2


def test_compare_shows_what_differs(place: Path) -> None:
    found = json.loads(gad("compare", "good", "lost", "--json", cwd=place).stdout)
    assert found["config"]["critic_loss"] == ["final", "v1"]
    assert "response_length/mean" in found["metrics"] and "critic/lr" not in found["metrics"]
    assert gad("compare", "good", cwd=place).returncode == 2
    assert found["unhealthy"][0] == [] and found["unhealthy"][1][0] == "runaway_gap"
    told = gad("compare", "good", "lost", cwd=place).stdout
    assert "runaway_gap" in told and "nothing" in told and "141" in told


def test_a_closed_pipe_ends_it_quietly(place: Path) -> None:
    command = f"{' '.join(GAD)} why lost | head -1 >/dev/null"
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=place, env=ENV, check=False)
    assert told.stderr == ""


class Terminal:
    """A child on a pseudo-terminal of its own."""

    def __init__(self, words: list[str], cwd: Path, columns: int = 100, rows: int = 30) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(sys.executable, [*GAD, *words], {**ENV, "TERM": "xterm-256color"} | {"COLUMNS": "", "LINES": ""})
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(self.fd)
        self.seen = b""

    def read_until(self, words: bytes, seconds: float = 30) -> bool:
        end = time.monotonic() + seconds
        while words not in self.seen and time.monotonic() < end:
            if select.select([self.fd], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.fd, 1 << 16)
        return words in self.seen

    def finish(self) -> int:
        if not self.read_until(b"\x1b[?1049l"):
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize(
    ("ending", "code"), [("q", 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 0)]
)
def test_the_terminal_is_restored_however_the_picture_ends(
    place: Path, ending: str | signal.Signals, code: int
) -> None:
    terminal = Terminal(["monitor", "lost"], place)
    assert terminal.read_until(b"score_diff"), terminal.seen[-500:]
    if isinstance(ending, str):
        os.write(terminal.fd, ending.encode())
    else:
        os.kill(terminal.pid, ending)
    assert terminal.read_until(b"\x1b[?1049l"), "the alternate screen was left"
    assert b"\x1b[?25h" in terminal.seen, "the cursor is back"
    assert terminal.finish() == code
    assert termios.tcgetattr(terminal.fd)[3] == terminal.before[3], "echo and line mode are back"
    os.close(terminal.fd)


@pytest.mark.skipif(not shutil.which("tmux"), reason="NO TMUX: resizing was not looked at (apt-get install tmux)")
def test_after_a_resize_the_screen_is_what_a_fresh_picture_of_that_size_shows(place: Path) -> None:
    tmux = ["tmux", "-L", f"gad-test-{os.getpid()}", "-f", os.devnull]

    def do(*words: str) -> str:
        return subprocess.run([*tmux, *words], capture_output=True, text=True, check=True, timeout=30).stdout

    def until(holds: Callable[[str], bool]) -> str:
        end = time.monotonic() + 30
        while not holds(seen := do("capture-pane", "-p", "-t", "s")):
            assert time.monotonic() < end, seen
            time.sleep(0.3)
        return seen

    def steady(words: str) -> str:
        until(lambda seen: words in seen)
        time.sleep(1.0)  # several frames' time
        return do("capture-pane", "-p", "-t", "s")

    def begin(columns: int, rows: int) -> None:
        # COLUMNS is what the shell began with, and wrong after a resize
        command = f"cd {place} && COLUMNS=80 LINES=24 PYTHONPATH={ENV['PYTHONPATH']} {' '.join(GAD)} monitor lost"
        do("new-session", "-d", "-s", "s", "-x", str(columns), "-y", str(rows), command)

    try:
        begin(60, 20)
        fresh = steady("score_diff")
        do("kill-session", "-t", "s")
        begin(160, 40)
        steady("best-scored")
        do("resize-window", "-t", "s", "-x", "60", "-y", "20")
        until(lambda seen: seen == fresh)
    finally:
        subprocess.run([*tmux, "kill-server"], capture_output=True, check=False)


def test_frames_come_at_four_hertz_at_most_even_under_held_keys(place: Path) -> None:
    terminal = Terminal(["monitor", "lost"], place)
    assert terminal.read_until(b"score_diff")
    begin, terminal.seen = time.monotonic(), b""
    while time.monotonic() - begin < 2.0:
        os.write(terminal.fd, b"g")
        terminal.read_until(b"never", 0.02)
    frames = terminal.seen.count(b"\x1b[H")
    spent = time.monotonic() - begin
    os.write(terminal.fd, b"q")
    assert terminal.finish() == 0
    os.close(terminal.fd)
    assert 1 <= frames <= 4 * spent + 1
