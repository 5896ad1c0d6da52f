"""The panels beside the metrics: why something is unhealthy, samples, events, and where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.text import Text

from gadcli.dashboard.draw import MARKS, STYLES, clean, duration, fit, wrap
from gadcli.dashboard.view import RunView
from gadcli.metrics.health import Level, number
from gadcli.metrics.samples import Sample


def side_column(view: RunView, width: int, rows: int) -> list[Text]:
    """Why it is unhealthy, the sample looked at, the best-scored answer, events: as much of it as there is room."""
    events = min(max(3, rows // 4), len(view.log.events) + 1, rows)
    left = rows - events
    lines = why_panel(view, width, left - 6) if left >= 14 else []
    lines += sample_lines(view, width, min(left - len(lines), max(6, (left - len(lines)) * 3 // 5)))
    best, shown = view.best_scored(), view.sample()
    if best is not None and (shown is None or best != shown[2]) and left - len(lines) >= 5:
        lines.append(Text())
        lines += one_sample(best, "best-scored answer", width, left - len(lines))
    if events > 1 and rows - len(lines) > events:
        lines.append(Text())
    return [*lines, *event_lines(view, width, rows - len(lines))]


def waiting_lines(view: RunView, width: int, rows: int, now: float) -> list[Text]:
    """Before the first step: what it waits for, for how long, and what is planned."""
    state = view.log.state(now)
    what = f"{view.log.path} does not exist yet" if state.kind == "missing" else state.text
    if state.kind == "starting" and view.log.begun:
        what = f"{state.text.partition(',')[0]} · {duration(max(0.0, now - view.log.begun))}"
    lines = [
        Text.assemble("waiting for the first step: ", (what or "no step yet", "bold" if view.log.begun else "dim"))
    ]
    plan = view.plan()
    try:
        steps, tokens, models, ranks = plan["steps"], plan["tokens_per_step"], plan["models"], plan["world_size"]
        told = [("plan", f"{steps['total']} steps of {tokens['prompts']} prompts, {plan['rows']['kept']} rows"
                 + (f"; the critic alone for {steps['critic_only']}" if steps["critic_only"] else "")),
                ("models", ", ".join(f"{name} {number(float(size))}" for name, size in models.items() if size)
                 + f" · {ranks} process{'es' * (ranks != 1)} on {plan['device']}, sampler {plan['engine']}"),
                *(("unusual", str(text)) for text in plan["unusual"])]  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError):
        told = []
    for name, text in told:
        for i, piece in enumerate(wrap(clean(text), width - 9, 3)):
            lines.append(Text.assemble((f"{name if i == 0 else '':<8} ", "dim"), piece))
    lines += event_lines(view, width, rows - len(lines))
    return [fit(line, width) for line in lines[: max(1, rows)]]


def why_panel(view: RunView, width: int, rows: int) -> list[Text]:
    """The most certain diagnosis in full: since when, evidence, cause, fixes, advice. Empty for a healthy run."""
    found = next((d for d in view.judge.diagnoses if d.level != "info"), None)
    if found is None or rows < 4:
        return []
    title = Text(f"why · {found.certainty:.0%} certain · since step {found.since} ", style="bold")
    title.append("─" * max(0, width - title.cell_len), style="dim")
    lines = [fit(title, width)]
    parts = [("evidence", str(item)) for item in found.evidence[:4]]
    parts += [("cause", found.cause), *(("fix", fix) for fix in found.cures[:2]), ("advice", found.advice)]
    before = ""
    for name, text in parts:
        for i, piece in enumerate(wrap(clean(text), width - 10, 4)):
            head = name if i == 0 and name != before else ""
            style = "bold green" if name == "fix" else ""
            lines.append(fit(Text.assemble((f"{head:<9} ", "dim"), (piece, style)), width))
        before = name if text else before
    return [*lines[: rows - 1], Text()]


def time_lines(view: RunView, width: int, rows: int) -> list[Text]:
    """Where a step's time goes: a bar of segments, and the shares in words."""
    split, seconds = view.time_split(), view.step_seconds()
    if rows <= 0 or not split or seconds is None:
        return []
    words = Text("time ", style="bold").append(duration(seconds) + "  ", style="")
    words.append(" · ".join(f"{name} {share:.0%}" for name, share in split if share >= 0.03))
    lines = [words]
    if rows > 1:
        line, used = Text(), 0
        for i, (_, share) in enumerate(split):
            count = min(width - used, round(share * width))
            line.append("█▓▒░"[i % 4] * count, style=("cyan", "blue", "magenta", "green", "yellow")[i % 5])
            used += count
        lines.append(line)
    return [fit(line, width) for line in lines[:rows]]


def sample_lines(view: RunView, width: int, rows: int) -> list[Text]:
    """The sample looked at: prompt, student and teacher with their scores, sharing the rows."""
    found = view.sample()
    if rows < 2:
        return []
    if found is None:
        return [fit(Text("sample: none yet", style="dim"), width)]
    place, count, sample = found
    return one_sample(sample, f"sample {place}/{count}", width, rows)


def one_sample(sample: Sample, name: str, width: int, rows: int) -> list[Text]:
    """A title and the three texts of one sample in at most `rows` lines."""
    title = Text(f"{name} · step {sample.step} · {clean(sample.kind)} ", style="bold")
    if sample.gap is not None:
        title.append(f"gap {number(sample.gap)} ", style="dim")
    title.append("─" * max(0, width - title.cell_len), style="dim")
    lines = [fit(title, width)]
    parts = [("prompt", sample.prompt, None), ("student", sample.student, sample.student_score),
             ("teacher", sample.teacher, sample.teacher_score)]  # fmt: skip
    parts = parts if rows >= 4 else parts[1:]
    texts = [clean(text) or "(empty)" for _, text, _ in parts]
    inner = max(2, width - 16)
    given = share_rows(rows - 1, [len(wrap(text, inner, 20)) for text in texts])
    for (part, _, score), text, count_rows in zip(parts, texts, given, strict=True):
        for i, piece in enumerate(wrap(text, inner, count_rows)):
            head = f"{part:<8}{number(score) if score is not None else '':>7} " if i == 0 else " " * 16
            style = {"student": "cyan", "teacher": "green"}.get(part, "dim")
            lines.append(fit(Text.assemble((head, style), piece), width))
    return lines


def event_lines(view: RunView, width: int, rows: int) -> list[Text]:
    """The newest events first."""
    lines = []
    for event in list(view.log.events)[::-1][: max(0, rows)]:
        level: Level = "bad" if event.level == "bad" else "warn" if event.level == "warn" else "quiet"
        at = time.strftime("%H:%M", time.localtime(event.time)) if event.time else "--:--"
        lines.append(Text.assemble((f"{at} {MARKS[level]} step {event.step} ", STYLES[level]), clean(event.message)))
    return [fit(line, width) for line in lines]


def share_rows(rows: int, wants: Sequence[int]) -> list[int]:
    """`rows` dealt out one at a time to who has the least of what it wants, until all have it."""
    given = [0] * len(wants)
    for _ in range(min(rows, sum(wants))):
        given[min((i for i, want in enumerate(wants) if given[i] < want), key=lambda i: given[i] / wants[i])] += 1
    return given
