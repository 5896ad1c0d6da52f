"""A run as one self-contained HTML page: what is wrong and its cure, plots, samples, events, settings. No script."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from gadcli.config.tree import flatten
from gadcli.dashboard.draw import MARKS, duration
from gadcli.dashboard.plots import PLOT_HEIGHT, PLOT_WIDTH, plot_of, safe, svg_style
from gadcli.dashboard.view import RunView
from gadcli.dashboard.words import RESUME
from gadcli.metrics.compare import settings
from gadcli.metrics.facts import read_config
from gadcli.metrics.health import group_levels, number
from gadcli.metrics.samples import Sample, highest_scored
from gadcli.metrics.symptoms import Diagnosis
from gadcli.metrics.table import GROUPS

_STYLE = """
:root { color-scheme: light dark; --ink:#1d2430; --dim:#667; --paper:#fff; --card:#f6f7f9;
  --line:#2563a8; --band:#bfe5c6; --warn:#b07a00; --bad:#c62828; --ok:#1a8a3a }
@media (prefers-color-scheme: dark) {
  :root { --ink:#e6e9ef; --dim:#99a; --paper:#14171c; --card:#1e232b; --line:#6fb1ff; --band:#1f4a2b;
    --warn:#e0a92e; --bad:#ff6b6b; --ok:#4cc26a } }
body { font:15px/1.45 system-ui,sans-serif; color:var(--ink); background:var(--paper); margin:2rem auto;
       max-width:1320px; padding:0 1rem }
h1 { margin-bottom:.2rem } h2 { margin-top:2rem } h3 { margin:0 0 .4rem; font-size:1rem } p { margin:.2rem 0 }
.plots { display:grid; grid-template-columns:repeat(auto-fill,minmax(300px,1fr)); gap:12px }
.plots svg { background:var(--card); width:100%; height:auto }
.ok { color:var(--ok) } .warn { color:var(--warn) } .bad { color:var(--bad) } .quiet { color:var(--dim) }
.card { background:var(--card); border-left:4px solid var(--dim); padding:.8rem 1rem; margin:.6rem 0; color:var(--ink) }
.card.warn { border-color:var(--warn) } .card.bad { border-color:var(--bad) } .card.ok { border-color:var(--ok) }
.card ul { margin:.2rem 0; padding-left:1.2rem } .card.warn h3 { color:var(--warn) } .card.bad h3 { color:var(--bad) }
code { background:#8882; padding:.1rem .35rem; border-radius:3px } .dim { color:var(--dim) }
.split { display:flex; height:1.4rem; margin:.6rem 0; font-size:.75rem; overflow:hidden; color:#fff }
.split span { padding:.1rem .3rem; white-space:nowrap; overflow:hidden; min-width:0; box-sizing:border-box }
table { border-collapse:collapse; width:100%; table-layout:fixed }
td,th { border-top:1px solid #8884; padding:.4rem; text-align:left; vertical-align:top; overflow-wrap:anywhere }
.number { width:5.5rem } footer { color:var(--dim); margin-top:2rem } summary { cursor:pointer; font-weight:600 }
"""
_SPLIT_COLOURS = ("#2563a8", "#3f7d4f", "#8a5a00", "#7a3f8a", "#5b6472")


def export_html(view: RunView, now: float) -> str:
    """A page that needs nothing but itself: no script, no network; every text of the run is escaped."""
    name = safe(view.name)
    look = svg_style("var(--line)", "var(--band)", "var(--ink)", "var(--dim)")
    parts = [_summary(view, now), _health(view, now), _plots(view), _samples(view), _events(view), _settings(view)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}{look}</style></head><body><h1>{name}</h1>{''.join(parts)}"
        f"<footer>Written by gad on {time.strftime('%Y-%m-%d %H:%M', time.localtime(now))}</footer></body></html>\n"
    )


def _summary(view: RunView, now: float) -> str:
    """One line of facts, and a bar of where a step's time goes."""
    log, last, seconds = view.log, view.log.history.last, view.step_seconds()
    total = log.run.get("total_steps")
    facts = [str(log.run.get("stage", "")), f"loss {view.judge.facts.loss}" if view.judge.facts.loss else "",
             log.state(now).kind, f"step {last.step if last else 0}" + (f" of {total}" if total else ""),
             f"{duration(seconds)} a step" if seconds else "", f"took {duration(t)}" if (t := view.elapsed()) else "",
             f"{len(log.runs)} starts" if len(log.runs) > 1 else ""]  # fmt: skip
    split = "".join(
        f'<span style="width:{share:.1%};background:{_SPLIT_COLOURS[i % len(_SPLIT_COLOURS)]}" '
        f'title="{safe(phase)} {share:.0%}">{safe(phase)} {share:.0%}</span>'
        for i, (phase, share) in enumerate(view.time_split())
    )
    return f"<p>{safe(' · '.join(f for f in facts if f))}</p>" + (f'<div class="split">{split}</div>' if split else "")


def _health(view: RunView, now: float) -> str:
    state = view.log.state(now)
    cards = [_card(found) for found in view.judge.diagnoses]
    if state.kind in ("dead", "failed", "silent"):
        how = "" if (view.log.end or {}).get("code") == 5 else f"<p>{RESUME}</p>"
        cards.insert(0, f'<div class="card bad"><h3>{MARKS["bad"]} {safe(state.text)}</h3>{how}</div>')
    if all(found.level == "info" for found in view.judge.diagnoses):
        cards.insert(
            0, f'<div class="card ok"><h3 class="ok">{MARKS["ok"]} nothing is unhealthy in its metrics</h3></div>'
        )
    return f"<h2>Health</h2>{''.join(cards)}"


def _card(found: Diagnosis) -> str:
    level = found.level if found.level != "info" else "quiet"
    certainty = f"{found.certainty:.0%} certain, since step {found.since}"
    cures = " or ".join(f"<code>{safe(cure)}</code>" for cure in found.cures)
    return (
        f'<div class="card {level}"><h3>{MARKS[level]} {safe(found.name)}: {safe(found.title)} '
        f'<span class="dim">({certainty})</span></h3>'
        f"<ul>{''.join(f'<li>{safe(str(item))}</li>' for item in found.evidence)}</ul><p>{safe(found.cause)}</p>"
        + (f"<p><b>Cure:</b> {cures}</p>" if cures else "")
        + (f'<p class="dim">{safe(found.advice)}</p>' if found.advice else "")
        + "</div>"
    )


def _plots(view: RunView) -> str:
    levels = group_levels(view.judge.verdicts())
    sections = []
    for group in GROUPS:
        plots = "".join(
            f'<svg viewBox="0 0 {PLOT_WIDTH} {PLOT_HEIGHT}" role="img">{plot_of(view, name)}</svg>'
            for name in view.metrics_of(group) if view.series(name)[0]
        )  # fmt: skip
        if plots:
            heading = f'<h2 class="{levels[group]}">{MARKS[levels[group]]} {group}</h2>'
            sections.append(f'{heading}<div class="plots">{plots}</div>')
    return "".join(sections)


def _samples(view: RunView) -> str:
    """What the discriminator likes best of all that was sampled, and the newest rows."""
    best = highest_scored(view.run_dir, 6)
    newest = list(view.samples.rows)[-12:][::-1]
    return (
        (_table("Best-scored answers", best, "where reward hacking shows first") if best else "")
        + (_table("Samples", newest, "the newest first") if newest else "")
    )  # fmt: skip


def _table(title: str, rows: Sequence[Sample], note: str) -> str:
    cells = "".join(
        f"<tr><td class=number>{r.step}</td><td>{safe(r.prompt)}</td><td>{safe(r.student)}</td>"
        f"<td class=number>{number(r.student_score)}</td><td>{safe(r.teacher)}</td>"
        f"<td class=number>{number(r.teacher_score)}</td></tr>"
        for r in rows
    )
    head = ("step", "prompt", "student", "score", "teacher", "score")
    titles = "".join(f"<th{' class=number' if h in ('step', 'score') else ''}>{h}</th>" for h in head)
    return f"<h2>{title}</h2><p class=dim>{note}</p><table><tr>{titles}</tr>{cells}</table>"


def _events(view: RunView) -> str:
    rows = "".join(
        f"<tr><td class=number>{e.step}</td><td class={e.level if e.level in ('warn', 'bad') else 'quiet'}>"
        f"{safe(e.kind)}</td><td>{safe(e.message)}</td></tr>"
        for e in list(view.log.events)[::-1][:50]
    )
    return f"<h2>Events</h2><table>{rows}</table>" if rows else ""


def _settings(view: RunView) -> str:
    """The resolved configuration (or the log's header), folded away."""
    found = flatten(read_config(view.run_dir) or settings(view.log.run))
    rows: Iterable[str] = (f"<tr><td>{safe(key)}</td><td>{safe(str(value))}</td></tr>" for key, value in found.items())
    table = "".join(rows)
    return (
        f"<h2>Settings</h2><details><summary>{len(found)} keys</summary><table>{table}</table></details>"
        if table
        else ""
    )
