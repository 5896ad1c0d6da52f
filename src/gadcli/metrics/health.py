"""Health verdicts of a run's metrics: levels with hysteresis, trends over windows, silence where normal.

A metric is judged by the median of its last WINDOW values, and only where that median is clearly beyond a bound
given the values' own scatter: a single odd step says nothing, and small batches are noisy by nature.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from gadcli.metrics.cures import cure_for
from gadcli.metrics.facts import RunFacts
from gadcli.metrics.table import GROUPS, METRICS, Group, Metric, Range

Level = Literal["quiet", "ok", "warn", "bad"]
_RANK: dict[Level, int] = {"quiet": 0, "ok": 1, "warn": 2, "bad": 3}

WINDOW = 15
FEWEST = 8
"""Values needed before anything is said."""
SURE = 3.0
"""Standard errors by which a median must pass an edge: a long run looks at its edges hundreds of times."""
GRACE_STEPS = 10
LEARNING_GRACE_STEPS = 30
"""A fresh critic needs steps before 'too weak' means anything."""

_NEEDS_LEARNING = {("critic/d_acc", "low"), ("critic/score_diff", "low"), ("critic/ranking_loss", "high")}
# While a student learns by SFT nobody plays against it: that it still rambles is what the stage is there to cure.
_NOT_IN_SFT = {"actor/grad_norm", "response_length/mean", "response_length/clip_ratio", "val/length_auc"}
_MUST_BE_FINITE = ("critic/d_loss", "critic/grad_norm", "critic/student_value_mean", "critic/teacher_value_mean",
                   "actor/sft_loss", "actor/pg_loss", "actor/grad_norm", "actor/kl_loss")  # fmt: skip
_LENGTH, _TEACHER_LENGTH = "response_length/mean", "teacher_length/mean"


@dataclass(frozen=True)
class Verdict:
    """How one metric does. `value` is its windowed median, `since` the step at which `level` began."""

    metric: str
    group: Group
    level: Level
    value: float
    since: int
    text: str = ""
    side: Literal["", "low", "high"] = ""

    @property
    def unhealthy(self) -> bool:
        return self.level in ("warn", "bad")


@dataclass(frozen=True)
class Alarm:
    """Something that changed for the worse (warn, bad) or back (info) at `step`; `name` is a metric or diagnosis."""

    step: int
    name: str
    level: Literal["info", "warn", "bad"]
    message: str
    cure: str = ""


def fewest_of(name: str, otherwise: int = FEWEST) -> int:
    """Values a metric needs before it is judged: evals are rare, and each is a mean over many rows."""
    return 3 if name.startswith("val/") else otherwise


class Window:
    """The last WINDOW values of one metric with their steps, its first median, and its verdict."""

    def __init__(self, row: Metric) -> None:
        self.row = row
        self.values: deque[float] = deque(maxlen=WINDOW)
        self.seen = 0
        self.first_step = 0
        self.baseline = math.nan
        self.verdict = Verdict(row.name, row.group, "quiet", math.nan, 0, "no data yet")

    def add(self, step: int, value: float) -> None:
        if not self.seen:
            self.first_step = step
        self.seen += 1
        self.values.append(value)
        if self.seen == fewest_of(self.row.name):
            self.baseline = median(self.values)

    def summary(self) -> tuple[float, float]:
        """(median, its standard error from the median absolute deviation)."""
        middle = median(self.values)
        spread = 1.4826 * median([abs(v - middle) for v in self.values])
        # 1.25 = sqrt(pi / 2): the median's standard error over the mean's, for a normal distribution.
        return middle, 1.25 * spread / math.sqrt(len(self.values))


class HealthTracker:
    """Judges step records as they come. Deterministic: replaying a log gives the verdicts the run gave."""

    def __init__(self, facts: RunFacts) -> None:
        self.facts = facts
        self.first_step: int | None = None
        self.windows: dict[str, Window] = {}

    def update(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take one step's metrics; the alarms are the verdicts that changed."""
        if self.first_step is None:
            self.first_step = step
        alarms = []
        for name, value in metrics.items():
            if name not in METRICS:
                continue
            window = self.windows.get(name)
            if window is None:
                window = self.windows[name] = Window(METRICS[name])
            before = window.verdict
            window.verdict = self._judge(window, step, value, metrics)
            if (alarm := _change(before, window.verdict, step, window.row, self.facts)) is not None:
                alarms.append(alarm)
        return alarms

    def verdicts(self) -> list[Verdict]:
        """Every metric seen so far, in the table's order."""
        return [self.windows[name].verdict for name in METRICS if name in self.windows]

    def _judge(self, window: Window, step: int, value: float, metrics: Mapping[str, float]) -> Verdict:
        old = window.verdict
        if not math.isfinite(value):
            if window.row.name not in _MUST_BE_FINITE:
                return old
            return _move(old, "bad", value, step, "is not finite", "high")
        window.add(step, value)
        if window.seen < fewest_of(window.row.name):
            return replace(old, value=value, text="first steps")
        if window.row.name == _LENGTH and not self._quiet_in_sft(_LENGTH):
            return self._judge_length(window, step, metrics)
        bounds = window.row.range_for(self.facts.loss)
        if bounds is None or self._quiet_in_sft(window.row.name):
            return _move(old, "ok", value, step, "")
        # Most steps of most runs end here: no median is needed while everything lies inside.
        if not old.unhealthy and bounds.low <= value <= bounds.high:
            inside = sum(bounds.warn_low <= v <= bounds.warn_high for v in window.values)
            if 2 * inside > len(window.values):
                return _move(old, "ok", value, step, "")
        return self._judge_level(window, step, bounds)

    def _quiet_in_sft(self, name: str) -> bool:
        return self.facts.sft and name in _NOT_IN_SFT and "critic/d_acc" not in self.windows

    def _judge_level(self, window: Window, step: int, bounds: Range) -> Verdict:
        middle, error = window.summary()
        margin = SURE * error
        old, name = window.verdict, window.row.name
        side: Literal["low", "high"] = "high" if middle > bounds.high else "low"
        level: Level = "ok"
        if middle - margin > bounds.bad_high or middle + margin < bounds.bad_low:
            level = "bad"
        elif middle - margin > bounds.warn_high or middle + margin < bounds.warn_low:
            level = "warn"
        # Hysteresis: once raised, only the healthy band itself lowers a verdict.
        if level == "ok" and old.unhealthy and old.side == side and not bounds.low <= middle <= bounds.high:
            level = "warn"
        first = self.first_step or 0
        grace = LEARNING_GRACE_STEPS if (name, side) in _NEEDS_LEARNING else GRACE_STEPS
        if level != "ok" and not old.unhealthy and step - first < grace:
            level = "ok"
        if level == "ok":
            running = _running_off(window, middle, bounds)
            return _move(old, "warn" if running else "ok", middle, step, running, "high" if running else "")
        means = (window.row.high_means if side == "high" else window.row.low_means) or f"is too {side}"
        return _move(old, level, middle, step, means, side)

    def _judge_length(self, window: Window, step: int, metrics: Mapping[str, float]) -> Verdict:
        """Response length against the teacher's, and against the run's own beginning (a collapse)."""
        middle = median(window.values)
        teacher_window = self.windows.get(_TEACHER_LENGTH)
        teacher = metrics.get(_TEACHER_LENGTH, median(teacher_window.values) if teacher_window else math.nan)
        known = math.isfinite(teacher) and teacher >= 1
        old = window.verdict
        if step - (self.first_step or 0) < GRACE_STEPS:
            return _move(old, "ok", middle, step, "")
        wanted = teacher if known else window.baseline
        if wanted >= 8 and (middle <= 2 or middle < 0.1 * wanted) and middle < 0.5 * window.baseline:
            return _move(old, "bad", middle, step, f"collapsed: {window.baseline:.3g} → {middle:.3g} tokens", "low")
        if known and teacher >= 8 and middle < 0.25 * teacher:
            return _move(old, "warn", middle, step, f"far below the teacher's {teacher:.3g} tokens", "low")
        if known and middle > 3 * max(teacher, 4) and not _falling(window):
            return _move(old, "warn", middle, step, f"far above the teacher's {teacher:.3g} tokens", "high")
        if old.unhealthy and known and not 0.5 * teacher <= middle <= 2 * teacher:
            return replace(old, value=middle, level="warn")
        return _move(old, "ok", middle, step, "")


