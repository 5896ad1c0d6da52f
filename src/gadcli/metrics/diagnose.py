"""Names what is wrong with a run, the most certain first: symptoms found, and which explains which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gadcli.metrics.cures import cure_for
from gadcli.metrics.facts import RunFacts, read_config
from gadcli.metrics.health import WINDOW, Alarm, HealthTracker, Verdict, number
from gadcli.metrics.history import History, StepRecord
from gadcli.metrics.runlog import RunLog
from gadcli.metrics.signals import Evidence, Signals
from gadcli.metrics.slow_symptoms import SLOW_RULES
from gadcli.metrics.symptoms import FEWEST_STEPS, RULES, Diagnosis
from gadcli.metrics.table import METRICS

_EXPLAINS = {
    "runaway_gap": ("no_spread", "length_collapse", "saturated_ranking", "raw_drift", "quality_falls"),
    "no_spread": ("length_collapse", "variety_lost", "quality_falls"),
    "raw_drift": ("saturated_ranking",),
    "giveaway": ("lower_hinge",),
    "length_giveaway": ("quality_falls",),
}
_LEVELS = {"bad": 2, "warn": 1, "info": 0}


def diagnose(
    history: History,
    facts: RunFacts,
    verdicts: Sequence[Verdict] = (),
    evals: Sequence[tuple[int, Mapping[str, float]]] = (),
) -> list[Diagnosis]:
    """The named states of a run: faults first, the most certain first; [] for a healthy or too young one.

    A verdict (`metrics.health`) that no named diagnosis covers gets a plain one from the metric table.
    """
    if len(history) < FEWEST_STEPS:
        return []
    signals = Signals(history, evals)
    found = {d.name: d for rule in (*RULES, *SLOW_RULES) if (d := rule(signals, facts)) is not None}
    for name, explained in _EXPLAINS.items():
        if name in found and found[name].certainty >= 0.75:
            for other in set(explained) & set(found):
                limit = min(found[other].certainty, found[name].certainty - 0.1)
                found[other] = replace(found[other], certainty=limit, advice=f"probably follows from {name}")
    covered = {e.metric for d in found.values() if d.level != "info" for e in d.evidence}
    # Where a collapse is named, its group's lesser warnings are part of it.
    groups = {METRICS[d.evidence[0].metric].group for d in found.values() if d.level == "bad" and d.certainty >= 0.75}
    plain = [
        _plain(v, facts) for v in verdicts
        if v.unhealthy and v.metric not in covered and not (v.level == "warn" and v.group in groups)
    ]  # fmt: skip
    ranked = [*found.values(), *plain]
    return sorted(ranked, key=lambda d: (d.level != "info", d.certainty, _LEVELS[d.level]), reverse=True)


def _plain(verdict: Verdict, facts: RunFacts) -> Diagnosis:
    """A diagnosis made of one verdict."""
    row = METRICS[verdict.metric]
    cure, bounds = cure_for(row, verdict.side, facts), row.range_for(facts.loss)
    healthy = ""
    if bounds is not None:
        ends = [("at least", bounds.low), ("at most", bounds.high)]
        healthy = "healthy is " + " and ".join(f"{word} {number(v)}" for word, v in ends if math.isfinite(v))
    if not math.isfinite(verdict.value):
        side = verdict.metric.split("/")[0]
        cure = f"{side}.grad_clip=0.2 {side}.optim.lr=3e-7"
    return Diagnosis(
        verdict.metric, f"{verdict.metric} {number(verdict.value)}: {verdict.text}",
        "bad" if verdict.level == "bad" else "warn", 0.6 if verdict.level == "bad" else 0.5,
        (Evidence(verdict.metric, verdict.value, verdict.since, healthy),), f"it is the {row.meaning}",
        (cure,) if cure else (),
    )  # fmt: skip


CONFIRM_STEPS = 3
"""Steps in a row that a diagnosis must hold before it alarms."""


class Watch:
    """Health and diagnoses of one run, step by step: what the trainer asks, and what a reader replays.

    `step()` costs well under a millisecond for a healthy run, and memory is bounded (History).
    """

    def __init__(self, facts: RunFacts) -> None:
        self.facts = facts
        self.history = History()
        self._tracker = HealthTracker(facts)
        self._held: dict[str, int] = {}
        self._seen: dict[str, int] = {}  # the last step at which a diagnosis that was told held
        self._evals: list[tuple[int, Mapping[str, float]]] = []
        self.diagnoses: list[Diagnosis] = []

    def replay(self, log: RunLog) -> None:
        """Take in what an interrupted run wrote before, without alarms: a resume judges on."""
        for record in log.history:
            self.history.append(record)
            self._tracker.update(record.step, record.metrics)
        for held_out in log.evals:
            self.eval(held_out.step, held_out.metrics)

    def eval(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take one evaluation's metrics; returns what became unhealthy (or healthy again) with it."""
        self._evals = [*self._evals[-255:], (step, dict(metrics))]
        return self._tracker.update(step, metrics)

    def step(self, step: int, metrics: dict[str, float], epoch: float = 0.0) -> list[Alarm]:
        """Take one step's metrics; returns what became unhealthy (or healthy again) with it."""
        self.history.append(StepRecord(step, 0.0, epoch, dict(metrics)))
        alarms = self._tracker.update(step, metrics)
        self.diagnoses = diagnose(self.history, self.facts, self.verdicts(), self._evals)
        named = {d.name: d for d in self.diagnoses if d.level != "info" and d.name not in METRICS}
        self._held = {name: self._held.get(name, 0) + 1 for name in named}
        for name, held in self._held.items():
            # One that comes and goes at its edge is told once, and again only after a window without it.
            lately = name in self._seen and step - self._seen[name] <= WINDOW
            if held >= CONFIRM_STEPS and not lately:
                found = named[name]
                level: Literal["warn", "bad"] = "bad" if found.level == "bad" else "warn"
                alarms.append(Alarm(step, name, level, found.title, found.cures[0] if found.cures else ""))
                self._seen[name] = step
            elif lately:
                self._seen[name] = step
        return alarms

    def verdicts(self) -> list[Verdict]:
        """Every metric's verdict, in the table's order."""
        return self._tracker.verdicts()


