"""The evaluation report as one HTML file: no script, no link, nothing fetched; readable in light and dark."""

from __future__ import annotations

from collections.abc import Sequence

from gadcli.dashboard.page import page
from gadcli.evaluate.answers import AnswerSet
from gadcli.evaluate.report import MEANINGS, Report, judge_lines, short_names
from gadcli.evaluate.text import rouge_l

SHOWN_SAMPLES = 24
BINS = 24
COLOURS = ("#2f6f9f", "#b5651d", "#4b8b3b", "#8a4f9e", "#9a3b3b", "#5c6b73")
TEACHER_COLOUR = "#8a8a8a"


def html_report(report: Report, answers: Sequence[AnswerSet]) -> str:
    """The whole page. `answers` are the sets that `report.models` describes, in the same order."""
    names = short_names([model.model for model in report.models])
    labels = [f"{names[model.model]} at {model.temperature:g}" for model in report.models]
    curves, ticks = _length_curves(labels, answers)
    return page(
        "eval.html",
        title="Evaluation on held-out rows",
        report=report,
        labels=labels,
        metrics=list(dict.fromkeys(name for model in report.models for name in model.metrics)),
        meanings=MEANINGS,
        judge=judge_lines(report.judge) if report.judge else [],
        curves=curves,
        ticks=ticks,
        samples=_samples(labels, answers),
        shown_samples=SHOWN_SAMPLES,
    )


def _length_curves(labels: Sequence[str], answers: Sequence[AnswerSet]) -> tuple[list[tuple[str, str, str]], list[int]]:
    """(label, colour, points) of step curves, the share of answers in each length bin, the teacher's in grey; and the
    lengths at the five ticks. The drawing's area is 640 by 160, with its lower left at (40, 180)."""
    series = [("teacher", TEACHER_COLOUR, [sample.teacher_length for sample in answers[0].samples])]
    for i, (label, found) in enumerate(zip(labels, answers, strict=True)):
        series.append((label, COLOURS[i % len(COLOURS)], [sample.student_length for sample in found.samples]))
    longest = max(max(lengths) for _, _, lengths in series)
    width = max(1, -(-longest // BINS))
    bins = range(longest // width + 1)
    shares = [[sum(n // width == b for n in lengths) / len(lengths) for b in bins] for _, _, lengths in series]
    top, step = max(max(share) for share in shares), 640 / len(bins)
    curves = []
    for (label, colour, _), share in zip(series, shares, strict=True):
        corners = [(x, 180 - 160 * s / top) for b, s in enumerate(share) for x in (40 + b * step, 40 + (b + 1) * step)]
        curves.append((label, colour, " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)))
    return curves, [len(bins) * width * quarter // 4 for quarter in range(5)]


def _samples(labels: Sequence[str], answers: Sequence[AnswerSet]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, [(who, answer)]) of rows that all sets share, evenly from the worst to the best of the first."""
    firsts = [found.first_draws() for found in answers]
    shared = [row for row in firsts[0] if all(row in other for other in firsts)]
    shared.sort(key=lambda row: rouge_l(firsts[0][row].student, firsts[0][row].teacher))
    rows = []
    for row in shared[:: max(1, len(shared) // SHOWN_SAMPLES)][:SHOWN_SAMPLES]:
        teacher = firsts[0][row]
        texts = [(label, first[row].student) for label, first in zip(labels, firsts, strict=True)]
        rows.append((teacher.prompt, [*texts, ("teacher", teacher.teacher)]))
    return rows