def _falling(window: Window) -> bool:
    """The window's newer half lies below its older half: what is on its way down needs no cure."""
    values = list(window.values)
    half = len(values) // 2
    return median(values[half:]) < 0.97 * median(values[:half])


def _running_off(window: Window, middle: float, bounds: Range) -> str:
    """A trend: fivefold since the beginning, beyond the healthy band, and still rising within the window."""
    if window.row.name not in ("critic/score_diff", "critic/raw_score_diff", "actor/kl_loss"):
        return ""
    values = list(window.values)
    half = len(values) // 2
    rising = median(values[half:]) > 1.05 * median(values[:half])
    if rising and middle > bounds.high and middle > 5 * max(window.baseline, 1e-9) and window.seen > 2 * FEWEST:
        return f"is running off: {window.baseline:.3g} → {middle:.3g}"
    return ""


def _move(
    old: Verdict, level: Level, value: float, step: int, text: str, side: Literal["", "low", "high"] = ""
) -> Verdict:
    if old.level == level and old.side == side:
        since = old.since
        if old.value == value and old.text == text:
            return old
    else:
        since = step
    return Verdict(old.metric, old.group, level, value, since, text, side)


def _change(before: Verdict, after: Verdict, step: int, row: Metric, facts: RunFacts) -> Alarm | None:
    if after.unhealthy and _RANK[after.level] > _RANK[before.level]:
        level: Literal["warn", "bad"] = "bad" if after.level == "bad" else "warn"
        return Alarm(step, row.name, level, f"{row.name} {number(after.value)}: {after.text}",
                     cure_for(row, after.side, facts))  # fmt: skip
    if before.unhealthy and after.level == "ok":
        return Alarm(step, row.name, "info", f"{row.name} is healthy again at {number(after.value)}")
    return None


def group_levels(verdicts: list[Verdict]) -> dict[Group, Level]:
    """The worst level of each group; quiet where nothing was measured."""
    levels: dict[Group, Level] = dict.fromkeys(GROUPS, "quiet")
    for verdict in verdicts:
        if _RANK[verdict.level] > _RANK[levels[verdict.group]]:
            levels[verdict.group] = verdict.level
    return levels


def median(values: deque[float] | list[float]) -> float:
    """The middle of the sorted values (mean of two for an even count); NaN for none."""
    ordered = sorted(values)
    half = len(ordered) // 2
    if not ordered:
        return math.nan
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


def number(value: float | None) -> str:
    """A number for people, in at most eight characters: 0.6213, 117, 3.6e-07, 1.2M."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e9:
        return f"{value:.1e}"
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e6 if unit == 'M' else 1e3):.1f}{unit}"
    return f"{value:.4g}" if size >= 1 else f"{value:.4f}".rstrip("0")
