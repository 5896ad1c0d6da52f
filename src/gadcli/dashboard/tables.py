"""Tables for `gad samples` and `gad compare`: readable at any width, plain where there is no terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gadcli.dashboard.draw import clean
from gadcli.metrics.compare import MetricRow
from gadcli.metrics.health import number
from gadcli.metrics.samples import Sample


def samples_table(rows: Sequence[Sample]) -> RenderableType:
    """A block a sample: prompt, then student and teacher beside their scores."""
    blocks: list[RenderableType] = []
    for row in rows:
        gap = f"  gap {number(row.gap)}" if row.gap is not None else ""
        blocks.append(Text(f"step {row.step} · {clean(row.kind)}{gap}", style="bold"))
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(width=7, no_wrap=True)
        table.add_column(width=8, justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(Text("prompt", style="dim"), "", Text(clean(row.prompt)))
        table.add_row(Text("student", style="cyan"), _score(row.student_score), Text(clean(row.student)))
        table.add_row(Text("teacher", style="green"), _score(row.teacher_score), Text(clean(row.teacher)))
        blocks += [table, Text()]
    return Group(*blocks)


def compare_tables(
    names: Sequence[str],
    runs: Sequence[tuple[str, Sequence[str]]],
    config: Sequence[tuple[str, tuple[Any, ...]]],
    metrics: Sequence[MetricRow],
) -> list[RenderableType]:
    """How far each run came and what ails it, then the keys and the metrics that differ; a column a run."""
    result: list[RenderableType] = []
    for title, rows in (
        ("runs", [(key, [clean(v) for v in values]) for key, values in runs]),
        ("configuration", [(key, [("–" if v is None else clean(str(v))) for v in values]) for key, values in config]),
        ("metrics, median of the last steps", [(m.name, [_number(v) for v in m.values]) for m in metrics]),
    ):
        if not rows:
            result.append(Text(f"{title}: no difference"))
            continue
        table = Table(box=box.SIMPLE, title=title, title_justify="left", title_style="bold", pad_edge=False)
        table.add_column("", overflow="fold")
        for name in names:
            table.add_column(Text(clean(name)), justify="right", overflow="fold")
        for key, values in rows:
            table.add_row(Text(key), *(Text(value) for value in values))
        result.append(table)
    return result


def _number(value: float) -> str:
    return "–" if math.isnan(value) else number(value)


def _score(value: float | None) -> Text:
    return Text("" if value is None else number(value))
