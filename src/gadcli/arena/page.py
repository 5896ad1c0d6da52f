"""The arena as one HTML file: no script, no link, nothing fetched; readable in light and dark."""

from __future__ import annotations

from html import escape

from gadcli.arena.compare import Arena
from gadcli.arena.report import cells, limits, name_of, sentences, share
from gadcli.arena.result import Table
from gadcli.evaluate.html import COLOURS, STYLE

WIDTH, HEIGHT, LEFT, BOTTOM = 620, 300, 60, 40


def html_page(table: Table) -> str:
    """The whole page."""
    parts = [
        "<h1>Methods compared</h1>",
        f"<p>{table.prompts} test prompts, {len(table.seeds)} seed(s). {limits(table)} Sampling colder raises quality "
        "and lowers variety for any model: an arm is better where its curve lies above another's.</p>",
        _costs(table),
    ]
    for measure, arena in table.measures.items():
        parts += [f"<h2>{escape(measure)}</h2>", "<ul>"]
        parts += [f"<li>{escape(line)}</li>" for line in sentences(measure, table)]
        parts += ["</ul>", _plot(table, arena), _scores(table, arena)]
    parts.append("<h2>Commands</h2>")
    for arm, commands in table.commands.items():
        parts.append(f"<p>{escape(arm)}</p><pre class=text>{escape(chr(10).join(commands))}</pre>")
    head = (
        f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>gad arena</title><style>{STYLE}"
    )
    return f"<!doctype html><html lang=en><head>{head}</style></head><body>{''.join(parts)}</body></html>\n"


def _costs(table: Table) -> str:
    head = "<tr><th>arm</th>" + "".join(f"<th class=n>{c}</th>" for c in ("seconds", "steps", "teacher rows")) + "</tr>"
    rows = "".join(
        f"<tr><td>{escape(name_of(table, row.arm))}</td><td class=n>{row.seconds:.0f}</td>"
        f"<td class=n>{row.steps:.0f}</td><td class=n>{row.teacher_rows:.0f}</td></tr>"
        for row in table.rows
    )
    return f"<table>{head}{rows}</table><p class=note>Beyond the start; with the warmup of a discriminator.</p>"


def _scores(table: Table, arena: Arena) -> str:
    head = "<tr><th>score (variety)</th>" + "".join(f"<th class=n>T {t:g}</th>" for t in table.temperatures) + "</tr>"
    rows = "".join(
        f"<tr><td>{escape(name_of(table, arm))}</td>" + "".join(f"<td class=n>{c}</td>" for c in cells(arena, arm))
        + "</tr>"
        for arm in arena.scores
    )  # fmt: skip
    return f"<table>{head}{rows}</table>"


def _plot(table: Table, arena: Arena) -> str:
    """A curve for each arm through its temperatures; variety to the right, quality upwards."""
    quality = {arm: scores.mean((0, 2)) for arm, scores in arena.scores.items()}
    xs = [float(x) for values in arena.variety.values() for x in values]
    ys = [float(y) for values in quality.values() for y in values]

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + share(x, min(xs), max(xs)) * WIDTH, HEIGHT - BOTTOM - share(y, min(ys), max(ys)) * (HEIGHT - 60)

    parts = []
    for i, (arm, scores) in enumerate(quality.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [place(float(x), float(y)) for x, y in zip(arena.variety[arm], scores, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f"<polyline fill='none' stroke='{colour}' stroke-width='2' points='{line}'/>")
        parts += [
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{colour}'><title>{escape(arm)} at {t:g}</title></circle>"
            for (x, y), t in zip(points, table.temperatures, strict=True)
        ]
        parts.append(f"<rect x='720' y='{16 + 18 * i}' width='12' height='12' fill='{colour}'/>"
                     f"<text x='738' y='{26 + 18 * i}'>{escape(name_of(table, arm))}</text>")  # fmt: skip
    axis = f"<line x1='{LEFT}' y1='{HEIGHT - 30}' x2='{LEFT + WIDTH}' y2='{HEIGHT - 30}' stroke='currentColor'/>"
    ticks = (
        f"<text x='{LEFT}' y='{HEIGHT - 12}'>{min(xs):.2f}</text>"
        f"<text x='{LEFT + WIDTH}' y='{HEIGHT - 12}' text-anchor='end'>variety {max(xs):.2f}</text>"
        f"<text x='0' y='24'>{max(ys):.3f}</text><text x='0' y='{HEIGHT - BOTTOM}'>{min(ys):.3f}</text>"
    )
    return f"<svg viewBox='0 0 960 {HEIGHT}' role='img' aria-label='frontier'>{axis}{ticks}{''.join(parts)}</svg>"
