"""A run as a self-contained HTML page or one SVG picture: plots with their healthy band, verdicts, samples, events."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Sequence

from gadcli.dashboard.draw import MARKS, band_text, buckets, duration, extent
from gadcli.dashboard.view import RunView
from gadcli.dashboard.words import why_lines
from gadcli.metrics.health import group_levels, number
from gadcli.metrics.table import GROUPS, Range, label, metric

PLOT_WIDTH, PLOT_HEIGHT = 300, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 24, 18
POINTS = 600
"""A plot shows at most this many averaged points: more than it has pixels."""

_STYLE = """
:root { color-scheme: light dark; --ink:#1d2430; --dim:#667; --paper:#fff; --card:#f6f7f9;
  --line:#2563a8; --band:#bfe5c6 }
@media (prefers-color-scheme: dark) {
  :root { --ink:#e6e9ef; --dim:#99a; --paper:#14171c; --card:#1e232b; --line:#6fb1ff; --band:#1f4a2b } }
body { font:15px/1.45 system-ui,sans-serif; color:var(--ink); background:var(--paper); margin:2rem auto;
       max-width:1320px; padding:0 1rem }
pre { background:var(--card); padding:1rem; overflow-x:auto; white-space:pre-wrap }
.plots { display:flex; flex-wrap:wrap; gap:12px } .plots svg { background:var(--card) }
.ok { color:#1a8a3a } .warn { color:#b07a00 } .bad { color:#c62828 } .quiet { color:var(--dim) }
table { border-collapse:collapse; width:100%; table-layout:fixed }
td,th { border-top:1px solid #8884; padding:.4rem; text-align:left; vertical-align:top; overflow-wrap:anywhere }
.number { width:5.5rem } footer { color:var(--dim); margin-top:2rem }
"""


def _safe(text: str) -> str:
    """Text for HTML and XML: escaped, and without control characters, which neither may hold."""
    return html.escape("".join(c for c in text if c.isprintable() or c in "\n "))


def plot(name: str, steps: Sequence[int], values: Sequence[float], bounds: Range | None, x: int = 0, y: int = 0) -> str:
    """One metric as an SVG group at (x, y): line, healthy band, extremes, first and last step."""
    shown, at = buckets(values, POINTS), buckets([float(s) for s in steps], POINTS)
    low, high = extent(shown, bounds)
    begin, end = (at[0], at[-1]) if at else (0.0, 1.0)
    width, height = PLOT_WIDTH - _LEFT - _RIGHT, PLOT_HEIGHT - _TOP - _BOTTOM

    def px(step: float) -> float:
        return _LEFT + width * ((step - begin) / (end - begin) if end > begin else 0.5)

    def py(value: float) -> float:
        return _TOP + height * (1 - (value - low) / (high - low))

    parts = [f'<g transform="translate({x},{y})">']
    if bounds is not None:
        top, bottom = py(min(high, max(low, bounds.high))), py(max(low, min(high, bounds.low)))
        if bottom > top:
            parts.append(f'<rect class="band" x="{_LEFT}" y="{top:.1f}" width="{width}" height="{bottom - top:.1f}"/>')
    for piece in _pieces(at, shown):
        points = " ".join(f"{px(s):.1f},{py(v):.1f}" for s, v in piece)
        parts.append(f'<polyline class="line" points="{points}"/>')
        if len(piece) == 1:
            parts.append(f'<circle class="dot" cx="{px(piece[0][0]):.1f}" cy="{py(piece[0][1]):.1f}" r="2"/>')
    texts = [(_LEFT, 15, "start", f"{label(name)}  {number(values[-1]) if values else '–'}", "name"),
             (_LEFT - 4, _TOP + 8, "end", number(high), "axis"), (_LEFT - 4, _TOP + height, "end", number(low), "axis"),
             (_LEFT, PLOT_HEIGHT - 4, "start", f"step {begin:.0f}", "axis"),
             (PLOT_WIDTH - _RIGHT, PLOT_HEIGHT - 4, "end", f"{end:.0f}", "axis"),
             (PLOT_WIDTH - _RIGHT, 15, "end", band_text(bounds), "axis")]  # fmt: skip
    parts += [f'<text class="{css}" x="{tx}" y="{ty}" text-anchor="{anchor}">{_safe(text)}</text>'
              for tx, ty, anchor, text, css in texts]  # fmt: skip
    parts.append(f"<title>{_safe(f'{name}: {metric(name).meaning}')}</title></g>")
    return "".join(parts)


def _pieces(steps: Sequence[float], values: Sequence[float]) -> list[list[tuple[float, float]]]:
    """Stretches of finite values: a line breaks where a value is not finite."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            pieces[-1].append((step, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _svg_style(line: str, band: str, ink: str, dim: str) -> str:
    return (f".line{{fill:none;stroke:{line};stroke-width:1.5}}.dot{{fill:{line}}}.band{{fill:{band};opacity:.6}}"
            f"text{{font:11px system-ui,sans-serif;fill:{dim}}}.name{{font-weight:600;fill:{ink}}}")  # fmt: skip


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
            bounds = metric(name).range_for(view.judge.facts.loss)
            parts.append(plot(name, *view.series(name), bounds, column * PLOT_WIDTH, y + row * PLOT_HEIGHT))
        y += PLOT_HEIGHT * math.ceil(len(names) / columns) + 8
    width = columns * PLOT_WIDTH
    title = _safe(f"{view.log.run.get('exp_name') or view.run_dir.name} · {view.log.run.get('stage', '')}")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}">'
            f"<style>{_svg_style('#2563a8', '#bfe5c6', '#1d2430', '#667')}</style>"
            f'<rect width="100%" height="100%" fill="#fff"/><text class="name" x="8" y="22">{title}</text>'
            f"{''.join(parts)}</svg>\n")  # fmt: skip


def export_html(view: RunView, now: float) -> str:
    """A page that needs nothing but itself: no script, no network; every text of the run is escaped."""
    log, levels = view.log, group_levels(view.judge.verdicts())
    name = _safe(str(log.run.get("exp_name") or view.run_dir.name))
    last = log.history.last
    seconds = view.step_seconds()
    facts = [str(log.run.get("stage", "")), log.state(now).kind, f"step {last.step if last else 0}"]
    facts += [f"{duration(seconds)} a step"] if seconds else []
    sections = []
    for group in GROUPS:
        plots = "".join(
            f'<svg width="{PLOT_WIDTH}" height="{PLOT_HEIGHT}" role="img">'
            f"{plot(n, *view.series(n), metric(n).range_for(view.judge.facts.loss))}</svg>"
            for n in view.metrics_of(group) if view.series(n)[0]
        )  # fmt: skip
        if plots:
            heading = f'<h2 class="{levels[group]}">{MARKS[levels[group]]} {group}</h2>'
            sections.append(f'{heading}<div class="plots">{plots}</div>')
    svg_style = _svg_style("var(--line)", "var(--band)", "var(--ink)", "var(--dim)")
    why = _safe("\n".join(why_lines(view, now)[1:]).strip())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}{svg_style}</style></head><body><h1>{name}</h1><p>{_safe(' · '.join(facts))}</p>"
        f"<h2>Health</h2><pre>{why}</pre>{''.join(sections)}{_samples(view)}{_events(view)}"
        f"<footer>Written by gad on {time.strftime('%Y-%m-%d %H:%M', time.localtime(now))}</footer></body></html>\n"
    )


def _samples(view: RunView) -> str:
    rows = list(view.samples.rows)[-12:][::-1]
    if not rows:
        return ""
    cells = "".join(
        f"<tr><td class=number>{r.step}</td><td>{_safe(r.prompt)}</td><td>{_safe(r.student)}</td>"
        f"<td class=number>{number(r.student_score)}</td><td>{_safe(r.teacher)}</td>"
        f"<td class=number>{number(r.teacher_score)}</td></tr>"
        for r in rows
    )
    head = ("step", "prompt", "student", "score", "teacher", "score")
    titles = "".join(f"<th{' class=number' if h in ('step', 'score') else ''}>{h}</th>" for h in head)
    return f"<h2>Samples</h2><table><tr>{titles}</tr>{cells}</table>"


def _events(view: RunView) -> str:
    rows = "".join(
        f"<tr><td class=number>{e.step}</td><td class={e.level if e.level in ('warn', 'bad') else 'quiet'}>"
        f"{_safe(e.kind)}</td><td>{_safe(e.message)}</td></tr>"
        for e in list(view.log.events)[::-1][:50]
    )
    return f"<h2>Events</h2><table>{rows}</table>" if rows else ""
