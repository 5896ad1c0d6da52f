"""Lays a run out on a screen of any size: lines of exactly the room there is, in one, two or three columns."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Group as Lines
from rich.text import Text

from gadcli.dashboard.draw import MARKS, STYLES, band_text, bar, chart, clean, duration, fit, pad, sparkline
from gadcli.dashboard.panels import event_lines, sample_lines, share_rows, side_column, time_lines, waiting_lines
from gadcli.dashboard.view import RunView
from gadcli.metrics.health import Level, group_levels, number
from gadcli.metrics.runlog import RunLog
from gadcli.metrics.table import GROUPS, Group, label, metric

TWO_COLUMNS, THREE_COLUMNS = 100, 150
NARROWEST_RUN, SHORTEST_RUN = 56, 9
CHART_ROWS = 8
LABEL_WIDTH, BAND_WIDTH = 16, 10
_SHORT: dict[Group, str] = {"discriminator": "critic", "actor": "actor", "responses": "answers", "engine": "engine"}
_STATE_STYLES = {"running": "green", "done": "cyan", "starting": "yellow", "stopped": "yellow", "silent": "yellow"}


def render(log: RunLog | RunView, width: int, height: int, now: float | None = None) -> Lines:
    """The picture of a run, `height` lines of at most `width` cells. `now`: epoch seconds."""
    view = log
    if isinstance(view, RunLog):
        view = RunView(view.run_dir, view)
        view.judge.update()
        view.samples.poll()
    return Lines(*screen_lines(view, width, height, time.time() if now is None else now))


def render_runs(views: Sequence[RunView], width: int, height: int, now: float) -> Lines:
    """Several runs at once: side by side where there is room, else one above the other, else a line each."""
    count = len(views)
    if count == 1:
        return render(views[0], width, height, now)
    names = [view.name for view in views]
    for view in views:  # two stages of one experiment share their name; their folders do not
        view.name = str(view.run_dir) if names.count(view.name) > 1 else view.name
    each = (width - (count - 1)) // count
    if each >= NARROWEST_RUN:
        return Lines(*beside([screen_lines(v, each, height, now) for v in views], [each] * count, height))
    if height // count >= SHORTEST_RUN:
        return Lines(*(line for v in views for line in screen_lines(v, width, height // count, now)))
    lines = [fit(Text.assemble(header(v, width, now)[0], "  ", progress(v, 30, now)), width) for v in views]
    return Lines(*lines[:height])


def screen_lines(view: RunView, width: int, height: int, now: float) -> list[Text]:
    """The same as a list of lines."""
    lines = [*header(view, width, now), progress(view, width, now)]
    # The side panel of a wide screen gives the evidence in full.
    lines += advice(view, width, 3 if height >= 30 and width < TWO_COLUMNS else 2)
    foot = [footer(view, width)] if view.interactive else []
    room = height - len(lines) - len(foot)
    last = view.log.history.last
    if last is None:
        body = waiting_lines(view, width, room, now)
    elif width >= THREE_COLUMNS and room >= 12:
        side = (width - 2) // 3
        widths = [side, side, width - 2 - 2 * side]
        columns = [
            groups_column(view, GROUPS[:2], widths[0], room),
            [*groups_column(view, GROUPS[2:], widths[1], room - 2), *time_lines(view, widths[1], 2)],
            side_column(view, widths[2], room),
        ]
        body = beside(columns, widths, room)
    elif width >= TWO_COLUMNS and room >= 12:
        left = (width - 1) * 11 // 20
        widths = [left, width - 1 - left]
        right = [*time_lines(view, widths[1], 2), *side_column(view, widths[1], room - 2)]
        body = beside([groups_column(view, GROUPS, left, room), right], widths, room)
    else:
        body = narrow_column(view, width, room)
    return [fit(line, width) for line in [*lines, *body][: max(0, height - len(foot))]] + foot


def header(view: RunView, width: int, now: float) -> list[Text]:
    """Name, stage and state of the run."""
    run, state = view.log.run, view.log.state(now)
    line = Text(no_wrap=True)
    line.append(clean(view.name), style="bold")
    for part in (run.get("stage"), view.judge.facts.loss and f"loss {view.judge.facts.loss}"):
        if part:
            line.append(f" · {clean(str(part))}")
    resumes = sum(1 for r in view.log.runs if r.get("resumed"))
    if resumes:
        line.append(f" · resumed ×{resumes}" if resumes > 1 else " · resumed")
    line.append(" · ")
    line.append(state.kind, style=_STATE_STYLES.get(state.kind, "bold red"))
    if view.paused:
        line.append(" · picture paused", style="bold yellow")
    notice = view.notice() if view.notice is not None else ""
    line.append(
        f" · {clean(notice or state.text)}" if notice or state.text not in ("", state.kind) else "",
        style="bold yellow" if notice else "dim",
    )
    return [fit(line, width)]


def progress(view: RunView, width: int, now: float) -> Text:
    """Step, bar, time left, pace."""
    last, planned = view.log.history.last, view.log.run.get("total_steps")
    if last is None and planned is None:
        steps = view.plan().get("steps")
        planned = steps.get("total") if isinstance(steps, dict) else None
    total = planned if isinstance(planned, int) and planned > 0 else 0
    step = last.step if last else int(view.log.run.get("start_step") or 0)
    seconds = view.step_seconds()
    left = Text(f"step {step}/{total} " if total else f"step {step} ")
    tail = Text()
    if total:
        tail.append(f" {step / total:.0%}")
        if seconds is not None and step < total and not view.log.state(now).ended:
            tail.append(f" · {duration((total - step) * seconds)} left")
    if seconds is not None:
        tail.append(f" · {duration(seconds)}/step")
    if view.log.state(now).ended and (took := view.elapsed()):
        tail.append(f" · took {duration(took)}")
    throughput = view.log.latest("perf/tokens_per_s")
    if throughput is not None and width >= 70:  # the engine's line has it too; the bar needs the room
        tail.append(f" · {number(throughput)} tokens/s")
    room = max(0, width - left.cell_len - tail.cell_len)
    if total and room >= 4:
        left.append_text(bar(step / total, min(room, 60)))
    return fit(left.append_text(tail), width)


def advice(view: RunView, width: int, rows: int) -> list[Text]:
    """The most certain diagnosis with its evidence and cure; nothing for a healthy run."""
    faults = [d for d in view.judge.diagnoses if d.level != "info"]
    if not faults:
        return []
    top = faults[0]
    style = STYLES[top.level if top.level != "info" else "ok"]
    more = f" (+{len(faults) - 1} more: gad why)" if len(faults) > 1 else ""
    lines = [Text.assemble((f"{MARKS['bad' if top.level == 'bad' else 'warn']} {top.title}", style), (more, "dim"))]
    if top.cures:
        lines.append(Text.assemble("  try ", (top.cures[0], "bold"), (f"  (since step {top.since})", "dim")))
    if rows > 2:
        lines.append(Text("  " + "; ".join(str(e) for e in top.evidence), style="dim"))
    return [fit(line, width) for line in lines[:rows]]


def metric_line(view: RunView, name: str, width: int, level: Level, text: str | None = None) -> Text:
    """Mark, name, value, sparkline, band: as much of it as `width` holds."""
    bounds = metric(name).range_for(view.judge.facts.loss)
    _, values = view.series(name)
    label_width = min(LABEL_WIDTH, max(6, width - 11))
    # Only what is unhealthy is coloured throughout: on a healthy screen the numbers stay plain.
    loud = STYLES[level] if level in ("warn", "bad") else ""
    line = Text(no_wrap=True).append(f"{MARKS[level]} ", style=STYLES[level])
    line.append_text(pad(Text(text or label(name), style=loud), label_width))
    line.append(f"{number(view.log.latest(name)):>8} ", style=loud)
    band = band_text(bounds)
    room = width - line.cell_len - (BAND_WIDTH if width >= 50 else 0) - 1
    if room >= 4 and values:
        line.append_text(sparkline(values, min(room, 60), bounds))
        if width >= 50:
            line.append(f" {band}", style="dim")
    return fit(line, width)


def group_lines(view: RunView, group: Group, width: int, rows: int) -> list[Text]:
    """A group in at most `rows` lines: its title, its metrics, and a chart of the first where there is room."""
    verdicts = view.verdicts()
    level = group_levels(list(verdicts.values()))[group]
    names = view.metrics_of(group)
    if rows <= 0:
        return []

    def of(name: str) -> Text:
        return metric_line(view, name, width, verdicts[name].level if name in verdicts else "quiet")

    if not names:
        return [fit(Text(f"{MARKS['quiet']} {group}: nothing measured", style="dim"), width)]
    if rows == 1:
        return [metric_line(view, names[0], width, level, f"{_SHORT[group]} {label(names[0])}")]
    title = Text(f"{MARKS[level]} {group} ", style=STYLES[level])
    title.append("─" * max(0, width - title.cell_len), style="dim")
    lines = [title]
    spare = rows - 1 - len(names)
    if spare >= 4 and len(view.series(names[0])[1]) > 1:
        bounds = metric(names[0]).range_for(view.judge.facts.loss)
        lines.append(of(names[0]))
        lines += chart(view.series(names[0])[1], width, min(spare, CHART_ROWS), bounds)
        names = names[1:]
    return (lines + [of(name) for name in names])[:rows]


def groups_column(view: RunView, groups: Sequence[Group], width: int, rows: int) -> list[Text]:
    """Groups one above the other; rows go to each by what it has to show, the rest to charts, first come first.

    A group that the reader switched to comes first in both.
    """
    wants = [len(view.metrics_of(group)) + 1 for group in groups]
    chosen = groups.index(view.focus) if view.focus in groups and view.focus != GROUPS[0] else None
    given = share_rows(min(rows, sum(wants)), wants)
    if chosen is not None:
        mine = min(wants[chosen], max(2, rows - 2 * (len(groups) - 1)))
        rest = [0 if i == chosen else want for i, want in enumerate(wants)]
        given = share_rows(min(rows - mine, sum(rest)), [max(1, want) for want in rest])
        given[chosen] = mine
    spare = rows - sum(given)
    for i in sorted(range(len(groups)), key=lambda i: i != chosen):
        if wants[i] > 1 and spare >= 4:
            given[i] += min(spare, CHART_ROWS)
            spare -= min(spare, CHART_ROWS)
    return [line for group, count in zip(groups, given, strict=True) for line in group_lines(view, group, width, count)]


def narrow_column(view: RunView, width: int, rows: int) -> list[Text]:
    """One column: every group's headline, the focused group in full, time split, sample, events."""
    fixed = len(GROUPS) - 1 + 1
    sample_rows = min(8, max(3, (rows - 8) // 3)) if view.samples.rows and rows >= 10 else 0
    events = min(4, max(1, rows // 10)) if view.log.events and rows >= 9 else 0
    time_rows = 1 if rows >= 8 else 0
    detail = max(1, rows - fixed - sample_rows - events - time_rows)
    lines: list[Text] = []
    wants = [len(view.metrics_of(g)) + 1 for g in GROUPS]
    if detail + fixed - 1 >= sum(wants):
        lines += groups_column(view, GROUPS, width, detail + fixed - 1)
    else:
        for group in GROUPS:
            lines += group_lines(view, group, width, detail if group == view.focus else 1)
    lines += time_lines(view, width, time_rows)
    lines += sample_lines(view, width, sample_rows)
    lines += event_lines(view, width, rows - len(lines) if rows > len(lines) else 0)
    return lines


def footer(view: RunView, width: int) -> Text:
    """The keys, in words as long as the width allows."""
    pause = "go on" if view.paused else "pause"
    longest = (("q", "quit, the run goes on"), ("n", "next sample"), ("g", f"group: {view.focus}"), ("p", pause))
    shorter = (("q", "quit"), ("n", "sample"), ("g", f"group: {view.focus}"), ("p", pause))
    for names in (longest, shorter, [(key, "") for key, _ in shorter]):
        line = Text(no_wrap=True)
        for key, what in names:
            line.append(f" {key} ", style="reverse").append(f" {what} " if what else " ", style="dim")
        if line.cell_len <= width:
            break
    if view.link and line.cell_len + len(view.link) + 2 <= width:
        line.append(" " * (width - line.cell_len - len(view.link)) + view.link, style="dim")
    return fit(line, width)


def beside(columns: Sequence[list[Text]], widths: Sequence[int], rows: int) -> list[Text]:
    """Columns joined line by line, a blank cell between."""
    lines = []
    for row in range(max(0, rows)):
        line = Text(no_wrap=True)
        for i, (column, width) in enumerate(zip(columns, widths, strict=True)):
            if i:
                line.append(" ")
            line.append_text(pad(column[row].copy() if row < len(column) else Text(), width))
        lines.append(line)
    return lines
