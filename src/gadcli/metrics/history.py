"""Step records of a run in bounded memory: the last ones exactly, the older ones thinned evenly."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One training step as written to metrics.jsonl. `time` is seconds since the epoch (0 when unknown)."""

    step: int
    time: float
    epoch: float
    metrics: dict[str, float]


class History:
    """Step records in rising step order, at most about `recent + overview` of them.

    The last `recent` records are exact. Older ones are kept at a stride that doubles whenever `overview` fills
    up, so that a run of any length costs the same memory and its beginning never disappears.
    """

    def __init__(self, recent: int = 512, overview: int = 1536) -> None:
        if recent < 1 or overview < 2:
            raise ValueError(f"recent={recent} and overview={overview} must be at least 1 and 2")
        self._recent_size, self._overview_size = recent, overview
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._old: list[StepRecord] = []
        self._recent: list[StepRecord] = []
        self._stride = 1
        self._moved = 0
        self.revision = 0

    def __len__(self) -> int:
        return len(self._old) + len(self._recent)

    def __iter__(self) -> Iterator[StepRecord]:
        yield from self._old
        yield from self._recent

    @property
    def first(self) -> StepRecord | None:
        return next(iter(self), None)

    @property
    def last(self) -> StepRecord | None:
        return self._recent[-1] if self._recent else (self._old[-1] if self._old else None)

    def append(self, record: StepRecord) -> None:
        """Add a record; those of the same or a later step were overtaken by a resume and go."""
        last = self.last
        if last is not None and record.step <= last.step:
            self.drop_after(record.step - 1)
        self._recent.append(record)
        # Moving in blocks keeps append amortised O(1).
        if len(self._recent) >= 2 * self._recent_size:
            moved = self._recent[: self._recent_size]
            del self._recent[: self._recent_size]
            for old in moved:
                self._age(old)

    def _age(self, record: StepRecord) -> None:
        if self._moved % self._stride == 0:
            self._old.append(record)
        self._moved += 1
        if len(self._old) > self._overview_size:
            self._old = self._old[::2]
            self._stride *= 2

    def drop_after(self, step: int) -> None:
        """Drop every record of a step above `step` (what a resume at `step` does)."""
        before = len(self)
        for records in (self._old, self._recent):
            del records[bisect.bisect_right(records, step, key=lambda r: r.step) :]
        if len(self) != before:
            self.revision += 1

    def after(self, step: int) -> list[StepRecord]:
        """The kept records of steps above `step`."""
        if not self._recent or self._recent[0].step > step + 1:
            return [r for r in self if r.step > step]
        return self._recent[bisect.bisect_right(self._recent, step, key=lambda r: r.step) :]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric over all kept records that carry it."""
        steps, values = [], []
        for record in self:
            value = record.metrics.get(name)
            if value is not None:
                steps.append(record.step)
                values.append(value)
        return steps, values

    def tail(self, name: str, count: int) -> tuple[list[int], list[float]]:
        """(steps, values) of the last `count` records that carry the metric, in rising step order.

        Looks back over the exact records only, so the cost does not grow with the run.
        """
        steps: list[int] = []
        values: list[float] = []
        records = self._recent if len(self._recent) >= count else self._old[-count:] + self._recent
        for record in reversed(records):
            value = record.metrics.get(name)
            if value is not None:
                steps.append(record.step)
                values.append(value)
                if len(values) == count:
                    break
        return steps[::-1], values[::-1]

    def names(self) -> set[str]:
        """Every metric name that a kept record carries."""
        return set().union(*(r.metrics.keys() for r in self)) if len(self) else set()
