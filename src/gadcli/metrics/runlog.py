"""Reads a run's folder as it grows: incremental, in bounded memory, whatever state the files are in."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gadcli.metrics.history import History, StepRecord

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
STATUS_FILE = "status.json"
PLAN_FILE = "plan.json"

BLOCK_BYTES = 1 << 20
LONGEST_LINE = 8 << 20
FULL_READ_BYTES = 12 << 20
"""Longest backlog that is parsed whole; beyond it the middle is sampled (1 ms parses about 40 KB)."""
CHUNKS, CHUNK_BYTES = 900, 8192
HEAD_BYTES, TAIL_BYTES = 128 << 10, 768 << 10
SILENT_AFTER_S = 600.0
STARTING_S = 600.0
"""For so long after its plan was written a run may have nothing to say: imports, and models being fetched."""


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """Held-out metrics after `step` steps."""

    step: int
    time: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at `step`; level is info, warn or bad."""

    step: int
    time: float
    kind: str
    level: str
    message: str


@dataclass(frozen=True, slots=True)
class Status:
    """status.json: the training process and the phase it is in."""

    pid: int
    host: str
    state: str
    stage: str
    step: int
    phase: str
    time: float


@dataclass(frozen=True, slots=True)
class RunState:
    """What a run is doing: kind is missing, empty, starting, running, done, failed, stopped,
    dead, silent (on another host, nothing new) or unknown (no status.json)."""

    kind: str
    text: str

    @property
    def ended(self) -> bool:
        return self.kind in ("done", "failed", "stopped", "dead")


