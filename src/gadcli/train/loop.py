"""Around every step: hand out rows, write metrics, evaluate, save, and agree on when to stop."""

from __future__ import annotations

import time
from collections.abc import Iterator

from gadcli.checkpoint.retention import less_is_better
from gadcli.data.batches import TokenizedRow
from gadcli.distributed.world import max_over_ranks, sum_over_ranks
from gadcli.model.critic import Scores
from gadcli.model.rollout_batch import Rollout
from gadcli.train.evaluation import evaluate
from gadcli.train.run import Run
from gadcli.train.saving import collect, save
from gadcli.train.steplog import StepLog, host_metrics, length_metrics


def steps(run: Run) -> Iterator[tuple[int, list[TokenizedRow]]]:
    """(step from 1, this rank's rows), from after the last save until the end, a stop or the time limit."""
    while run.progress.step < run.progress.total_steps:
        step = run.progress.step + 1
        yield step, run.rows_of(step)
        if _asked_to_stop(run):
            return


def _asked_to_stop(run: Run) -> bool:
    """Agreed by all ranks, since a signal, the clock or an alarm may reach one before the others."""
    limit = run.cfg.trainer.max_time_s
    out_of_time = bool(limit) and run.progress.train_seconds >= limit
    patience = run.cfg.trainer.stop_after
    converged = bool(patience) and run.progress.evals_since_best >= patience
    run.unhealthy = max_over_ranks(float(run.records.alarm is not None)) > 0
    asked = max_over_ranks(2.0 if run.stop.number or run.unhealthy else float(out_of_time or converged))
    if asked == 1.0:
        text = f"time limit reached (trainer.max_time_s={limit:g})"
        if converged:
            text = f"no better {run.cfg.trainer.keep_best} in {patience} evaluations (trainer.stop_after): the run ends"
        run.records.event("note", text, step=run.progress.step)
    return asked > 0


def finish_step(
    run: Run, log: StepLog, rows: list[TokenizedRow], rollout: Rollout | None = None, scores: Scores | None = None
) -> None:
    """Reduce once, write, evaluate, save."""
    log.add(length_metrics(rows, rollout, run.cfg.data.max_response_length))
    run.progress.step = log.step
    tokens = sum(len(row.prompt_ids) + len(row.teacher_ids) for row in rows)
    if rollout is not None:
        tokens += sum(rollout.lengths)
    seconds = time.monotonic() - log.started
    # The clock that max_time_s reads must be one for all ranks and survive a resume.
    run.progress.train_seconds += max_over_ranks(seconds)
    (all_tokens,) = sum_over_ranks([tokens])
    log.put("perf/tokens_per_s", all_tokens / seconds)
    for name, value in host_metrics(run.world.device).items():
        log.put(name, value)
    run.records.step(log, epoch=log.step / run.order.steps_per_epoch)
    run.records.train_sample(log.step, run.tokenizer.decode, rollout, scores)
    _eval_and_save(run, log.step)


def _eval_and_save(run: Run, step: int) -> None:
    trainer = run.cfg.trainer
    collect(run)
    improved = False
    if (trainer.test_freq and step % trainer.test_freq == 0) or step == run.progress.total_steps:
        improved = evaluate_once(run)  # before the save, which records the figures
    due = improved or (trainer.save_freq and step % trainer.save_freq == 0)
    if max_over_ranks(float(run.stop.take_save_request())) or due:
        save(run)


def evaluate_once(run: Run) -> bool:
    """Sample and score the held-out rows, once a step at most; may release the actor (critic_warmup_until).

    Returns whether these weights are the best so far by trainer.keep_best.
    """
    if run.val_data is None or run.progress.last_eval_step == run.progress.step:
        return False
    run.progress.last_eval = evaluate(run)
    run.progress.last_eval_step = run.progress.step
    wanted, d_acc = run.cfg.trainer.critic_warmup_until, run.progress.last_eval.get("val/d_acc", 0.0)
    if wanted and d_acc >= wanted and not run.actor_learns(run.progress.step + 1):
        run.progress.released_at = run.progress.step
        run.records.event(
            "note",
            f"held-out d_acc {d_acc:.3f} >= {wanted:g}: the actor learns from now on",
            step=run.progress.step,
        )
    return _note_best(run)


def _note_best(run: Run) -> bool:
    """Whether the evaluation just made is the best so far by trainer.keep_best, and for how many it was not."""
    progress, metric = run.progress, run.cfg.trainer.keep_best
    value = progress.last_eval.get(metric)
    if value is None:
        return False
    sign = -1.0 if less_is_better(metric) else 1.0
    if progress.best is None or sign * value > sign * progress.best:
        progress.best, progress.evals_since_best = value, 0
        run.records.event("note", f"{metric} {value:.4g}: the best so far", step=progress.step)
        return True
    progress.evals_since_best += 1
    return False


def finish(run: Run) -> None:
    """The end of the steps: a last evaluation (unless interrupted) and a last checkpoint.

    Raises UnhealthyError, after saving, where health.on_bad=stop ended the run.
    """
    if not run.stop.number and not run.unhealthy:
        evaluate_once(run)
    save(run)
    collect(run, wait=True)
    if run.unhealthy:
        raise run.records.as_error()
