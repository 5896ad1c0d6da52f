"""The arena as one HTML file: no script, no link, nothing fetched; readable in light and dark."""

from __future__ import annotations

from typing import Any

from gadcli.arena.compare import Arena
from gadcli.arena.report import cells, limits, name_of, sentences, share
from gadcli.arena.result import Table
from gadcli.dashboard.page import page
from gadcli.evaluate.html import COLOURS

WIDTH, HEIGHT, LEFT, BOTTOM = 620, 300, 60, 40


def html_page(table: Table) -> str:
    """The whole page."""
    return page(
        "arena.html", title="Methods compared", table=table, limits=limits(table), name_of=name_of, cells=cells,
        sentences=sentences, plot_of=lambda arena: _plot(table, arena), width=WIDTH, height=HEIGHT, left=LEFT,
        bottom=BOTTOM,
    )  # fmt: skip


def _plot(table: Table, arena: Arena) -> dict[str, Any]:
    """The ranges of both axes, and for each arm its colour and its (x, y, temperature) in pixels: a curve through its
    temperatures; variety to the right, quality upwards."""
    quality = {arm: scores.mean((0, 2)) for arm, scores in arena.scores.items()}
    xs = [float(x) for values in arena.variety.values() for x in values]
    ys = [float(y) for values in quality.values() for y in values]

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + share(x, min(xs), max(xs)) * WIDTH, HEIGHT - BOTTOM - share(y, min(ys), max(ys)) * (HEIGHT - 60)

    curves = []
    for i, (arm, scores) in enumerate(quality.items()):
        points = [(*place(float(x), float(y)), t)
                  for x, y, t in zip(arena.variety[arm], scores, table.temperatures, strict=True)]  # fmt: skip
        curves.append((arm, COLOURS[i % len(COLOURS)], points))
    return {"x": (min(xs), max(xs)), "y": (min(ys), max(ys)), "curves": curves}