class RunLog:
    """The records of one run. `poll()` reads what was written since the last one.

    Torn last lines wait for their end, unreadable ones are counted in `bad_lines`, a rotated or replaced file is
    followed, and steps that a resume repeats replace the earlier ones. Memory does not grow with the run: see
    History. A long file is sampled (its head, its tail and evenly spaced places), then followed at its end.
    """

    def __init__(self, run_dir: Path, *, full_read_bytes: int = FULL_READ_BYTES) -> None:
        self.run_dir = run_dir
        self.path = run_dir / METRICS_FILE
        self._full_read_bytes = full_read_bytes
        self._identity: tuple[int, int] | None = None
        self._first_line = b""
        self._offset = 0
        self.history = History()
        self.exists = False
        self._forget()

    def _forget(self) -> None:
        self._offset = 0
        self.history.clear()
        self.runs: deque[dict[str, Any]] = deque(maxlen=64)
        self.evals: deque[EvalRecord] = deque(maxlen=1024)
        self.events: deque[Event] = deque(maxlen=256)
        self.end: dict[str, Any] | None = None
        self.bad_lines = 0
        self.sampled = False
        self.generation = getattr(self, "generation", 0) + 1

    @property
    def run(self) -> dict[str, Any]:
        """The newest start's header ({} before any)."""
        return self.runs[-1] if self.runs else {}

    @property
    def loss(self) -> str | None:
        """The discriminator's loss, where the header names one."""
        name = self.run.get("critic_loss")
        return name if isinstance(name, str) and name else None

    def poll(self) -> bool:
        """Read what is new; true if anything was. Never raises for what the files hold."""
        try:
            with self.path.open("rb") as file:
                return self._read(file)
        except (FileNotFoundError, NotADirectoryError):
            self.exists = False
            return False

    def _read(self, file: BinaryIO) -> bool:
        self.exists = True
        stat = os.fstat(file.fileno())
        identity = (stat.st_dev, stat.st_ino)
        if self._identity not in (None, identity) or stat.st_size < self._offset:
            self._follow_replacement(file)
        self._identity = identity
        if not self._first_line:
            line = file.readline(LONGEST_LINE)
            self._first_line = line if line.endswith(b"\n") else b""
            file.seek(0)
        if stat.st_size - self._offset > self._full_read_bytes:
            self._sample(file, stat.st_size)
            return True
        return self._read_lines(file, stat.st_size)

    def _follow_replacement(self, file: BinaryIO) -> None:
        """A copy of the same log (rsync, truncate and copy) is read again; a rotated one continues in the new file."""
        line = file.readline(LONGEST_LINE)
        if line == self._first_line or not line.endswith(b"\n"):
            self._forget()
        self._offset, self._first_line = 0, b""
        file.seek(0)

    def _read_lines(self, file: BinaryIO, size: int) -> bool:
        before = self._offset
        file.seek(before)
        while self._offset < size:
            line = file.readline(LONGEST_LINE)
            if line.endswith(b"\n"):
                self._take(line)
            elif len(line) < LONGEST_LINE:
                break  # a torn last line: its end may still come
            else:
                self.bad_lines += 1
            self._offset += len(line)
        return self._offset != before

    def _sample(self, file: BinaryIO, size: int) -> None:
        """Read the head, evenly spaced places, every run header, and the tail of a long backlog."""
        self.sampled = True
        begin = self._offset
        middle_begin = min(begin + HEAD_BYTES, size)
        middle_end = max(middle_begin, size - TAIL_BYTES)
        self._take_span(file, begin, middle_begin, whole=True)
        headers = find_headers(file, middle_begin, middle_end)
        places = [middle_begin + (middle_end - middle_begin) * i // CHUNKS for i in range(CHUNKS)]
        for offset in sorted({*places, *headers}):
            if offset in headers:
                file.seek(offset)
                self._take(file.readline(LONGEST_LINE).rstrip(b"\n"))
            else:
                self._take_place(file, offset)
        self._take_span(file, middle_end, size, whole=False)
        file.seek(max(begin, size - LONGEST_LINE))
        rest = file.read(min(LONGEST_LINE, size - begin))
        self._offset = size - (len(rest) - rest.rfind(b"\n") - 1)

    def _take_span(self, file: BinaryIO, begin: int, end: int, *, whole: bool) -> None:
        """Take the complete lines of a span; `whole` says that it begins at a line's start."""
        file.seek(begin)
        for line in file.read(end - begin).split(b"\n")[0 if whole else 1 : -1]:
            self._take(line)

    def _take_place(self, file: BinaryIO, offset: int) -> None:
        """One step record from around `offset`, and whatever else stands there that is rarer than steps."""
        file.seek(offset)
        stepped = False
        for line in file.read(CHUNK_BYTES).split(b"\n")[1:-1]:
            is_step = b'"step"' in line[:16]
            if not (is_step and stepped):
                self._take(line)
            stepped = stepped or is_step

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            self.bad_lines += 1
            return
        if not isinstance(record, dict) or not self._take_record(record):
            self.bad_lines += 1

    def _take_record(self, record: dict[str, Any]) -> bool:
        kind, when = record.get("type"), as_float(record.get("time")) or 0.0
        if kind == "run":
            if self.runs and record == self.runs[-1]:
                return True  # a sampled file may show one header twice
            start = record.get("start_step")
            if isinstance(start, int) and not isinstance(start, bool):
                self.history.drop_after(start)
                self.evals = deque((e for e in self.evals if e.step <= start), maxlen=self.evals.maxlen)
            self.runs.append(record)
            self.end = None
            return True
        step = record.get("step")
        if kind == "end":
            self.end = record
            return True
        if not isinstance(step, int) or isinstance(step, bool):
            return False
        if kind == "event":
            texts = (str(record.get(key, "")) for key in ("kind", "level", "message"))
            self.events.append(Event(step, when, *texts))
            return True
        metrics = record.get("metrics")
        if kind not in ("step", "eval") or not isinstance(metrics, dict):
            return False
        values = {sys.intern(name): value for name, raw in metrics.items() if (value := as_float(raw)) is not None}
        if kind == "eval":
            self.evals.append(EvalRecord(step, when, values))
        else:
            self.history.append(StepRecord(step, when, as_float(record.get("epoch")) or 0.0, values))
        return True

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, from step records or, where those lack it, from evals."""
        steps, values = self.history.series(name)
        if not steps:
            found = [(e.step, e.metrics[name]) for e in self.evals if name in e.metrics]
            return [s for s, _ in found], [v for _, v in found]
        return steps, values

    def latest(self, name: str) -> float | None:
        """The newest value of a metric, if it was written lately."""
        values = self.history.tail(name, 1)[1]
        if values:
            return values[-1]
        return next((e.metrics[name] for e in reversed(self.evals) if name in e.metrics), None)

    def state(self, now: float) -> RunState:
        """Whether the run is alive, ended or died, from its records and status.json (`now`: epoch seconds)."""
        status = read_status(self.run_dir)
        # A resume, too, leaves its earlier end behind. By the files' own times: in a copied folder all are new.
        if now - self.begun < STARTING_S and self.begun > max(map(self._written, (METRICS_FILE, STATUS_FILE))):
            return RunState("starting", "its workers are starting")
        if self.end is not None:
            code = self.end.get("code")
            message = str(self.end.get("message") or "")
            kind = {0: "done", 130: "stopped", 143: "stopped"}.get(code if isinstance(code, int) else -1, "failed")
            return RunState(kind, message or f"exit {code}")
        if status is None:
            if not self.exists:
                return RunState("missing", f"no {METRICS_FILE} here yet")
            return RunState(
                "unknown" if len(self.history) else "empty", "no status.json: cannot tell whether it is alive"
            )
        if status.state in ("done", "failed", "stopped"):
            return RunState(status.state, f"at step {status.step}")
        if status.host == socket.gethostname():
            if not process_lives(status.pid, status.time):
                return RunState("dead", f"process {status.pid} is gone; it was in {status.phase} of step {status.step}")
        elif now - max(status.time, self.last_time) > SILENT_AFTER_S:
            age = now - max(status.time, self.last_time)
            return RunState("silent", f"on {status.host}, nothing written for {age / 60:.0f} min")
        return RunState(status.state, f"{status.phase}, pid {status.pid} on {status.host}")

    @property
    def begun(self) -> float:
        """When this launch wrote its plan, which is the first thing it does (epoch seconds, 0 without one)."""
        return self._written(PLAN_FILE)

    def _written(self, name: str) -> float:
        try:
            return (self.run_dir / name).stat().st_mtime
        except OSError:
            return 0.0

    @property
    def last_time(self) -> float:
        """When the last step was written (epoch seconds, 0 before any)."""
        last = self.history.last
        return last.time if last is not None else 0.0


def as_float(value: Any) -> float | None:
    """A number as float, null as NaN (how non-finite values are written), anything else as None."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def find_headers(file: BinaryIO, begin: int, end: int) -> set[int]:
    """Offsets of the lines of type "run" in [begin, end), found without parsing the lines between."""
    found: set[int] = set()
    file.seek(0)
    # A log is written by one program, so its first line tells how all are spaced.
    needle = b'{"type": "run"' if file.read(9).endswith(b" ") else b'{"type":"run"'
    overlap = len(needle)
    position = begin
    while position < end:
        file.seek(position)
        block = file.read(min(4 * BLOCK_BYTES, end - position) + overlap)
        at = block.find(needle)
        while at >= 0:
            found.add(position + at)
            at = block.find(needle, at + 1)
        position += 4 * BLOCK_BYTES
    return {at for at in found if at < end}


def read_status(run_dir: Path) -> Status | None:
    """status.json, or None where there is none that can be read."""
    try:
        raw = json.loads((run_dir / STATUS_FILE).read_bytes())
        return Status(int(raw["pid"]), str(raw["host"]), str(raw["state"]), str(raw.get("stage", "")),
                      int(raw.get("step", 0)), str(raw.get("phase", "")), float(raw.get("time", 0.0)))  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def process_lives(pid: int, known_at: float) -> bool:
    """Whether `pid` runs on this machine and already did at `known_at` (epoch seconds): pids are reused."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    except (OSError, IndexError, StopIteration):
        return True  # no /proc here: the signal's word is all we have
    if fields[0] in "ZX":
        return False
    started = int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return started <= known_at + 2.0
