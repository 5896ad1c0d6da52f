"""A run's metrics as SVG: one plot each, with the healthy band and where it became unhealthy; or all in one picture."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from gadcli.dashboard.draw import MARKS, band_text, buckets, extent
from gadcli.dashboard.page import printable
from gadcli.dashboard.view import RunView
from gadcli.metrics.health import Level, group_levels, number
from gadcli.metrics.table import GROUPS, Range, label, metric

PLOT_WIDTH, PLOT_HEIGHT = 300, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 24, 18
POINTS = 600
"""A plot shows at most this many averaged points: more than it has pixels."""


def safe(text: str) -> str:
    """Text for HTML and XML: escaped, and without control characters, which neither may hold."""
    return html.escape(printable(text))


def plot_of(view: RunView, name: str, x: int = 0, y: int = 0) -> str:
    """The plot of one of the run's metrics, marked where its verdict says that it became unhealthy."""
    verdict = view.verdicts().get(name)
    level: Level = verdict.level if verdict is not None else "quiet"
    since = verdict.since if verdict is not None and verdict.unhealthy else None
    return plot(name, *view.series(name), metric(name).range_for(view.judge.facts.loss), x, y, level, since)


def plot(
    name: str, steps: Sequence[int], values: Sequence[float], bounds: Range | None, x: int = 0, y: int = 0,
    level: Level = "quiet", since: int | None = None,
) -> str:  # fmt: skip
    """One metric as an SVG group at (x, y): line, healthy band, range, first and last step, a mark at step `since`."""
    shown, at = buckets(values, POINTS), buckets([float(s) for s in steps], POINTS)
    low, high = extent(shown, bounds)
    begin, end = (at[0], at[-1]) if at else (0.0, 1.0)
    width, height = PLOT_WIDTH - _LEFT - _RIGHT, PLOT_HEIGHT - _TOP - _BOTTOM

    def px(step: float) -> float:
        return _LEFT + width * ((step - begin) / (end - begin) if end > begin else 0.5)

    def py(value: float) -> float:
        return _TOP + height * (1 - (min(high, max(low, value)) - low) / (high - low))

    trouble = f" {level}" if level in ("warn", "bad") else ""
    parts = [f'<g transform="translate({x},{y})" class="plot{trouble}">']
    finite = [v for v in values if math.isfinite(v)]
    extremes = f"; {number(min(finite))} to {number(max(finite))}" if finite else ""
    parts.append(f"<title>{safe(f'{name}: {metric(name).meaning}{extremes}')}</title>")
    parts.append(f'<rect class="frame" x="0.5" y="0.5" width="{PLOT_WIDTH - 1}" height="{PLOT_HEIGHT - 1}"/>')
    if bounds is not None:
        top, bottom = py(min(high, max(low, bounds.high))), py(max(low, min(high, bounds.low)))
        if bottom > top:
            parts.append(f'<rect class="band" x="{_LEFT}" y="{top:.1f}" width="{width}" height="{bottom - top:.1f}"/>')
    if since is not None and begin <= since <= end:
        parts.append(f'<path class="since" d="M{px(since):.1f} {_TOP}V{_TOP + height}"/>')
    for piece in _pieces(at, shown):
        points = " ".join(f"{px(s):.1f},{py(v):.1f}" for s, v in piece)
        parts.append(f'<polyline class="line" points="{points}"/>')
        if len(piece) == 1:
            parts.append(f'<circle class="dot" cx="{px(piece[0][0]):.1f}" cy="{py(piece[0][1]):.1f}" r="2"/>')
    said = f"{MARKS[level]} {label(name)}" if trouble else label(name)
    texts = [(_LEFT, 15, "start", f"{said}  {number(values[-1]) if values else '–'}", "name"),
             (_LEFT - 4, _TOP + 8, "end", number(high), "axis"), (_LEFT - 4, _TOP + height, "end", number(low), "axis"),
             (_LEFT, PLOT_HEIGHT - 4, "start", f"step {begin:.0f}", "axis"),
             (PLOT_WIDTH - _RIGHT, PLOT_HEIGHT - 4, "end", f"{end:.0f}", "axis"),
             (PLOT_WIDTH - _RIGHT, 15, "end", band_text(bounds), "axis")]  # fmt: skip
    parts += [f'<text class="{css}" x="{tx}" y="{ty}" text-anchor="{anchor}">{safe(text)}</text>'
              for tx, ty, anchor, text, css in texts]  # fmt: skip
    return "".join(parts) + "</g>"


def _pieces(steps: Sequence[float], values: Sequence[float]) -> list[list[tuple[float, float]]]:
    """Stretches of finite values: a line breaks where a value is not finite."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            pieces[-1].append((step, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def svg_style(line: str, band: str, ink: str, dim: str, edge: str = "none") -> str:
    """The style sheet of a plot."""
    return (f".line{{fill:none;stroke:{line};stroke-width:1.5}}.dot{{fill:{line}}}.band{{fill:{band};opacity:.6}}"
            f".frame{{fill:none;stroke:{edge}}}.warn .frame{{stroke:#c98a00}}.bad .frame{{stroke:#c62828}}"
            ".warn .line{stroke:#b07a00}.bad .line{stroke:#c62828}"
            f".since{{stroke:{dim};stroke-dasharray:3 3;fill:none}}"
            f"svg text{{font:11px system-ui,sans-serif;fill:{dim}}}svg .name{{font-weight:600;fill:{ink}}}"
            "svg .warn .name{fill:#b07a00}svg .bad .name{fill:#c62828}")  # fmt: skip


def export_svg(view: RunView, columns: int = 4) -> str:
    """All of the run's plots in one picture, a group after the other."""
    parts: list[str] = []
    y = 34
    levels = group_levels(view.judge.verdicts())
    for group in GROUPS:
        names = [n for n in view.metrics_of(group) if view.series(n)[0]]
        if not names:
            continue
        parts.append(f'<text class="name" x="8" y="{y + 14}">{MARKS[levels[group]]} {group}</text>')
        y += 22
        for i, name in enumerate(names):
            column, row = i % columns, i // columns
            parts.append(plot_of(view, name, column * PLOT_WIDTH, y + row * PLOT_HEIGHT))
        y += PLOT_HEIGHT * math.ceil(len(names) / columns) + 8
    width = columns * PLOT_WIDTH
    title = safe(f"{view.log.run.get('exp_name') or view.run_dir.name} · {view.log.run.get('stage', '')}")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}">'
            f"<style>{svg_style('#2563a8', '#bfe5c6', '#1d2430', '#667')}</style>"
            f'<rect width="100%" height="100%" fill="#fff"/><text class="name" x="8" y="22">{title}</text>'
            f"{''.join(parts)}</svg>\n")  # fmt: skip