class Judge:
    """Keeps verdicts and diagnoses of a RunLog up to date: only new records are looked at."""

    def __init__(self, log: RunLog) -> None:
        self.log = log
        self._seen: tuple[int, int, int] = (-1, -1, -1)
        self._start()

    def _start(self) -> None:
        self.facts = RunFacts.of(self.log.run, read_config(self.log.run_dir))
        self._tracker = HealthTracker(self.facts)
        self._last = self._last_eval = -1
        self.diagnoses: list[Diagnosis] = []

    def update(self) -> bool:
        """Judge what the log read since; true if anything was new."""
        state = (self.log.generation, self.log.history.revision, len(self.log.runs))
        if state != self._seen:
            self._seen = state
            self._start()
        new = self.log.history.after(self._last)
        for record in new:
            self._tracker.update(record.step, record.metrics)
            self._last = record.step
        new_evals = [e for e in self.log.evals if e.step > self._last_eval]
        for held_out in new_evals:
            self._tracker.update(held_out.step, held_out.metrics)
            self._last_eval = held_out.step
        if new or new_evals:
            evals = [(e.step, e.metrics) for e in self.log.evals]
            self.diagnoses = diagnose(self.log.history, self.facts, self.verdicts(), evals)
        return bool(new or new_evals)

    def verdicts(self) -> list[Verdict]:
        """Every metric's verdict, in the table's order."""
        return self._tracker.verdicts()


def judge(run_dir: Path) -> Judge:
    """Read a run once and judge it."""
    log = RunLog(run_dir)
    log.poll()
    judged = Judge(log)
    judged.update()
    return judged
