"""Objective soda: the student learns to prefer the teacher's answer to one that it gave itself before training.

That snapshot, one answer of the start model to every training prompt, is sampled once and kept in `snapshot.jsonl`
with the start model's log-probs of both answers: training then needs no reference model, and a resumed run reads the
very numbers that the interrupted one used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gadcli.data.batches import TokenizedRow
from gadcli.distributed.world import gather_objects, max_over_ranks
from gadcli.errors import CheckpointError
from gadcli.model.packing import Group
from gadcli.rollout.sampler import Sampling, request_seed
from gadcli.train.loop import finish_step, steps
from gadcli.train.run import Run
from gadcli.train.steplog import StepLog

SNAPSHOT_FILE = "snapshot.jsonl"


def train_soda(run: Run) -> None:
    """One preference step a batch of (teacher's, snapshot's) answers; no critic exists."""
    snapshot = take_snapshot(run)
    if snapshot is None:
        return  # asked to stop meanwhile: what was sampled is kept for --resume
    for step, rows in steps(run):
        log = StepLog(step, run.on_phase)
        with log.phase("actor"):
            pairs, reference_P2 = snapshot.pairs(rows)
            log.add(run.actor.preference_update(pairs, reference_P2))
        finish_step(run, log, rows)


@dataclass(frozen=True)
class Snapshot:
    """The file and where each row's line begins in it: answers stay on disk, however many there are."""

    path: Path
    offsets: dict[int, int]

    def pairs(self, rows: Sequence[TokenizedRow]) -> tuple[list[Group], torch.Tensor]:
        """Each prompt with the teacher's and the snapshot's answer, and the start model's log-probs of them [P, 2]."""
        with self.path.open("rb") as file:
            found = []
            for row in rows:
                file.seek(self.offsets[row.row_id])
                found.append(json.loads(file.readline()))
        groups = [
            Group(row.prompt_ids, [row.teacher_ids, kept["ids"]], row.row_id)
            for row, kept in zip(rows, found, strict=True)
        ]
        return groups, torch.tensor([kept["logp"] for kept in found])


def take_snapshot(run: Run) -> Snapshot | None:
    """The start model's answers: those on disk, and the rest sampled now; None when asked to stop. Collective.

    CheckpointError where the file is of other data or settings, or incomplete though training has begun.
    """
    path = run.run_dir / SNAPSHOT_FILE
    if run.world.is_main:
        begin_file(path, header_of(run))
    if dist.get_world_size() > 1:
        dist.barrier()
    snapshot = read_snapshot(path, header_of(run))
    missing = [i for i in range(len(run.train_data)) if run.train_data[i].row_id not in snapshot.offsets]
    if not missing:
        return snapshot
    if run.progress.step:
        raise CheckpointError(
            f"{path}: {len(missing)} rows are missing, and the start model that gave them has been trained since",
            "bring the file back, or start anew with --force",
        )
    started = time.monotonic()
    run.on_phase("rollout", 0)
    run.sync_sampler(0, StepLog(0, run.on_phase))
    chunk = run.cfg.rollout.max_num_seqs * run.world.size
    for first in range(0, len(missing), chunk):
        if max_over_ranks(float(run.stop.number)):
            return None
        lines = sample_chunk(run, missing[first : first + chunk])
        if run.world.is_main:
            with path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
    if dist.get_world_size() > 1:
        dist.barrier()
    seconds = time.monotonic() - started
    run.progress.train_seconds += max_over_ranks(seconds)
    text = f"sampled the start model's answers to {len(missing)} prompts in {seconds:.1f} s ({SNAPSHOT_FILE})"
    run.records.event("note", text, step=0)
    return read_snapshot(path, header_of(run))


def header_of(run: Run) -> dict[str, Any]:
    """What the answers depend on."""
    sampling = Sampling.of(run.cfg.rollout, run.cfg.data.max_response_length, n=1)
    return {
        "model": run.cfg.actor.model.path,
        "data": run.train_data.fingerprint,
        "seed": run.cfg.trainer.seed,
        **asdict(sampling),
    }


def begin_file(path: Path, header: dict[str, Any]) -> None:
    """Make the file, or cut a line that a kill has torn."""
    if not path.exists():
        path.write_text(json.dumps(header) + "\n")
        return
    content = path.read_bytes()
    if whole := content.rfind(b"\n") + 1:
        with path.open("r+b") as file:
            file.truncate(whole)
    else:
        path.write_text(json.dumps(header) + "\n")


def read_snapshot(path: Path, header: dict[str, Any]) -> Snapshot:
    offsets: dict[int, int] = {}
    with path.open("rb") as file:
        known = json.loads(file.readline())
        if known != header:
            differing = [key for key in header if known.get(key) != header[key]]
            raise CheckpointError(
                f"{path}: sampled with another {', '.join(differing)}",
                "start anew with --force, or resume with the settings it was sampled with",
            )
        at = file.tell()
        for line in file:
            offsets[json.loads(line)["row"]] = at
            at += len(line)
    return Snapshot(path, offsets)


def sample_chunk(run: Run, indices: Sequence[int]) -> list[dict[str, Any]]:
    """One answer to each row and both answers' log-probs at temperature 1, in the rows' order, on every rank."""
    assert run.sampler is not None
    own = list(indices[run.world.rank :: run.world.size]) or [indices[0]]  # a rank without rows stays in step
    rows = [run.train_data[i] for i in own]
    sampling = Sampling.of(run.cfg.rollout, run.cfg.data.max_response_length, n=1)
    seeds = [request_seed(run.cfg.trainer.seed, 0, row.row_id) for row in rows]
    answers = [group[0].ids for group in run.sampler.generate([row.prompt_ids for row in rows], sampling, seeds)]
    run.sampler.sleep()
    groups = [Group(row.prompt_ids, [row.teacher_ids, ids], row.row_id) for row, ids in zip(rows, answers, strict=True)]
    width = max(len(answer) for group in groups for answer in group.answers)
    logp_P2 = run.actor.logprobs(groups, width, temperature=1.0).sum(-1).view(-1, 2).tolist()
    lines = [
        {"row": row.row_id, "ids": ids, "logp": logp}
        for row, ids, logp in zip(rows, answers, logp_P2, strict=True)
    ]  # fmt: skip
    found = {line["row"]: line for part in gather_objects(lines) for line in part}
    return [found[run.train_data[i].row_id] for i in indices]
