"""The fixed probe set: the same held-out prompts with the start model's and earlier students' answers to them.

A discriminator moves, so its score of today and of yesterday are two scales. Here today's discriminator scores
today's student, the teacher, the student of the beginning and students in between side by side: whether the student
has gained is then read off one scale, and the share of prompts on which it beats its own beginning is comparable over
time. Answers are kept in `probe.jsonl`, a line a snapshot.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gadcli.algo.scores import wins
from gadcli.data.batches import TokenizedRow
from gadcli.distributed.world import gather_objects
from gadcli.model.rollout_batch import Answer
from gadcli.rollout.sampler import Sampling, request_seed
from gadcli.train.run import Run
from gadcli.train.steplog import StepLog

PROBE_FILE = "probe.jsonl"
PROBE_ROWS = 64  # of the held-out rows, the first ones
EARLIER = 3  # students in between that are scored again, spread over the run
EVAL_SEED = 20251113  # not the run's: evaluations of any run and step then differ by the weights alone

Snapshots = dict[int, dict[int, list[int]]]  # step -> held-out row -> token ids of the answer


def sample_held_out(run: Run, rows: Sequence[TokenizedRow]) -> list[Answer]:
    """One answer to each row, from seeds that the row alone decides."""
    assert run.sampler is not None
    sampling = Sampling.of(run.cfg.rollout, run.cfg.data.max_response_length, n=1)
    seeds = [request_seed(EVAL_SEED, 0, row.row_id) for row in rows]
    groups = run.sampler.generate([row.prompt_ids for row in rows], sampling, seeds)
    run.sampler.sleep()
    return [group[0] for group in run.read_groups(rows, groups)]


def share_of_rows(run: Run, total: int) -> list[int]:
    """This rank's held-out rows among the first `total`. A rank without rows repeats row 0 to stay in step."""
    return list(range(run.world.rank, total, run.world.size)) or [0]


def held_out_rows(run: Run) -> int:
    """How many held-out rows an evaluation uses."""
    assert run.val_data is not None
    return min(run.cfg.data.val_rows or len(run.val_data), len(run.val_data))


def keep_start(run: Run, step: int, log: StepLog) -> None:
    """Before the first update: what the start model answers. Only where evaluations during training will ask."""
    if step != 1 or run.val_data is None or not run.cfg.trainer.test_freq or earlier_answers(run, step):
        return
    with log.phase("eval"):
        indices = share_of_rows(run, min(PROBE_ROWS, held_out_rows(run)))
        answers = sample_held_out(run, [run.val_data[i] for i in indices])
        own = [(index, answer.ids) for index, answer in zip(indices, answers, strict=True)]
        keep(run, 0, dict(pair for part in gather_objects(own) for pair in part))


def keep(run: Run, step: int, answers: Mapping[int, list[int]]) -> None:
    """Write a snapshot: of all ranks' answers, those to the probe's rows."""
    if run.world.is_main:
        found = {index: ids for index, ids in answers.items() if index < PROBE_ROWS}
        with (run.run_dir / PROBE_FILE).open("a") as file:
            file.write(json.dumps({"step": step, "answers": sorted(found.items())}) + "\n")


def earlier_answers(run: Run, step: int) -> Snapshots:
    """The start's snapshot and up to EARLIER others from before `step`, evenly spread; {} where there is no start.

    Collective: rank 0 reads. A resumed run's own future (snapshots from `step` on) does not count, and a line that a
    kill has torn is no snapshot.
    """
    found = gather_objects(_read(run, step) if run.world.is_main else None)[0]
    if 0 not in found:
        return {}
    return {kept: found[kept] for kept in (0, *spread(sorted(set(found) - {0})))}


def spread(steps: Sequence[int]) -> list[int]:
    """EARLIER of the steps, evenly spread, the last among them."""
    count = min(EARLIER, len(steps))
    return [steps[len(steps) * i // count - 1] for i in range(1, count + 1)]


def _read(run: Run, step: int) -> Snapshots:
    path = run.run_dir / PROBE_FILE
    found: Snapshots = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] < max(step, 1):
            found[record["step"]] = {int(index): ids for index, ids in record["answers"]}
    return found


def probe_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`val/probe_…` of rows with `student_score`, `teacher_score` and, in the probe, `probe_scores` {step: score}.

    Mean raw scores by today's discriminator of the teacher, the start model and today's student over the same
    prompts; the shares of prompts on which today's answer scores above the start's, and above the earlier students'
    (a tie counts one half). {} without a probe.
    """
    probed = [row for row in rows if row.get("probe_scores")]
    if not probed:
        return {}
    start = [(row["student_score"], row["probe_scores"][0]) for row in probed]
    metrics = {
        "val/probe_teacher": statistics.fmean(row["teacher_score"] for row in probed),
        "val/probe_start": statistics.fmean(score for _, score in start),
        "val/probe_student": statistics.fmean(score for score, _ in start),
        "val/probe_beats_start": _wins(start),
    }
    earlier = [
        (row["student_score"], score) for row in probed for step, score in row["probe_scores"].items() if step > 0
    ]
    return metrics | ({"val/probe_beats_earlier": _wins(earlier)} if earlier else {})


def _wins(pairs: Sequence[tuple[float, float]]) -> float:
    ours, theirs = (torch.tensor(side) for side in zip(*pairs, strict=True))
    return float(wins(ours, theirs).mean())
