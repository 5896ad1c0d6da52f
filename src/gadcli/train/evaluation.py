"""Held-out evaluation during training: sample, compare with the teacher, let the critic score both sides."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from gadcli.algo.scores import d_acc
from gadcli.engine.dist import gather_objects
from gadcli.engine.layout import Group
from gadcli.engine.rollout import Sampling, request_seed
from gadcli.evaluate.text import Sample, summary
from gadcli.train.steplog import StepLog

if TYPE_CHECKING:
    from gadcli.train.run import Run

KEPT_SAMPLES = 16  # rows of an evaluation written to samples.jsonl; all of them where the held-out set is small
EVAL_SEED = 20251113  # not the run's: evaluations of any run and step then differ by the weights alone


def evaluate(run: Run) -> dict[str, float]:
    """Metrics `val/…` of the held-out rows at the rollout temperature; writes the record and samples. Collective."""
    assert run.val_data is not None and run.sampler is not None
    started = time.monotonic()
    log = StepLog(run.progress.step, run.on_phase)
    with log.phase("sync"):
        run.sync_sampler(run.progress.step, log)
    with log.phase("eval"):
        found = [row for part in gather_objects(_sample_share(run)) for row in part]
    rows = [found_row for _, found_row in sorted({row["index"]: row for row in found}.items())]
    metrics = summary(
        [Sample(r["student"], r["teacher"], r["student_length"], r["teacher_length"], r["finished"]) for r in rows]
    )
    if run.maybe_critic is not None:
        import torch

        teacher = torch.tensor([r["teacher_score"] for r in rows])
        student = torch.tensor([r["student_score"] for r in rows])
        metrics["val/d_acc"] = d_acc(teacher, student).value
    run.records.eval(run.progress.step, metrics, rows)
    seconds = time.monotonic() - started
    run.records.event(
        "eval",
        f"evaluated {len(rows)} held-out rows in {seconds:.1f} s: ROUGE-L {metrics['val/rouge_l']:.3f}",
        step=run.progress.step,
        seconds=seconds,
    )
    return metrics


def _sample_share(run: Run) -> list[dict[str, Any]]:
    """This rank's held-out rows, sampled once each and scored. A rank without rows repeats row 0 to stay in step."""
    assert run.val_data is not None and run.sampler is not None
    limit = run.cfg.data.val_rows or len(run.val_data)
    total = min(limit, len(run.val_data))
    indices = list(range(run.world.rank, total, run.world.size)) or [0]
    data = [run.val_data[i] for i in indices]
    sampling = Sampling.of(run.cfg.rollout, run.cfg.data.max_response_length, n=1)
    seeds = [request_seed(EVAL_SEED, 0, row.row_id) for row in data]
    answers = [group[0] for group in run.sampler.generate([row.prompt_ids for row in data], sampling, seeds)]
    run.sampler.rest()
    scores: list[list[float | None]] = [[None, None]] * len(data)
    if run.maybe_critic is not None:
        groups = [
            Group(row.prompt_ids, [a.ids, row.teacher_ids], row.row_id) for row, a in zip(data, answers, strict=True)
        ]
        scores = [list(map(float, pair)) for pair in run.maybe_critic.score(groups)]
    return [
        {
            "index": index,
            "prompt": row.messages[-1]["content"],
            "student": run.tokenizer.decode(answer.ids, skip_special_tokens=True),
            "teacher": row.teacher,
            "student_score": pair[0],
            "teacher_score": pair[1],
            "student_length": len(answer.ids),
            "teacher_length": len(row.teacher_ids),
            "finished": answer.finished,
        }
        for index, row, answer, pair in zip(indices, data, answers, scores, strict=True)
    ]
