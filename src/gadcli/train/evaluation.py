"""Held-out evaluation during training: sample, compare with the teacher, let the critic score both sides."""

from __future__ import annotations

import time
from typing import Any

from gadcli.algo.scores import d_acc
from gadcli.distributed.world import gather_objects
from gadcli.evaluate.text import Sample, summary
from gadcli.model.packing import Group
from gadcli.model.rollout_batch import teacher_groups
from gadcli.train.probe_set import (
    Snapshots,
    earlier_answers,
    held_out_rows,
    keep,
    probe_metrics,
    sample_held_out,
    share_of_rows,
)
from gadcli.train.run import Run
from gadcli.train.steplog import StepLog


def evaluate(run: Run) -> dict[str, float]:
    """Metrics `val/…` of the held-out rows at the rollout temperature; writes the record and samples. Collective."""
    assert run.val_data is not None and run.sampler is not None
    started = time.monotonic()
    log = StepLog(run.progress.step, run.on_phase)
    with log.phase("sync"):
        run.sync_sampler(run.progress.step, log)
    with log.phase("eval"):
        earlier = earlier_answers(run, run.progress.step) if run.maybe_critic is not None else {}
        found = [row for part in gather_objects(_sample_share(run, earlier)) for row in part]
    rows = [found_row for _, found_row in sorted({row["index"]: row for row in found}.items())]
    metrics = summary(
        [Sample(r["student"], r["teacher"], r["student_length"], r["teacher_length"], r["finished"]) for r in rows]
    )
    if run.maybe_critic is not None:
        import torch

        teacher = torch.tensor([r["teacher_score"] for r in rows])
        student = torch.tensor([r["student_score"] for r in rows])
        metrics["val/d_acc"] = d_acc(teacher, student).value
        metrics |= probe_metrics(rows)
        if earlier or run.progress.step == 0:
            keep(run, run.progress.step, {row["index"]: row["student_ids"] for row in rows})
    metrics["val/nll"] = -sum(row["teacher_logp"] for row in rows) / sum(row["teacher_length"] for row in rows)
    for row in rows:  # of no use to a reader
        del row["student_ids"], row["probe_scores"], row["teacher_logp"]
    run.records.eval(run.progress.step, metrics, rows)
    seconds = time.monotonic() - started
    run.records.event(
        "eval",
        f"evaluated {len(rows)} held-out rows in {seconds:.1f} s: ROUGE-L {metrics['val/rouge_l']:.3f}, "
        f"NLL of the teacher's text {metrics['val/nll']:.3f}",
        step=run.progress.step,
        seconds=seconds,
    )
    return metrics


def _sample_share(run: Run, earlier: Snapshots) -> list[dict[str, Any]]:
    """This rank's held-out rows, sampled once each and scored, the probe's older answers beside them."""
    assert run.val_data is not None
    indices = share_of_rows(run, held_out_rows(run))
    data = [run.with_read(run.val_data[i]) for i in indices]
    answers = sample_held_out(run, data)
    teacher_logp = run.actor.logprobs(teacher_groups(data), max(len(r.teacher_ids) for r in data), temperature=1.0).sum(
        -1
    )
    older = [
        {step: run.read(row.prompt_ids, kept[i]) for step, kept in earlier.items() if i in kept}
        for i, row in zip(indices, data, strict=True)
    ]
    scores: list[list[float | None]] = [[None, None]] * len(data)
    if run.maybe_critic is not None:
        groups = [
            Group(row.prompt_ids, [a.read_ids, row.read_ids, *old.values()], row.row_id)
            for row, a, old in zip(data, answers, older, strict=True)
        ]
        scores = [list(map(float, found)) for found in run.maybe_critic.score(groups)]
    return [
        {
            "index": index,
            "prompt": row.messages[-1]["content"],
            "student": run.tokenizer.decode(answer.ids, skip_special_tokens=True),
            "teacher": row.teacher,
            "student_score": found[0],
            "teacher_score": found[1],
            "student_length": len(answer.read_ids),
            "teacher_length": len(row.read_ids),
            "finished": answer.finished,
            "student_ids": answer.ids,
            "teacher_logp": logp,
            "probe_scores": dict(zip(old, found[2:], strict=True)),
        }
        for index, row, answer, found, old, logp in zip(
            indices, data, answers, scores, older, teacher_logp.tolist(), strict=True
        )
    ]
