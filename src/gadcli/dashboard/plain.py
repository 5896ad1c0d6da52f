"""One plain line per step, for logs and pipes: no escape codes, the same fields each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gadcli.metrics.health import number
from gadcli.metrics.history import StepRecord

_FIELDS = (
    ("actor/sft_loss", "sft_loss"), ("actor/soda_margin", "margin"), ("actor/soda_acc", "acc"),
    ("critic/d_acc", "d_acc"), ("critic/score_diff", "gap"),
    ("critic/student_value_mean", "reward"), ("actor/pg_loss", "pg_loss"), ("actor/grad_norm", "actor_grad"),
    ("critic/grad_norm", "critic_grad"), ("response_length/mean", "length"),
    ("response_length/clip_ratio", "cut"), ("timing_s/step", "s"),
)  # fmt: skip


def plain_line(record: StepRecord | Mapping[str, Any], total_steps: int | None = None) -> str:
    """One step as a line: `step 12/200  d_acc 0.62  gap 0.11  length 118  s 40.2`.

    Takes a StepRecord or a step record of metrics.jsonl.
    """
    if isinstance(record, StepRecord):
        step, metrics = record.step, record.metrics
    else:
        step, metrics = int(record.get("step", 0)), dict(record.get("metrics", {}))
    of = f"/{total_steps}" if total_steps else ""
    parts = [f"step {step}{of}"]
    parts += [f"{label} {number(metrics[name])}" for name, label in _FIELDS if metrics.get(name) is not None]
    return "  ".join(parts)
