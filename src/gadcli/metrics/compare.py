"""What differs between runs: configuration keys, and metrics whose recent values lie apart beyond their scatter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gadcli.config.tree import flatten
from gadcli.metrics.health import WINDOW, median
from gadcli.metrics.runlog import RunLog
from gadcli.metrics.table import METRICS


@dataclass(frozen=True)
class MetricRow:
    """Medians of one metric over each run's last steps (NaN where a run lacks it), and whether they differ."""

    name: str
    values: tuple[float, ...]
    differs: bool


def settings(header: Mapping[str, Any]) -> dict[str, Any]:
    """A log header without what differs between any two runs."""
    return {
        key: value for key, value in header.items() if key not in ("type", "time", "exp_name", "start_step", "resumed")
    }


def config_differences(configs: list[Mapping[str, Any] | None]) -> list[tuple[str, tuple[Any, ...]]]:
    """Keys whose values are not the same in every run; `None` for a run without that key or without a config."""
    flat = [flatten(config or {}) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, tuple(one.get(key) for one in flat)) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def compare_metrics(logs: list[RunLog]) -> list[MetricRow]:
    """Every metric that any run has, in the table's order; timings and learning rates included."""
    names = {name for log in logs for name in log.history.names()}
    names |= {name for log in logs for record in log.evals for name in record.metrics}
    order = {name: i for i, name in enumerate(METRICS)}
    rows = []
    for name in sorted(names, key=lambda n: (order.get(n, len(order)), n)):
        summaries = [_recent(log, name) for log in logs]
        values = tuple(middle for middle, _ in summaries)
        rows.append(MetricRow(name, values, _apart(summaries)))
    return rows


def _recent(log: RunLog, name: str) -> tuple[float, float]:
    """(median, standard error) of the last WINDOW finite values."""
    values = [v for v in log.series(name)[1][-WINDOW:] if math.isfinite(v)]
    middle = median(values)
    spread = 1.4826 * median([abs(v - middle) for v in values])
    return middle, 1.25 * spread / math.sqrt(max(1, len(values)))


def _apart(summaries: list[tuple[float, float]]) -> bool:
    """Some two runs lie apart by more than three joint standard errors and a hundredth of their size."""
    if any(math.isnan(middle) for middle, _ in summaries):
        return not all(math.isnan(middle) for middle, _ in summaries)
    low, high = min(summaries), max(summaries)
    return high[0] - low[0] > max(3 * math.hypot(low[1], high[1]), 0.01 * max(abs(low[0]), abs(high[0])))
