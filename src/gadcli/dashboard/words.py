"""What a run says in words and in JSON: for `gad why`, `gad monitor --json` and reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gadcli.dashboard.draw import MARKS
from gadcli.dashboard.view import RunView
from gadcli.metrics.health import Verdict, group_levels
from gadcli.metrics.symptoms import FEWEST_STEPS, Diagnosis

RESUME = "the same command with --resume continues from the last checkpoint"


def why_lines(view: RunView, now: float) -> list[str]:
    """Every diagnosis with its evidence, cause and cure, the most certain first."""
    last, total = view.log.history.last, view.log.run.get("total_steps")
    step = f"step {last.step}" + (f"/{total}" if total else "") if last else "no step yet"
    state = view.log.state(now)
    lines = [f"{view.run_dir}: {step}, {state.kind}"]
    if state.kind in ("dead", "failed", "silent"):
        collapsed = (view.log.end or {}).get("code") == 5
        lines.append(f"{MARKS['bad']} {state.text}" + ("" if collapsed else f" ({RESUME})"))
    if view.log.bad_lines:
        lines.append(f"{view.log.bad_lines} lines of {view.log.path.name} could not be read and were passed over")
    faults = [d for d in view.judge.diagnoses if d.level != "info"]
    if not faults:
        lines.append(_all_well(len(view.log.history)))
    for place, found in enumerate(faults, start=1):
        lines += _block(f"{place}. {MARKS['bad' if found.level == 'bad' else 'warn']}", found)
    for found in view.judge.diagnoses:
        if found.level == "info":
            lines += _block(f"{MARKS['quiet']} note:", found)
    return lines


def _all_well(steps: int) -> str:
    if not steps:
        return "nothing to judge yet"
    early = f" (only {steps} steps yet: collapses show from {FEWEST_STEPS} on)" if steps < FEWEST_STEPS else ""
    return f"{MARKS['ok']} nothing is unhealthy in its metrics{early}"


def _block(mark: str, found: Diagnosis) -> list[str]:
    name = f"{found.name}: {found.title}" if "/" not in found.name else found.title
    lines = ["", f"{mark} {name} ({found.certainty:.0%} certain, since step {found.since})"]
    lines += [f"   evidence  {item}" for item in found.evidence]
    lines.append(f"   cause     {found.cause}")
    if found.cures:
        lines.append(f"   fix       {'   or   '.join(found.cures)}")
    if found.advice:
        lines.append(f"   advice    {found.advice}")
    return lines


def run_json(view: RunView, now: float) -> dict[str, Any]:
    """One run as plain data: state, progress, newest metrics, verdicts, diagnoses, events, sample."""
    log = view.log
    state, last = log.state(now), log.history.last
    sample = view.sample()
    evals = {name: value for record in log.evals for name, value in record.metrics.items()}
    return _finite({
        "run": str(view.run_dir),
        "header": log.run,
        "state": state.kind,
        "state_text": state.text,
        "step": last.step if last else None,
        "total_steps": log.run.get("total_steps"),
        "seconds_a_step": view.step_seconds(),
        "starts": len(log.runs),
        "bad_lines": log.bad_lines,
        "sampled": log.sampled,
        "metrics": {**evals, **(last.metrics if last else {})},
        "groups": group_levels(view.judge.verdicts()),
        "verdicts": [verdict_json(v) for v in view.judge.verdicts()],
        "diagnoses": diagnoses_json(view.judge.diagnoses),
        "time_split": dict(view.time_split()),
        "events": [{"step": e.step, "time": e.time, "kind": e.kind, "level": e.level, "message": e.message}
                   for e in list(log.events)[-20:]],
        "sample": None if sample is None else {
            "step": sample[2].step, "prompt": sample[2].prompt, "student": sample[2].student,
            "teacher": sample[2].teacher, "student_score": sample[2].student_score,
            "teacher_score": sample[2].teacher_score,
        },
    })  # fmt: skip


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """One verdict as plain data."""
    return {"metric": verdict.metric, "group": verdict.group, "level": verdict.level, "value": verdict.value,
            "since": verdict.since, "text": verdict.text}  # fmt: skip


def diagnoses_json(diagnoses: Sequence[Diagnosis]) -> list[dict[str, Any]]:
    """Diagnoses as plain data, in the order given."""
    return [
        {"name": d.name, "title": d.title, "level": d.level, "certainty": round(d.certainty, 3), "since": d.since,
         "evidence": [{"metric": e.metric, "value": e.value, "since": e.since, "note": e.note} for e in d.evidence],
         "cause": d.cause, "cures": list(d.cures), "advice": d.advice}
        for d in diagnoses
    ]  # fmt: skip


def _finite(value: Any) -> Any:
    """Strict JSON has no NaN: null instead."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
