"""What a run writes for those who watch it: metrics.jsonl, samples.jsonl and status.json (no torch here)."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gadcli.errors import ResourceError, is_full_disk
from gadcli.metrics.runlog import METRICS_FILE, SAMPLES_FILE, STATUS_FILE, RunLog, Status, read_status

__all__ = ["METRICS_FILE", "SAMPLES_FILE", "STATUS_FILE", "MetricsWriter", "RunLog", "Status", "read_status",
           "write_status"]  # fmt: skip


class LineFile:
    """An append-only file of JSON lines; each line is one write, so a kill can tear only the last one."""

    def __init__(self, path: Path, append: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (0 if append else os.O_TRUNC)
        self._fd = os.open(path, flags, 0o644)
        # A line torn by a kill must not swallow the first one we write.
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            self._write(b"\n")

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one record; non-finite numbers become null, which is the only spelling strict JSON has."""
        text = json.dumps(_finite(record), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        # A lone surrogate (half a character decoded from tokens) has no UTF-8 form.
        self._write(text.encode("utf-8", errors="replace") + b"\n")

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            if is_full_disk(error):
                raise ResourceError(
                    f"{self.path}: no space left for the run's records",
                    "free space on this disk, then continue with --resume",
                ) from error
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class MetricsWriter:
    """Writes metrics.jsonl and samples.jsonl of one run, one flushed line per record. Rank 0 only.

    `append=True` appends to existing files (resume); False truncates both.
    Raises OSError where the folder cannot be written, ResourceError where the disk is full.
    """

    def __init__(self, run_dir: Path, append: bool) -> None:
        self._run_dir = run_dir
        self._append = append
        self._lines = LineFile(run_dir / METRICS_FILE, append)
        self._samples: LineFile | None = None
        self._step = 0

    def run(self, **info: Any) -> None:
        """The header of a start: stage, exp_name, total_steps, start_step, critic_loss, ppo_epochs, …"""
        self._step = int(info.get("start_step", 0))
        self._lines.add({"type": "run", "time": time.time(), **info})

    def step(self, step: int, epoch: float, metrics: Mapping[str, Any]) -> None:
        """One training step's metrics (numbers, or anything `float()` takes)."""
        self._step = step
        base = {"type": "step", "time": time.time(), "step": step, "epoch": epoch}
        self._lines.add({**base, "metrics": _floats(metrics)})

    def eval(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Held-out metrics, names under `val/`."""
        self._lines.add({"type": "eval", "time": time.time(), "step": step, "metrics": _floats(metrics)})

    def event(self, kind: str, message: str, level: str = "info", step: int | None = None, **more: Any) -> None:
        """Something that happened: a save, an alarm, a sync; `step` defaults to the last one written."""
        at = self._step if step is None else step
        base = {"type": "event", "time": time.time(), "step": at, "kind": kind, "level": level, "message": message}
        self._lines.add({**base, **more})

    def samples(self, step: int, kind: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows of prompt, student, teacher, student_score, teacher_score for samples.jsonl; kind is val or train."""
        if self._samples is None:
            self._samples = LineFile(self._run_dir / SAMPLES_FILE, self._append)
        for row in rows:
            self._samples.add({"step": step, "kind": kind, **row})

    def end(self, code: int, message: str) -> None:
        """How the run ended: its exit code and one line."""
        self._lines.add({"type": "end", "time": time.time(), "step": self._step, "code": code, "message": message})

    def close(self) -> None:
        """Close the files; writing afterwards is an error."""
        self._lines.close()
        if self._samples is not None:
            self._samples.close()


def write_status(run_dir: Path, *, state: str, stage: str, step: int, phase: str) -> None:
    """Replace status.json atomically: who trains here, and in which phase of which step it is."""
    status = {"pid": os.getpid(), "host": socket.gethostname(), "state": state, "stage": stage, "step": step,
              "phase": phase, "time": time.time()}  # fmt: skip
    temporary = run_dir / f".{STATUS_FILE}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(status))
        os.replace(temporary, run_dir / STATUS_FILE)
    finally:
        temporary.unlink(missing_ok=True)


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
