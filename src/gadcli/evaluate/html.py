"""The evaluation report as one HTML file: no script, no link, nothing fetched; readable in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gadcli.evaluate.answers import AnswerSet
from gadcli.evaluate.report import MEANINGS, ModelReport, Report, judge_lines, short_names
from gadcli.evaluate.text import rouge_l

SHOWN_SAMPLES = 24
BINS = 24
COLOURS = ("#2f6f9f", "#b5651d", "#4b8b3b", "#8a4f9e", "#9a3b3b", "#5c6b73")
TEACHER_COLOUR = "#8a8a8a"
STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .6rem; vertical-align: top;
border-bottom: 1px solid #8884; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
small, .note { opacity: .7; } .text { white-space: pre-wrap; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; font: 11px system-ui, sans-serif; }
"""


def html_report(report: Report, answers: Sequence[AnswerSet]) -> str:
    """The whole page. `answers` are the sets that `report.models` describes, in the same order."""
    names = short_names([model.model for model in report.models])
    labels = [f"{names[model.model]} at {model.temperature:g}" for model in report.models]
    parts = [
        "<h1>Evaluation on held-out rows</h1>",
        f"<p>{escape(', '.join(report.files))}: {report.models[0].prompts} prompts. "
        "Intervals are 95 % bootstrap intervals over prompts.</p>",
        _metrics_table(report.models, labels),
        *_differences(report),
        *(
            ["<h2>Judge</h2>", *(f"<p>{escape(line)}</p>" for line in judge_lines(report.judge))]
            if report.judge
            else []
        ),
        "<h2>Lengths</h2>",
        "<p class=note>Tokens of an answer. Where the students' curve stands apart from the teacher's, a "
        "discriminator can win by counting.</p>",
        _length_plot(labels, answers),
        "<h2>Samples</h2>",
        f"<p class=note>Up to {SHOWN_SAMPLES} prompts, from the lowest to the highest ROUGE-L of the first model.</p>",
        _sample_table(labels, answers),
    ]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>gad eval</title><style>{STYLE}"
    return f"<!doctype html><html lang=en><head>{head}</style></head><body>{''.join(parts)}</body></html>\n"


def _metrics_table(models: Sequence[ModelReport], labels: Sequence[str]) -> str:
    head = "".join(f"<th class=n>{escape(label)}</th>" for label in labels)
    rows = []
    for name in dict.fromkeys(name for model in models for name in model.metrics):
        cells = "".join(f"<td class=n>{_value(model, name)}</td>" for model in models)
        meaning = f"<br><small>{escape(MEANINGS[name])}</small>" if name in MEANINGS else ""
        rows.append(f"<tr><td>{escape(name)}{meaning}</td>{cells}</tr>")
    return f"<table><tr><th>metric</th>{head}</tr>{''.join(rows)}</table>"


def _value(model: ModelReport, name: str) -> str:
    if name not in model.metrics:
        return "–"
    interval = model.intervals.get(name)
    spread = f"<br><small>{interval[0]:.3f} – {interval[1]:.3f}</small>" if interval else ""
    return f"{model.metrics[name]:.3f}{spread}"


def _differences(report: Report) -> list[str]:
    if not report.differences:
        return []
    rows = [
        f"<tr><td>{escape(d.metric)} at {d.temperature:g}</td><td class=n>{d.difference:+.3f}</td>"
        f"<td class=n>{d.low:+.3f} – {d.high:+.3f}</td></tr>"
        for d in report.differences
    ]
    head = "<tr><th>metric</th><th class=n>first minus second</th><th class=n>95 % interval</th></tr>"
    return ["<h2>Difference, prompt by prompt</h2>", f"<table>{head}{''.join(rows)}</table>"]


def _length_plot(labels: Sequence[str], answers: Sequence[AnswerSet]) -> str:
    """Step curves: share of answers in each length bin, the teacher's in grey."""
    series = [("teacher", TEACHER_COLOUR, [sample.teacher_length for sample in answers[0].samples])]
    for i, (label, found) in enumerate(zip(labels, answers, strict=True)):
        series.append((label, COLOURS[i % len(COLOURS)], [sample.student_length for sample in found.samples]))
    longest = max(max(lengths) for _, _, lengths in series)
    width = max(1, -(-longest // BINS))
    shares = [
        [sum(length // width == b for length in lengths) / len(lengths) for b in range(longest // width + 1)]
        for _, _, lengths in series
    ]
    top = max(max(share) for share in shares)
    parts = []
    for i, ((label, colour, _), share) in enumerate(zip(series, shares, strict=True)):
        step = 640 / len(share)
        points = [
            f"{40 + x:.1f},{180 - 160 * s / top:.1f}" for b, s in enumerate(share) for x in (b * step, (b + 1) * step)
        ]
        parts.append(f"<polyline fill='none' stroke='{colour}' stroke-width='2' points='{' '.join(points)}'/>")
        parts.append(f"<rect x='700' y='{16 + 18 * i}' width='12' height='12' fill='{colour}'/>"
                     f"<text x='718' y='{26 + 18 * i}'>{escape(label)}</text>")  # fmt: skip
    axis = "<line x1='40' y1='180' x2='680' y2='180' stroke='currentColor' opacity='.4'/>"
    end = (longest // width + 1) * width
    ticks = "".join(
        f"<text x='{40 + 160 * quarter}' y='196' text-anchor='middle'>{end * quarter // 4}</text>"
        for quarter in range(5)
    )
    height = max(205, 20 + 18 * len(series))
    return f"<svg viewBox='0 0 960 {height}' role='img' aria-label='lengths'>{axis}{ticks}{''.join(parts)}</svg>"


def _sample_table(labels: Sequence[str], answers: Sequence[AnswerSet]) -> str:
    firsts = [found.first_draws() for found in answers]
    shared = [row for row in firsts[0] if all(row in other for other in firsts)]
    shared.sort(key=lambda row: rouge_l(firsts[0][row].student, firsts[0][row].teacher))
    step = max(1, len(shared) // SHOWN_SAMPLES)
    rows = []
    for row in shared[::step][:SHOWN_SAMPLES]:
        teacher = firsts[0][row]
        texts = [(label, first[row].student) for label, first in zip(labels, firsts, strict=True)]
        texts.append(("teacher", teacher.teacher))
        cells = "".join(f"<p class=text><small>{escape(who)}:</small> {escape(text)}</p>" for who, text in texts)
        rows.append(f"<tr><td class=text>{escape(teacher.prompt)}</td><td>{cells}</td></tr>")
    return f"<table><tr><th>prompt</th><th>answers</th></tr>{''.join(rows)}</table>"
