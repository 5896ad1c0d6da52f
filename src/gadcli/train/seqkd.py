"""Stage seqkd: the student learns the teacher's text by supervised training."""

from __future__ import annotations

from gadcli.model.rollout_batch import teacher_groups
from gadcli.train.loop import finish_step, steps
from gadcli.train.run import Run
from gadcli.train.steplog import StepLog


def train_seqkd(run: Run) -> None:
    """One optimiser step a batch of teacher answers; no critic exists."""
    for step, rows in steps(run):
        log = StepLog(step, run.on_phase)
        with log.phase("actor"):
            log.add(run.actor.sft_update(teacher_groups(rows)))
        finish_step(run, log, rows)
