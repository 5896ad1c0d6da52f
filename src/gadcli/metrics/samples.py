"""Reads samples.jsonl: its newest rows as it grows, or all of them as a stream."""

from __future__ import annotations

import heapq
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadcli.metrics.runlog import SAMPLES_FILE

TAIL_BYTES = 512 << 10


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: what the student and the teacher answered to a prompt, and the discriminator's raw scores."""

    step: int
    kind: str
    prompt: str
    student: str
    teacher: str
    student_score: float | None
    teacher_score: float | None

    @property
    def gap(self) -> float | None:
        """Teacher's score - student's score."""
        if self.student_score is None or self.teacher_score is None:
            return None
        return self.teacher_score - self.student_score


def parse(line: bytes) -> Sample | None:
    """A line of samples.jsonl, or None for a torn or foreign one."""
    try:
        raw = json.loads(line)
        kind, prompt, student, teacher = (_text(raw.get(key)) for key in ("kind", "prompt", "student", "teacher"))
        return Sample(
            int(raw["step"]),
            kind,
            prompt,
            student,
            teacher,
            _score(raw.get("student_score")),
            _score(raw.get("teacher_score")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _score(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _text(value: Any) -> str:
    """Text as it is; chat messages as `role: content` lines."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in value if isinstance(m, dict))
    return "" if value is None else str(value)


def iter_samples(run_dir: Path) -> Iterator[Sample]:
    """Every readable row in file order, one line in memory at a time; nothing where there is no file."""
    try:
        with (run_dir / SAMPLES_FILE).open("rb") as file:
            for line in file:
                sample = parse(line)
                if sample is not None:
                    yield sample
    except (FileNotFoundError, NotADirectoryError):
        return


def highest_scored(run_dir: Path, count: int) -> list[Sample]:
    """The student answers that the discriminator scored best, one a text, best first; [] where none is scored."""
    best: dict[str, Sample] = {}
    for row in iter_samples(run_dir):
        if row.student_score is None or not math.isfinite(row.student_score):
            continue
        old = best.get(row.student)
        if old is None or row.student_score > (old.student_score or 0.0):
            best[row.student] = row
        if len(best) > 64 * count:
            best = {row.student: row for row in _largest(best, count)}
    return _largest(best, count)


def _largest(rows: Mapping[str, Sample], count: int) -> list[Sample]:
    return heapq.nlargest(count, rows.values(), key=lambda row: row.student_score or 0.0)


def drop_after(run_dir: Path, step: int) -> int:
    """Take rows of steps above `step` out of samples.jsonl: a resume writes them again. Returns the last such step
    of an evaluation (0 for none). The file is replaced whole, so a kill leaves the old one or the new one."""
    path, last = run_dir / SAMPLES_FILE, 0
    if not path.exists() or all(row.step <= step for row in iter_samples(run_dir)):
        return last
    temporary = path.with_name(f".{SAMPLES_FILE}.{os.getpid()}")
    try:
        with path.open("rb") as old, temporary.open("wb") as new:
            for line in old:
                row = parse(line)
                if row is not None and row.step <= step:
                    new.write(line)
                elif row is not None and row.kind != "train":
                    last = max(last, row.step)
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return last


class SampleTail:
    """The newest samples of a run, at most `keep`; polls read only what is new."""

    def __init__(self, run_dir: Path, keep: int = 64) -> None:
        self.path = run_dir / SAMPLES_FILE
        self.rows: deque[Sample] = deque(maxlen=keep)
        self._offset = 0
        self._identity: tuple[int, int] | None = None

    def poll(self) -> bool:
        """Read what is new; true if anything was."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                size, identity = stat.st_size, (stat.st_dev, stat.st_ino)
                if size < self._offset or self._identity not in (None, identity):
                    self._offset = 0  # a resume has replaced it
                    self.rows.clear()
                self._identity = identity
                begin = max(self._offset, size - TAIL_BYTES)
                file.seek(begin)
                lines = file.read(size - begin).split(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return False
        if begin > self._offset:
            lines = lines[1:]
        self._offset = size - len(lines[-1]) if lines else size
        found = [sample for line in lines[:-1] if (sample := parse(line)) is not None]
        self.rows.extend(found)
        return bool(found)
