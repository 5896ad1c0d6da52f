"""What the diagnoses ask of a run's history: recent medians, the beginning, and since when something holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gadcli.metrics.health import WINDOW, fewest_of, median, number
from gadcli.metrics.history import History

FEWEST = 6
"""Values of a metric needed before it is evidence."""


@dataclass(frozen=True)
class Evidence:
    """One metric that speaks for a diagnosis: its value now, and since which step it has been so."""

    metric: str
    value: float
    since: int
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.metric} {number(self.value)} since step {self.since}{note}"


class Signals:
    """Recent medians and beginnings of a run's metrics; NaN where a run does not measure one."""

    def __init__(self, history: History, evals: Sequence[tuple[int, Mapping[str, float]]] = ()) -> None:
        self.history = history
        self._evals = evals
        self._series: dict[str, tuple[list[int], list[float]]] = {}
        self._now: dict[str, float] = {}

    def now(self, name: str) -> float:
        """Median of the last WINDOW finite values; NaN if there are too few."""
        if name not in self._now:
            held_out = name.startswith("val/")
            recent = self.series(name)[1][-WINDOW:] if held_out else self.history.tail(name, WINDOW)[1]
            values = [v for v in recent if math.isfinite(v)]
            self._now[name] = median(values) if len(values) >= fewest_of(name, FEWEST) else math.nan
        return self._now[name]

    def has(self, name: str) -> bool:
        return not math.isnan(self.now(name))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        if name not in self._series:
            found = [(step, metrics[name]) for step, metrics in self._evals if name in metrics]
            self._series[name] = ([s for s, _ in found], [v for _, v in found]) if found else self.history.series(name)
        return self._series[name]

    def start(self, name: str) -> float:
        """Median of the first five finite values."""
        values = []
        for record in self.history:
            value = record.metrics.get(name)
            if value is not None and math.isfinite(value):
                values.append(value)
                if len(values) == 5:
                    break
        return median(values)

    def since(self, name: str, holds: Callable[[float], bool]) -> int:
        """First step of the last stretch in which `holds` is true of nearly every value (one odd one is passed)."""
        steps, values = self.series(name)
        first, misses = (steps[-1] if steps else 0), 0
        for step, value in zip(reversed(steps), reversed(values), strict=True):
            if holds(value):
                first, misses = step, 0
            else:
                misses += 1
                if misses == 2:
                    break
        return first

    def evidence(self, name: str, holds: Callable[[float], bool], note: str = "") -> Evidence | None:
        """The metric's value now, and since when `holds` has been true of it; None where it does not speak for it."""
        now = self.now(name)
        return None if math.isnan(now) or not holds(now) else Evidence(name, now, self.since(name, holds), note)


def known(items: Iterable[Evidence | None]) -> tuple[Evidence, ...]:
    """The evidence that exists."""
    return tuple(item for item in items if item is not None)
