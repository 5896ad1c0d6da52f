"""Stage seqkd: the student learns the teacher's text by supervised training."""

from __future__ import annotations

from gadcli.engine.rows import teacher_groups
from gadcli.train.run import Run
from gadcli.train.steplog import StepLog


def train_seqkd(run: Run) -> None:
    """One optimiser step a batch of teacher answers; no critic exists."""
    for step, rows in run.steps():
        log = StepLog(step, run.on_phase)
        with log.phase("actor"):
            log.add(run.actor.sft_update(teacher_groups(rows)))
        run.finish_step(log, rows)
