"""A run as one self-contained HTML page: what is wrong and its fix, plots, samples, events, settings."""

from __future__ import annotations

import time
from typing import Any

from gadcli.config.tree import flatten
from gadcli.dashboard.draw import MARKS, duration
from gadcli.dashboard.page import page
from gadcli.dashboard.plots import PLOT_HEIGHT, PLOT_WIDTH, plot_of, svg_style
from gadcli.dashboard.view import RunView
from gadcli.dashboard.words import RESUME
from gadcli.metrics.compare import settings
from gadcli.metrics.facts import read_config
from gadcli.metrics.health import group_levels, number
from gadcli.metrics.samples import highest_scored
from gadcli.metrics.table import GROUPS

_SPLIT_COLOURS = ("#2563a8", "#3f7d4f", "#8a5a00", "#7a3f8a", "#5b6472")


def export_html(view: RunView, now: float) -> str:
    """A page that needs nothing but itself: no script, no network; every text of the run is escaped."""
    from markupsafe import Markup

    state, diagnoses = view.log.state(now), view.judge.diagnoses
    levels = group_levels(view.judge.verdicts())
    gone = state.kind in ("dead", "failed", "silent")
    return page(
        "run.html",
        title=view.name,
        look=Markup(svg_style("var(--line)", "var(--band)", "var(--ink)", "var(--dim)")),
        marks=MARKS,
        number=number,
        facts=_facts(view, state.kind),
        time_split=view.time_split(),
        colours=_SPLIT_COLOURS,
        trouble=state.text if gone else "",
        resume="" if (view.log.end or {}).get("code") == 5 else RESUME,
        healthy=all(found.level == "info" for found in diagnoses),
        diagnoses=diagnoses,
        groups=[
            (group, levels[group], [Markup(plot_of(view, n)) for n in view.metrics_of(group) if view.series(n)[0]])
            for group in GROUPS
        ],
        plot_size=(PLOT_WIDTH, PLOT_HEIGHT),
        best=highest_scored(view.run_dir, 6),
        newest=list(view.samples.rows)[-12:][::-1],
        events=list(view.log.events)[::-1][:50],
        settings=flatten(read_config(view.run_dir) or settings(view.log.run)),
        written=time.strftime("%Y-%m-%d %H:%M", time.localtime(now)),
    )


def _facts(view: RunView, state: str) -> list[Any]:
    """One line: stage, loss, state, step, seconds per step, time taken, starts."""
    log, last, seconds = view.log, view.log.history.last, view.step_seconds()
    total = log.run.get("total_steps")
    facts = [str(log.run.get("stage", "")), f"loss {view.judge.facts.loss}" if view.judge.facts.loss else "", state,
             f"step {last.step if last else 0}" + (f" of {total}" if total else ""),
             f"{duration(seconds)} per step" if seconds else "", f"took {duration(t)}" if (t := view.elapsed()) else "",
             f"{len(log.runs)} starts" if len(log.runs) > 1 else ""]  # fmt: skip
    return [fact for fact in facts if fact]
