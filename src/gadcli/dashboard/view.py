"""One run as the dashboard sees it: log, judgement, samples, and what the reader chose to look at."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gadcli.metrics.diagnose import Judge
from gadcli.metrics.health import Verdict, median
from gadcli.metrics.runlog import PLAN_FILE, RunLog
from gadcli.metrics.samples import Sample, SampleTail
from gadcli.metrics.table import GROUPS, METRICS, Group, metric


class RunView:
    """Everything one picture needs. `poll()` reads and judges what is new; rendering reads nothing from disk."""

    def __init__(self, run_dir: Path, log: RunLog | None = None) -> None:
        self.run_dir = run_dir
        self.log = log or RunLog(run_dir)
        self.judge = Judge(self.log)
        self.samples = SampleTail(run_dir)
        self.focus: Group = "discriminator"
        self.sample_back = 0
        self.paused = False
        self.interactive = False
        self.link = ""
        self.notice: Callable[[], str] | None = None
        self._name = ""
        self._series: dict[str, tuple[list[int], list[float]]] = {}

    @property
    def name(self) -> str:
        """What the picture calls this run."""
        return self._name or str(self.log.run.get("exp_name") or self.run_dir.name)

    @name.setter
    def name(self, text: str) -> None:
        self._name = text

    def poll(self) -> bool:
        """True if anything new was read."""
        new = self.log.poll()
        if self.judge.update() or new:
            self._series.clear()
        return self.samples.poll() or new

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, cached until the next record."""
        if name not in self._series:
            self._series[name] = self.log.series(name)
        return self._series[name]

    def verdicts(self) -> dict[str, Verdict]:
        """Verdicts by metric; empty for what this run does not measure."""
        return {v.metric: v for v in self.judge.verdicts()}

    def metrics_of(self, group: Group) -> list[str]:
        """The group's metrics that this run measures: unhealthy ones first, then headlines, then the table's order."""
        verdicts = self.verdicts()
        last = self.log.history.last
        present = set(verdicts) | (set(last.metrics) if last else set())
        present |= {name for e in list(self.log.evals)[-1:] for name in e.metrics}
        order = {name: i for i, name in enumerate(METRICS)}

        dull = ("critic/lr", "actor/lr", "critic/advantages/mean")

        def rank(name: str) -> tuple[bool, bool, bool, int, str]:
            bad = name in verdicts and verdicts[name].unhealthy
            return (not bad, not metric(name).headline, name in dull, order.get(name, len(order)), name)

        hidden = {"actor/teacher_pg_loss"}  # actor/sft_loss by its older name
        names = [n for n in present - hidden if metric(n).group == group and not n.startswith("timing_s/")]
        return sorted(names, key=rank)

    def plan(self) -> Mapping[str, Any]:
        """The run's plan.json; {} where there is none that can be read."""
        try:
            found = json.loads((self.run_dir / PLAN_FILE).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def elapsed(self) -> float:
        """Seconds from the newest start to its last record; 0 where the log does not tell."""
        began, ended = self.log.run.get("time"), (self.log.end or {}).get("time") or self.log.last_time
        return max(0.0, float(ended) - float(began)) if isinstance(began, (int, float)) and ended else 0.0

    def step_seconds(self) -> float | None:
        """Median wall time of the last steps."""
        values = self.log.history.tail("timing_s/step", 20)[1]
        if len(values) >= 1:
            return median(values)
        last = self.log.history.last
        records = self.log.history.after(last.step - 20) if last else []
        gaps = [(b.time - a.time) / (b.step - a.step) for a, b in itertools.pairwise(records) if b.time > a.time]
        return median(gaps) if gaps else None

    def time_split(self) -> list[tuple[str, float]]:
        """(phase, share of the step) of the last steps, largest first; what no phase claims is `other`."""
        last = self.log.history.last
        if last is None:
            return []
        means = {}
        for name in last.metrics:
            if name.startswith("timing_s/") and name != "timing_s/step":
                values = self.log.history.tail(name, 20)[1]
                means[name.removeprefix("timing_s/")] = sum(values) / len(values)
        whole = max(self.step_seconds() or 0.0, sum(means.values()))
        if whole <= 0 or not means:
            return []
        split = sorted(((n, v / whole) for n, v in means.items()), key=lambda item: -item[1])
        rest = 1 - sum(share for _, share in split)
        return [*split, ("other", rest)] if rest > 0.02 else split

    def sample(self) -> tuple[int, int, Sample] | None:
        """(place from the newest, how many, sample) that is looked at."""
        rows = self.samples.rows
        if not rows:
            return None
        back = self.sample_back % len(rows)
        return back + 1, len(rows), rows[-1 - back]

    def best_scored(self) -> Sample | None:
        """The newest evaluation's answer that the discriminator likes best: reward hacking shows there first."""
        scored = [row for row in self.samples.rows if row.student_score is not None and row.kind != "train"]
        newest = max((row.step for row in scored), default=-1)
        rows = [row for row in scored if row.step == newest]
        return max(rows, key=lambda row: row.student_score or 0.0) if len(rows) > 1 else None

    def key(self, key: str) -> None:
        """React to a key: n next sample, g next group, p pause."""
        if key == "n":
            self.sample_back += 1
        elif key == "g":
            self.focus = GROUPS[(GROUPS.index(self.focus) + 1) % len(GROUPS)]
        elif key == "p":
            self.paused = not self.paused
