"""The reward of each answer where `rewards` lists more than the discriminator: scored, mixed, and logged apart."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gadcli.algo.rewards import Part, mix_rewards
from gadcli.config.rewards import RewardConfig
from gadcli.distributed.world import sum_over_ranks
from gadcli.model.rollout_batch import Rollout
from gadcli.rewards.answer import AnswerText
from gadcli.rewards.build import RewardSet
from gadcli.train.steplog import StepLog


def answer_texts(rollout: Rollout, decode: Callable[..., str]) -> list[AnswerText]:
    """The B answers as rewards see them, in (prompt, answer) order; special tokens are left out of the text."""
    return [
        AnswerText(
            messages=list(row.messages),
            answer=decode(answer.ids, skip_special_tokens=True),
            teacher=row.teacher,
            tokens=len(answer.read_ids),
            teacher_tokens=len(row.read_ids),
            finished=answer.finished,
            row_id=row.row_id,
        )
        for row, group in zip(rollout.rows, rollout.answers, strict=True)
        for answer in group
    ]


def mixed_rewards(
    rewards: RewardSet, rollout: Rollout, scores_PG: torch.Tensor, decode: Callable[..., str], clip: float, log: StepLog
) -> torch.Tensor:
    """The mixed reward [P,G] (see `mix_rewards`); `scores_PG` is the discriminator's entry.

    Logs reward/NAME/{mean, std, share}: mean and within-group standard deviation of the values as given, and the share
    of the advantage's variance, all over every rank's answers (collective).
    """
    values = rewards.score(answer_texts(rollout, decode))
    parts = [Part(_values(spec, values, scores_PG), spec.weight, spec.scale) for spec in rewards.specs]
    mixed_PG, covariances = mix_rewards(parts, clip)
    sums = [float(scores_PG.numel()), float(scores_PG.shape[0])]
    for part, covariance in zip(parts, covariances, strict=True):
        spread = part.values_PG.float().std(-1).sum() if scores_PG.shape[1] > 1 else torch.tensor(0.0)
        sums += [float(part.values_PG.sum()), float(spread), float(covariance)]
    answers, groups, *rest = sum_over_ranks(sums)
    variance = sum(rest[2::3])
    for spec, total, deviation, cov in zip(rewards.specs, rest[::3], rest[1::3], rest[2::3], strict=True):
        log.put(f"reward/{spec.name}/mean", total / answers)
        log.put(f"reward/{spec.name}/std", deviation / groups)
        if variance > 0:
            log.put(f"reward/{spec.name}/share", cov / variance)
    return mixed_PG


def _values(spec: RewardConfig, values: dict[str, list[float]], scores_PG: torch.Tensor) -> torch.Tensor:
    if spec.kind == "discriminator":
        return scores_PG
    return torch.tensor(values[spec.name]).view_as(scores_PG)
