"""`trainer.overlap`: the answers of step t+1 are drawn in a thread while the discriminator learns from step t.

The student's update needs the discriminator's scores from before its update, and the discriminator's update needs
nothing of the student. So the student goes first, its new weights go to the sampler, and drawing runs beside the
discriminator's update: the answers come from the weights that will learn from them, as they would without overlap.
That they do is measured (`rollout/staleness`); answers of older weights are thrown away and drawn anew.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

from gadcli.distributed.world import sum_over_ranks
from gadcli.model.rollout_batch import Rollout
from gadcli.rollout.side_thread import Aside
from gadcli.train.run import Ahead, Run
from gadcli.train.steplog import StepLog


@dataclass(frozen=True)
class Drawing:
    """Answers that are being drawn. No collective runs in the thread: each rank's sampler is its own."""

    step: int
    version: int
    synced_before: int
    values: dict[str, float]
    work: Aside[Rollout]


def begin_drawing(run: Run, step: int, log: StepLog) -> Drawing | None:
    """Bring today's weights to the sampler and let it draw `step`'s answers; None where there is no such step."""
    if step > run.progress.total_steps:
        return None
    synced_before, later = run.synced_step, StepLog(step)
    with log.phase("sync"):
        run.sync_sampler(step, later)
    draw = functools.partial(run.draw, run.rows_of(step), step)
    work = Aside(draw, run.world.device, "sampler")
    return Drawing(step, run.synced_step, synced_before, later.values, work)


def end_drawing(run: Run, drawing: Drawing, log: StepLog) -> Ahead:
    """Wait for the answers; raises what the sampler raised."""
    with log.phase("rollout"):
        start = time.monotonic()
        rollout = drawing.work.result()
        waited = time.monotonic() - start
        (tokens,) = sum_over_ranks([sum(rollout.lengths)])
    seconds = max(drawing.work.seconds, 1e-9)
    log.put("rollout/hidden_s", max(0.0, seconds - waited))
    values = drawing.values | {"rollout/tokens_per_s": tokens / seconds}
    return Ahead(drawing.step, drawing.version, drawing.synced_before, rollout, values)


def take_ahead(run: Run, step: int, log: StepLog) -> Rollout | None:
    """The answers drawn ahead, where they are this step's and of the weights the actor has now. Same on all ranks."""
    ahead, run.ahead = run.ahead, None
    if ahead is None or ahead.step != step:
        return None
    staleness = run.actor.optimizer.updates - ahead.version
    log.put("rollout/staleness", float(staleness))
    if staleness:
        text = f"answers drawn ahead are {staleness} updates old: thrown away and drawn anew"
        run.records.event("note", text, level="warn", step=step)
        return None
    log.values |= ahead.values
    return ahead.rollout
