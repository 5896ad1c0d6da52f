"""`gad demo --collapse v1`: a run that is ruined on purpose, so that its dashboard and `gad why` can be learnt on it.

It is the field's first collapse, with the real loop on a tiny model. The loss `v1` has no upper bound, so a
critic that steps far keeps widening the gap. Its values are summed over all tokens (`critic.values=all`) and the
student's are negative, so every token costs the student: it learns to say nothing.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadcli.demo.run import Demo
from gadcli.errors import ExitCode
from gadcli.launch.display import say
from gadcli.metrics.diagnose import judge
from gadcli.metrics.health import number
from gadcli.metrics.runlog import METRICS_FILE, RunLog

COLLAPSES = ("v1",)
SHOWN = ("critic/score_diff", "critic/student_value_mean", "critic/d_acc", "response_length/mean")

# The tiny model trains whole, in seconds; transformers samples, since an engine would take longer to start than that.
TINY_MODEL = [
    "actor.model.train_layers=0", "critic.model.num_layers=0", "rollout.engine=hf", "data.max_response_length=64",
    "actor.micro_batch_tokens=8192", "critic.micro_batch_tokens=8192", "data.val_rows=32",
]  # fmt: skip
# Short: a student that any discriminator can tell apart, whose scores are soon negative, so that every token costs it.
FIRST_WORDS = ["actor.optim.lr=3e-3", "trainer.total_steps=12"]
RUIN = {
    "v1": [
        "critic.loss=v1", "critic.values=all",
        "critic.optim.lr=2e-3", "trainer.critic_warmup=20",  # far too fast, and long alone: the gap runs off
        "actor.optim.lr=5e-4", "trainer.total_steps=120",  # slow enough not to swing the game about
    ]
}  # fmt: skip


@dataclass
class CollapseDemo(Demo):
    """Where it lives, and which collapse it runs into."""

    collapse: str = "v1"

    def run(self) -> int:
        """Seqkd for a student that ends its answers, then the ruinous stage; returns the first code that is not 0."""
        files = self._data_files()
        student = self.folder / "student"
        if not (student / "model.safetensors").exists():
            say(sys.stderr, "gad: making a tiny model, so that nothing of value is ruined")
            self._process("gadcli.demo.tiny_model", str(files["train"]), str(student))
        code = self._stage("seqkd", "seqkd", {"actor.model.path": str(student)}, [*TINY_MODEL, *FIRST_WORDS])
        if code == ExitCode.OK:
            start = {"actor.model.path": self._checkpoint("seqkd", "actor")}
            code = self._stage("collapse", "warmup", start, [*TINY_MODEL, *RUIN[self.collapse]])
        if code == ExitCode.OK:
            say(sys.stdout, render(self.folder / "collapse"))
        return code


def named_collapses(run_dir: Path) -> list[dict[str, Any]]:
    """The alarms of a run that name a collapse (a metric's own alarms are named like the metric, with a slash)."""
    records = map(json.loads, (run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines())
    alarms = (r for r in records if r.get("type") == "event" and r.get("kind") == "alarm" and r.get("level") == "bad")
    return [alarm for alarm in alarms if "/" not in str(alarm.get("name"))]


def render(run_dir: Path) -> str:
    """How the run went, step by step, and what `gad why` makes of it: whatever that is."""
    log = RunLog(run_dir)
    log.poll()
    records = list(log.history)
    shown = sorted({round(i * (len(records) - 1) / 9) for i in range(10)})
    lines = ["How it went:", "  step   score gap  student's score  d_acc  answer length"]
    for record in (records[i] for i in shown):
        gap, score, d_acc, length = (number(record.metrics.get(name)) for name in SHOWN)
        lines.append(f"  {record.step:>4}  {gap:>10}  {score:>15}  {d_acc:>5}  {length:>13}")
    faults = [found for found in judge(run_dir).diagnoses if found.level == "bad"]
    alarms = named_collapses(run_dir)
    if faults:
        first = faults[0]
        lines += ["", f"The health rules name it: {first.title} ({first.name}), since step {first.since}.",
                  f"  cause: {first.cause}", f"  fix:   {'  or  '.join(first.cures)}"]  # fmt: skip
    elif alarms:  # a collapse swings: what was named on the way down may not hold at the very last step
        last = alarms[-1]
        lines += ["", f"The health rules name it: {last['message']} ({last['name']}), at step {last['step']}.",
                  f"  fix:   {last['cure']}"]  # fmt: skip
    else:
        lines += ["", "The health rules found no collapse in this run."]
    lines += ["", f"See it as a run's owner would: gad monitor --once {run_dir}, gad why {run_dir}.",
              f"What other losses make of its scores: gad losslab {run_dir}."]  # fmt: skip
    return "\n".join(lines)
