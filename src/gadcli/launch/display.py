"""What the parent shows of a run: the live dashboard in a terminal, else one plain line per step, JSON on request."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from gadcli.metrics.runlog import METRICS_FILE, RunLog, read_status

STOP_WAIT_S = 3.0
LEAVE_ALTERNATE_SCREEN = "\x1b[?1049l"


def say(stream: TextIO, text: str) -> bool:
    """Write a line; false when nobody can read it any more (closed pipe, terminal gone)."""
    try:
        stream.write(text + "\n")
        stream.flush()
    except OSError:
        silence(stream)
        return False
    return True


def silence(stream: TextIO) -> None:
    """Point a stream at nothing, so that neither later writes nor the flush at exit fail."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, stream.fileno())
    os.close(sink)


class RecordTail:
    """The records that are added to metrics.jsonl from now on, as raw lines."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS_FILE
        self._offset = self._path.stat().st_size if self._path.exists() else 0
        self._torn = b""

    def lines(self) -> list[str]:
        """Whole lines since the last call. A file that has shrunk was begun anew."""
        try:
            with self._path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._offset:
                    self._offset, self._torn = 0, b""
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *whole, self._torn = (self._torn + data).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole if line.strip()]


class Display:
    """Says what the parent has to say, on stderr; the base shows no records at all (--quiet)."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def start(self) -> None:
        """Begin drawing."""

    def tick(self) -> None:
        """Draw what is new; called about ten times a second."""

    def notice(self, text: str) -> None:
        """Something the user should know, now."""
        say(sys.stderr, f"gad: {text}")

    def inform(self, text: str) -> None:
        """Good to know; a display that shows no records leaves it out, unless it is a warning."""
        if text.startswith("warning"):
            self.notice(text)

    def mute(self) -> None:
        """The terminal is gone: never write to it again."""
        for stream in (sys.stdout, sys.stderr):
            silence(stream)

    def stop(self) -> None:
        """Show what is left and end drawing. May be called without `start`."""


class JsonDisplay(Display):
    """--json: the records themselves, a line each, on stdout."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self._tail = RecordTail(run_dir)

    def inform(self, text: str) -> None:
        self.notice(text)

    def tick(self) -> None:
        for line in self._tail.lines():
            say(sys.stdout, line)

    def stop(self) -> None:
        self.tick()


class PlainDisplay(Display):
    """Not a terminal: one line per step, no escape codes."""

    def __init__(self, run_dir: Path, total: int | None = None) -> None:
        super().__init__(run_dir)
        self._tail = RecordTail(run_dir)
        self._phase = ""
        self._began = time.time()
        self._stepped = False
        self._total = total

    def inform(self, text: str) -> None:
        self.notice(text)

    def tick(self) -> None:
        for line in self._tail.lines():
            record = read_record(line)
            self._stepped = self._stepped or record.get("type") == "step"
            self._total = record.get("total_steps", self._total)
            if text := plain_record(record, self._total):
                say(sys.stdout, text)
        self._show_start()

    def _show_start(self) -> None:
        """Until the first step, what the workers are busy with: loading takes a while."""
        status = None if self._stepped else read_status(self.run_dir)
        if status is not None and status.time < self._began:
            return  # an earlier launch's
        if status is not None and status.state in ("starting", "running") and status.phase != self._phase:
            self._phase = status.phase
            self.notice(status.phase)

    def stop(self) -> None:
        self.tick()


class LiveDisplay(Display):
    """The dashboard, in a thread of its own, so that a slow terminal cannot hold up signals."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._plain: PlainDisplay | None = None
        self._held: list[str] = []
        self._muted = False
        self._link = ""

    def inform(self, text: str) -> None:
        if text.startswith("TensorBoard http"):
            self._link = text.split()[1]  # the line scrolls away behind the picture; its address stays in the footer
        self.notice(text)

    def start(self) -> None:
        from gadcli.dashboard import live

        self._thread = threading.Thread(
            target=live, args=(self.run_dir, self._over.is_set), name="dashboard", daemon=True,
            kwargs={"notice": self._latest_notice, "link": self._link},
        )  # fmt: skip
        self._thread.start()

    def _total(self) -> int | None:
        """Steps planned, from the header that the picture has read before."""
        log = RunLog(self.run_dir)
        log.poll()
        total = log.run.get("total_steps")
        return total if isinstance(total, int) else None

    def _latest_notice(self) -> str:
        return self._held[-1] if self._held else ""

    def tick(self) -> None:
        if self._plain is None and self._thread is not None and not self._thread.is_alive() and not self._muted:
            self._plain = PlainDisplay(self.run_dir, self._total())  # the user closed the picture; the run goes on
            self.notice("the dashboard is closed, the run goes on (gad monitor shows it again)")
        if self._plain is not None:
            self._plain.tick()

    def notice(self, text: str) -> None:
        if self._thread is not None and self._thread.is_alive() and not self._over.is_set():
            self._held.append(text)  # the picture shows the last; all of them follow when it is gone
        else:
            super().notice(text)

    def mute(self) -> None:
        self._muted = True
        self._over.set()
        super().mute()

    def stop(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(STOP_WAIT_S)
            if self._thread.is_alive() and not self._muted:
                say(sys.stdout, LEAVE_ALTERNATE_SCREEN)
        if self._plain is not None:
            self._plain.stop()
        for text in self._held:
            super().notice(text)
        self._held.clear()


def read_record(line: str) -> dict[str, Any]:
    """A line of metrics.jsonl; {} for one that a kill has torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def plain_record(record: dict[str, Any], total_steps: int | None) -> str:
    """One record as one line; empty for those that need none."""
    from gadcli.dashboard import plain_line

    kind = record.get("type")
    if kind == "step":
        return plain_line(record, total_steps)
    if kind == "eval":
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items() if value is not None)
        return f"step {record['step']}  eval  {numbers}"
    if kind == "event" and record.get("kind") != "eval":  # the eval record says it with its numbers
        level = "" if record.get("level") == "info" else f"{record.get('level')}: "
        return f"step {record.get('step')}  {record.get('kind')}  {level}{record.get('message')}"
    return ""


def make_display(run_dir: Path, *, as_json: bool, quiet: bool) -> Display:
    """The display that fits: JSON, nothing, the dashboard on a terminal, else plain lines."""
    if as_json:
        return JsonDisplay(run_dir)
    if quiet:
        return Display(run_dir)
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveDisplay(run_dir)
    return PlainDisplay(run_dir)
