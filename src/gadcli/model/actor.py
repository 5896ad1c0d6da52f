"""The student: its log-probabilities, its supervised update and its policy-gradient update.

Shapes: P prompts on this rank, G answers a prompt, B = P*G rows, T the longest answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gadcli.algo.aggregate import resolve_agg
from gadcli.algo.entropy import entropy_bonus
from gadcli.algo.kl import kl_loss
from gadcli.algo.mean import Mean, add_metrics
from gadcli.algo.mismatch import mismatch_metrics, tis_weights
from gadcli.algo.policy import policy_loss
from gadcli.algo.sft import sft_loss
from gadcli.algo.soda import soda_loss
from gadcli.config.schema import ActorConfig
from gadcli.distributed.fsdp import free_gathered
from gadcli.distributed.world import World, sum_over_ranks
from gadcli.model.loading import adapters_off, without_dropout
from gadcli.model.micro_batches import mini_batches, passes
from gadcli.model.optim import Losses, Optimizer
from gadcli.model.packing import Group, mask_of, to_device, to_padded
from gadcli.model.rollout_batch import Rollout

Metrics = dict[str, Mean]


@dataclass
class Reference:
    """The frozen starting policy: a model of its own, or the actor with its adapters off."""

    model: Any
    adapters: bool

    def off(self) -> AbstractContextManager[None]:
        return adapters_off(self.model) if self.adapters else nullcontext()


class Actor:
    """A causal language model with an optimiser; `model` is sharded, every method is collective."""

    def __init__(
        self, model: Any, optimizer: Optimizer, cfg: ActorConfig, world: World, temperature: float, horizon: int
    ) -> None:
        self.model, self.optimizer, self.cfg, self.world = model, optimizer, cfg, world
        self.temperature, self.horizon = temperature, horizon

    def logprobs(
        self,
        groups: Sequence[Group],
        width: int,
        *,
        temperature: float | None = None,
        reference: Reference | None = None,
    ) -> Tensor:
        """Log-probs [B, width] of the groups' answers on the host, zeros behind each, without gradients.

        At `temperature` (the rollout's by default: the policy that sampled), of the actor or of `reference`.
        """
        model = self.model if reference is None else reference.model
        temperature = self.temperature if temperature is None else temperature
        return answer_logprobs(model, groups, width, temperature, self.cfg.micro_batch_tokens, self.world, reference)

    def old_logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probs [B, T] from before the first update; NaN in the first mini-batch: its own first pass gives them."""
        batches = mini_batches(len(rollout.rows), self.cfg.ppo_mini_batch_size, self.world)
        others = [prompt for batch in batches[1:] for prompt in batch]
        old_BT = torch.full((len(rollout.lengths), rollout.width), torch.nan)
        if others:
            first_rows = len(batches[0]) * len(rollout.answers[0])
            old_BT[first_rows:] = self.logprobs(rollout.select(others).student_groups(), rollout.width)
        return old_BT

    def sft_update(self, groups: Sequence[Group]) -> Metrics:
        """One supervised step on teacher answers; the loss is divided by the teacher tokens of all ranks."""
        (tokens,) = sum_over_ranks([sum(len(g.predicted(a)) for g in groups for a in g.answers)])
        metrics: Metrics = {}
        losses = Losses("the supervised loss")
        for indices, layout, weight in passes(self.model, groups, self.cfg.micro_batch_tokens, self.world):
            logp_N, entropy_N = self.model.answer_logprobs(layout, 1.0)
            width = max(1, max(layout.lengths))
            (mask_BT,) = to_device((mask_of(layout.lengths, width),), self.world.device)
            loss, parts = sft_loss(to_padded(logp_N, layout.lengths, width), mask_BT, tokens)
            losses.add(loss, [groups[i].row_id for i in indices])
            # FSDP averages gradients over ranks; our loss is already a sum over a global denominator.
            (loss * weight * self.world.size).backward()
            if weight:
                entropy = Mean(entropy_N.detach().sum(), float(len(entropy_N)))
                add_metrics(metrics, {**parts, "actor/entropy": entropy})
        return {**metrics, **self._step(groups, losses)}

    def preference_update(self, pairs: Sequence[Group], reference_P2: Tensor) -> Metrics:
        """One SODA step on groups of (teacher's answer, snapshot's answer), over the pairs of all ranks.

        `reference_P2` holds both answers' log-probs under the start model, on the host.
        """
        (count,) = sum_over_ranks([len(pairs)])
        metrics: Metrics = {}
        losses = Losses("the preference loss")
        reference_P2 = reference_P2.to(self.world.device)
        for indices, layout, weight in passes(self.model, pairs, self.cfg.micro_batch_tokens, self.world):
            logp_N, _ = self.model.answer_logprobs(layout, 1.0)
            width = max(1, max(layout.lengths))
            logp_P2 = to_padded(logp_N, layout.lengths, width).float().sum(-1).view(-1, 2)
            (chosen,) = to_device((torch.tensor(indices),), self.world.device)
            ref_P2 = reference_P2[chosen]
            loss, parts = soda_loss(
                logp_P2[:, 0], logp_P2[:, 1], ref_P2[:, 0], ref_P2[:, 1], beta=self.cfg.soda.beta, pairs=count
            )
            losses.add(loss, [pairs[i].row_id for i in indices])
            (loss * weight * self.world.size).backward()
            if weight:
                add_metrics(metrics, parts)
        return {**metrics, **self._step(pairs, losses)}

    def update(self, rollout: Rollout, advantages_PG: Tensor, old_BT: Tensor | None, ref_BT: Tensor | None) -> Metrics:
        """`ppo_epochs` passes over the rollout in mini-batches; returns metrics averaged over all updates.

        `old_BT` may be None where the whole rollout is one mini-batch, and NaN for the first of several: the first pass
        then is the old policy.
        """
        batches = mini_batches(len(rollout.rows), self.cfg.ppo_mini_batch_size, self.world)
        if old_BT is None and len(batches) > 1:
            raise AssertionError("several mini-batches need the log-probs from before the first update")
        old_BT = torch.full((len(rollout.lengths), rollout.width), torch.nan) if old_BT is None else old_BT
        device = self.world.device  # all at once: an upload per micro-batch would make the host wait for each
        given = _Given(
            rollout,
            advantages_PG.to(device).reshape(-1),
            old_BT.to(device),
            None if ref_BT is None else ref_BT.to(device),
            rollout.sampler_logp_BT().to(device),
        )
        metrics: Metrics = {}
        for epoch in range(self.cfg.ppo_epochs):
            for prompts in batches:
                add_metrics(metrics, self._policy_step(given, prompts, first=epoch == 0))
        return metrics

    def _policy_step(self, given: _Given, prompts: list[int], *, first: bool) -> Metrics:
        part = given.rollout.select(prompts)
        groups = part.student_groups()
        lengths = part.lengths
        rows, tokens = sum_over_ranks([sum(n > 0 for n in lengths), sum(lengths)])
        rows, tokens = max(1.0, rows), max(1.0, tokens)  # a rollout of nothing but empty answers is a loss of 0
        metrics: Metrics = {}
        losses = Losses("the policy loss")
        for indices, layout, weight in passes(self.model, groups, self.cfg.micro_batch_tokens, self.world):
            logp_N, entropy_N = self.model.answer_logprobs(layout, self.temperature)
            batch = _Padded.of(given, [prompts[i] for i in indices], layout.lengths, logp_N, entropy_N)
            loss, parts = self._policy_losses(batch, rows, tokens)
            losses.add(loss, [groups[i].row_id for i in indices])
            (loss * weight * self.world.size).backward()
            if weight:
                batch.keep_old()
                if first:
                    parts |= mismatch_metrics(batch.old_BT, batch.pick(given.sampler_BT), batch.mask_BT)
                add_metrics(metrics, parts)
        return {**metrics, **self._step(groups, losses)}

    def _policy_losses(self, batch: _Padded, rows: float, tokens: float) -> tuple[Tensor, Metrics]:
        """Policy loss, KL to the reference and entropy bonus of one micro-batch, over global denominators."""
        cfg = self.cfg
        agg = {"rows": rows, "tokens": tokens, "horizon": float(self.horizon)}
        weights = None
        if cfg.importance_correction == "tis":
            weights = tis_weights(batch.old_BT, batch.pick(batch.given.sampler_BT), batch.mask_BT, cfg.tis_cap)
        loss, metrics = policy_loss(
            cfg.policy_loss.loss_mode, batch.logp_BT, batch.old_BT, batch.advantages_B, batch.mask_BT,
            clip_low=cfg.clip_ratio_low, clip_high=cfg.clip_ratio_high, clip_c=cfg.clip_ratio_c,
            agg=cfg.loss_agg_mode, weights_BT=weights, **agg,
        )  # fmt: skip
        same_agg = resolve_agg(cfg.policy_loss.loss_mode, cfg.loss_agg_mode)  # all terms weigh tokens alike
        bonus, parts = entropy_bonus(batch.entropy_BT, batch.mask_BT, agg=same_agg, **agg)
        metrics |= parts
        if cfg.entropy_coeff:
            loss = loss + cfg.entropy_coeff * bonus
        if cfg.use_kl_loss and batch.given.ref_BT is not None:
            ref_BT = batch.pick(batch.given.ref_BT)
            kl, parts = kl_loss(cfg.kl_loss_type, batch.logp_BT, ref_BT, batch.mask_BT, agg=same_agg, **agg)
            loss, metrics = loss + cfg.kl_loss_coef * kl, metrics | parts
        return loss, metrics

    def _step(self, groups: Sequence[Group], losses: Losses) -> Metrics:
        done = self.optimizer.step("actor", [group.row_id for group in groups], losses)
        return {f"actor/{name}": Mean(value, 1.0) for name, value in done.items()}


@dataclass(frozen=True)
class _Given:
    """What an update is given, all rows on the device. `old_BT` is NaN where the first pass is the old policy."""

    rollout: Rollout
    advantages_B: Tensor
    old_BT: Tensor
    ref_BT: Tensor | None
    sampler_BT: Tensor


@dataclass(frozen=True)
class _Padded:
    """One micro-batch's answers as [B, T] on the device, with the way back to the rollout's rows."""

    given: _Given
    rows_B: Tensor  # the rollout's row of each of ours
    logp_BT: Tensor
    old_BT: Tensor
    entropy_BT: Tensor
    mask_BT: Tensor

    @staticmethod
    def of(given: _Given, prompts: list[int], lengths: list[int], logp_N: Tensor, entropy_N: Tensor) -> _Padded:
        width = max(1, max(lengths))
        group = len(given.rollout.answers[0])
        rows = torch.tensor([p * group + g for p in prompts for g in range(group)])
        rows_B, mask_BT = to_device((rows, mask_of(lengths, width)), logp_N.device)
        logp_BT = to_padded(logp_N, lengths, width)
        old_BT = given.old_BT[rows_B, :width]
        old_BT = torch.where(old_BT.isnan(), logp_BT.detach(), old_BT)
        return _Padded(given, rows_B, logp_BT, old_BT, to_padded(entropy_N, lengths, width), mask_BT)

    def pick(self, all_BT: Tensor) -> Tensor:
        """Our rows of a rollout-wide tensor."""
        return all_BT[self.rows_B, : self.mask_BT.shape[1]]

    @property
    def advantages_B(self) -> Tensor:
        return self.given.advantages_B[self.rows_B]

    def keep_old(self) -> None:
        self.given.old_BT[self.rows_B, : self.old_BT.shape[1]] = self.old_BT


@torch.no_grad()
def answer_logprobs(
    model: Any,
    groups: Sequence[Group],
    width: int,
    temperature: float,
    max_tokens: int,
    world: World,
    reference: Reference | None = None,
) -> Tensor:
    """Log-probs [B, width] of the groups' answers in (group, answer) order, on the host."""
    first_row = [0]
    for group in groups:
        first_row.append(first_row[-1] + len(group.answers))
    out_BT = torch.zeros(first_row[-1], width, device=world.device)  # read once: a copy back waits for the device
    with without_dropout(model), reference.off() if reference is not None else nullcontext():
        for indices, layout, weight in passes(model, groups, max_tokens, world):
            logp_N, _ = model.answer_logprobs(layout, temperature)
            if weight:
                rows = [row for i in indices for row in range(first_row[i], first_row[i + 1])]
                (rows_B,) = to_device((torch.tensor(rows),), world.device)
                out_BT[rows_B] = to_padded(logp_N, layout.lengths, width)
        # Before adapters come back on: peft switches gradients off and on, on the parameters that are in place then.
        free_gathered(model)
    return out_BT.cpu()
