"""The discriminator: scores of texts, and its update on (teacher, student) pairs.

Shapes: P prompts on this rank, G student answers a prompt, N = P*G pairs, T the longest answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gadcli.algo.discriminator import discriminator_loss, gradient_penalty
from gadcli.algo.mean import Mean, add_metrics
from gadcli.algo.scores import scores
from gadcli.config.schema import CriticConfig
from gadcli.distributed.fsdp import free_gathered, kept_gathered, resolve_dtype
from gadcli.distributed.world import World, sum_over_ranks
from gadcli.model.micro_batches import mini_batches, passes
from gadcli.model.optim import Losses, Optimizer
from gadcli.model.packing import Group, Layout, mask_of, to_device, to_padded
from gadcli.model.rollout_batch import Rollout

Metrics = dict[str, Mean]


@dataclass(frozen=True)
class Scores:
    """Raw scores from before a step's update: the students' [P, G] (the actor's reward) and the teacher's [P]."""

    student_PG: Tensor
    teacher_P: Tensor

    @staticmethod
    def of(pairs_PG1: Tensor) -> Scores:
        """From scores of pair groups, in which the teacher's answer stands last."""
        return Scores(pairs_PG1[:, :-1], pairs_PG1[:, -1])


class Critic:
    """A backbone with a scalar head and an optimiser; `model` is sharded, every method is collective."""

    def __init__(self, model: Any, optimizer: Optimizer, cfg: CriticConfig, world: World) -> None:
        self.model, self.optimizer, self.cfg, self.world = model, optimizer, cfg, world
        self.precision = torch.finfo(resolve_dtype(cfg.model.dtype, world.device)).eps  # of the scores, relative
        self.numbers: dict[str, float] = {}
        if cfg.loss != "original":
            self.numbers = dataclasses.asdict(getattr(cfg, cfg.loss))

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> list[Tensor]:
        """Raw scores of each group's answers (one host tensor a group, in answer order), without gradients."""
        out: list[Tensor] = [torch.empty(0)] * len(groups)
        for indices, layout, weight in passes(self.model, groups, self.cfg.micro_batch_tokens, self.world):
            chosen = [groups[i] for i in indices]
            raw_B, _ = self._pool(self.model.answer_values(layout), layout, chosen)
            if weight:
                for i, raw in zip(indices, torch.split(raw_B, [len(group.answers) for group in chosen]), strict=True):
                    out[i] = raw
        free_gathered(self.model)
        # One copy back for all: each would wait for the device.
        return list(torch.split(torch.cat(out).cpu(), [len(raw) for raw in out]))

    def score_and_update(self, rollout: Rollout) -> tuple[Scores, Metrics]:
        """(scores from before the update, metrics): one update a mini-batch of prompts.

        The first mini-batch's scores are those of its own update's forward pass, before which nothing has changed; a
        pass of their own is made for the others alone.
        """
        batches = mini_batches(len(rollout.rows), self.cfg.ppo_mini_batch_size, self.world)
        prompts = [prompt for batch in batches[1:] for prompt in batch]
        others = self.score(rollout.select(prompts).pair_groups()) if prompts else []
        seen, metrics = self._learn(rollout, batches)
        if others:
            seen[len(batches[0]) :] = torch.stack(others)
        return Scores.of(seen), metrics

    def _learn(self, rollout: Rollout, batches: list[list[int]]) -> tuple[Tensor, Metrics]:
        """One update a mini-batch; each pair's scores as its own update saw them."""
        metrics: Metrics = {}
        seen = torch.zeros(len(rollout.rows), len(rollout.answers[0]) + 1)
        for prompts in batches:
            add_metrics(metrics, self._step(rollout, prompts, seen))
        return seen, metrics

    def _step(self, rollout: Rollout, prompts: list[int], seen: Tensor) -> Metrics:
        groups = rollout.select(prompts).pair_groups()
        pairs, prompts_all = sum_over_ranks([sum(len(group.answers) - 1 for group in groups), len(groups)])
        metrics: Metrics = {}
        losses = Losses("the discriminator loss")
        scored: list[tuple[list[int], Tensor]] = []
        for indices, layout, weight in passes(self.model, groups, self.cfg.micro_batch_tokens, self.world):
            values_N, embeds_RLH = self._values(layout)
            raw_B, norm_B = self._pool(values_N, layout, [groups[i] for i in indices])
            raw, norm = raw_B.view(len(indices), -1), norm_B.view(len(indices), -1)  # the teacher's is the last
            student, teacher = raw[:, :-1], raw[:, -1:].expand(-1, raw.shape[1] - 1)
            loss, parts = discriminator_loss(
                self.cfg.loss,
                teacher.flatten(),
                norm[:, -1:].expand_as(teacher).flatten(),
                student.flatten(),
                norm[:, :-1].flatten(),
                self.numbers,
                label_smoothing=self.cfg.label_smoothing,
                centring=self.cfg.centring,
                pairs=pairs,
            )
            if embeds_RLH is not None:
                penalty, more = self._penalty(raw[:, -1], embeds_RLH, prompts_all)
                loss, parts = loss + penalty, parts | more
            losses.add(loss, [groups[i].row_id for i in indices])
            (loss * weight * self.world.size).backward()
            if weight:
                scored.append(([prompts[i] for i in indices], raw.detach()))
                add_metrics(metrics, parts)
        done = self.optimizer.step("critic", [group.row_id for group in groups], losses)
        seen[[prompt for some, _ in scored for prompt in some]] = torch.cat([raw for _, raw in scored]).cpu()
        return {**metrics, **{f"critic/{name}": Mean(value, 1.0) for name, value in done.items()}}

    def _values(self, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """The value at every answer token, and the input embeddings where a gradient penalty will ask for them."""
        if self.cfg.gradient_penalty:
            values_N, embeds_RLH = self.model.answer_values_and_embeds(layout)
            return values_N, embeds_RLH
        return self.model.answer_values(layout), None

    def _penalty(self, teacher_R: Tensor, embeds_RLH: Tensor, rows: float) -> tuple[Tensor, Metrics]:
        """R1 on the teacher's text alone: a packed row's other texts are there, but no teacher sees them."""
        with kept_gathered(self.model):
            loss, metrics = gradient_penalty(teacher_R, embeds_RLH, weight=self.cfg.gradient_penalty, rows=rows)
        # One packed row holds several teachers' texts: their squares are summed there, and are as many as the teachers.
        return loss, {name: dataclasses.replace(mean, count=float(len(teacher_R))) for name, mean in metrics.items()}

    def _pool(self, values_N: Tensor, layout: Layout, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """(raw, norm) scores of every answer in the layout, which holds these groups.

        Equal answers of a group get the first one's score: computed at two places of a row they differ by rounding,
        in bf16 enough to pass for an advantage.
        """
        width = max(1, max(layout.lengths))
        twins = first_twins(groups)
        mask_BT, twin_B = to_device((mask_of(layout.lengths, width), torch.tensor(twins)), values_N.device)
        raw_B, norm_B = scores(to_padded(values_N, layout.lengths, width), mask_BT, self.cfg.values)
        if twins == list(range(len(twins))):
            return raw_B, norm_B
        return raw_B[twin_B], norm_B[twin_B]


def first_twins(groups: Sequence[Group]) -> list[int]:
    """For each answer of the groups, in order, the number of the first in its group with the same tokens."""
    twins: list[int] = []
    for group in groups:
        first, known = len(twins), dict[tuple[int, ...], int]()
        twins += [known.setdefault(tuple(answer), first + place) for place, answer in enumerate(group.answers)]
    return twins
