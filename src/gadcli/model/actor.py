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
from gadcli.model.optim import Optimizer, non_finite
from gadcli.model.packing import Group, mask_of, to_padded
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
        for indices, layout, weight in passes(self.model, groups, self.cfg.micro_batch_tokens, self.world):
            logp_N, entropy_N = self.model.answer_logprobs(layout, 1.0)
            width = max(1, max(layout.lengths))
            mask_BT = mask_of(layout.lengths, width).to(self.world.device)
            loss, parts = sft_loss(to_padded(logp_N, layout.lengths, width), mask_BT, tokens)
            _check_finite(loss, "the supervised loss", [groups[i].row_id for i in indices])
            # FSDP averages gradients over ranks; our loss is already a sum over a global denominator.
            (loss * weight * self.world.size).backward()
            if weight:
                entropy = Mean(entropy_N.detach().sum(), float(len(entropy_N)))
                add_metrics(metrics, {**parts, "actor/entropy": entropy})
        return {**metrics, **self._step([group.row_id for group in groups])}

    def preference_update(self, pairs: Sequence[Group], reference_P2: Tensor) -> Metrics:
        """One SODA step on groups of (teacher's answer, snapshot's answer), over the pairs of all ranks.

        `reference_P2` holds both answers' log-probs under the start model, on the host.
        """
        (count,) = sum_over_ranks([len(pairs)])
        metrics: Metrics = {}
        for indices, layout, weight in passes(self.model, pairs, self.cfg.micro_batch_tokens, self.world):
            logp_N, _ = self.model.answer_logprobs(layout, 1.0)
            width = max(1, max(layout.lengths))
            logp_P2 = to_padded(logp_N, layout.lengths, width).float().sum(-1).view(-1, 2)
            ref_P2 = reference_P2[indices].to(logp_P2.device)
            loss, parts = soda_loss(
                logp_P2[:, 0], logp_P2[:, 1], ref_P2[:, 0], ref_P2[:, 1], beta=self.cfg.soda.beta, pairs=count
            )
            _check_finite(loss, "the preference loss", [pairs[i].row_id for i in indices])
            (loss * weight * self.world.size).backward()
            if weight:
                add_metrics(metrics, parts)
        return {**metrics, **self._step([group.row_id for group in pairs])}

    def update(self, rollout: Rollout, advantages_PG: Tensor, old_BT: Tensor | None, ref_BT: Tensor | None) -> Metrics:
        """`ppo_epochs` passes over the rollout in mini-batches; returns metrics averaged over all updates.

        `old_BT` may be None where the whole rollout is one mini-batch, and NaN for the first of several: the first pass
        then is the old policy.
        """
        batches = mini_batches(len(rollout.rows), self.cfg.ppo_mini_batch_size, self.world)
        if old_BT is None and len(batches) > 1:
            raise AssertionError("several mini-batches need the log-probs from before the first update")
        old_BT = torch.full((len(rollout.lengths), rollout.width), torch.nan) if old_BT is None else old_BT
        metrics: Metrics = {}
        for epoch in range(self.cfg.ppo_epochs):
            for prompts in batches:
                parts = self._policy_step(rollout, prompts, advantages_PG, old_BT, ref_BT, first=epoch == 0)
                add_metrics(metrics, parts)
        return metrics

    def _policy_step(
        self,
        rollout: Rollout,
        prompts: list[int],
        advantages_PG: Tensor,
        old_BT: Tensor,
        ref_BT: Tensor | None,
        *,
        first: bool,
    ) -> Metrics:
        part = rollout.select(prompts)
        groups = part.student_groups()
        lengths = part.lengths
        rows, tokens = sum_over_ranks([sum(n > 0 for n in lengths), sum(lengths)])
        rows, tokens = max(1.0, rows), max(1.0, tokens)  # a rollout of nothing but empty answers is a loss of 0
        metrics: Metrics = {}
        for indices, layout, weight in passes(self.model, groups, self.cfg.micro_batch_tokens, self.world):
            chosen = [prompts[i] for i in indices]
            logp_N, entropy_N = self.model.answer_logprobs(layout, self.temperature)
            batch = _Padded.of(rollout, chosen, layout.lengths, logp_N, entropy_N)
            old, own_old = batch.pick(old_BT), batch.logp_BT.detach()
            old = torch.where(old.isnan(), own_old, old)
            loss, parts = self._policy_losses(
                batch,
                advantages_PG[chosen].to(old.device),
                old,
                None if ref_BT is None else batch.pick(ref_BT),
                rows,
                tokens,
            )
            _check_finite(loss, "the policy loss", [groups[i].row_id for i in indices])
            (loss * weight * self.world.size).backward()
            if weight:
                batch.put(old_BT, old)
                if first:
                    parts |= mismatch_metrics(old, batch.pick(rollout.sampler_logp_BT()), batch.mask_BT)
                add_metrics(metrics, parts)
        return {**metrics, **self._step([group.row_id for group in groups])}

    def _policy_losses(
        self, batch: _Padded, advantages_PG: Tensor, old_BT: Tensor, ref_BT: Tensor | None, rows: float, tokens: float
    ) -> tuple[Tensor, Metrics]:
        """Policy loss, KL to the reference and entropy bonus of one micro-batch, over global denominators."""
        cfg = self.cfg
        agg = {"rows": rows, "tokens": tokens, "horizon": float(self.horizon)}
        weights = None
        if cfg.importance_correction == "tis":
            weights = tis_weights(old_BT, batch.pick(batch.rollout.sampler_logp_BT()), batch.mask_BT, cfg.tis_cap)
        loss, metrics = policy_loss(
            cfg.policy_loss.loss_mode, batch.logp_BT, old_BT, advantages_PG.reshape(-1), batch.mask_BT,
            clip_low=cfg.clip_ratio_low, clip_high=cfg.clip_ratio_high, clip_c=cfg.clip_ratio_c,
            agg=cfg.loss_agg_mode, weights_BT=weights, **agg,
        )  # fmt: skip
        same_agg = resolve_agg(cfg.policy_loss.loss_mode, cfg.loss_agg_mode)  # all terms weigh tokens alike
        bonus, parts = entropy_bonus(batch.entropy_BT, batch.mask_BT, agg=same_agg, **agg)
        metrics |= parts
        if cfg.entropy_coeff:
            loss = loss + cfg.entropy_coeff * bonus
        if cfg.use_kl_loss and ref_BT is not None:
            kl, parts = kl_loss(cfg.kl_loss_type, batch.logp_BT, ref_BT, batch.mask_BT, agg=same_agg, **agg)
            loss, metrics = loss + cfg.kl_loss_coef * kl, metrics | parts
        return loss, metrics

    def _step(self, row_ids: list[int]) -> Metrics:
        done = self.optimizer.step("actor", row_ids)
        return {f"actor/{name}": Mean(value, 1.0) for name, value in done.items()}


@dataclass(frozen=True)
class _Padded:
    """One micro-batch's answers as [B, T] on the device, with the way back to the rollout's rows."""

    rollout: Rollout
    rows_B: Tensor  # the rollout's row of each of ours
    logp_BT: Tensor
    entropy_BT: Tensor
    mask_BT: Tensor

    @staticmethod
    def of(rollout: Rollout, prompts: list[int], lengths: list[int], logp_N: Tensor, entropy_N: Tensor) -> _Padded:
        width = max(1, max(lengths))
        group = len(rollout.answers[0])
        rows = torch.tensor([p * group + g for p in prompts for g in range(group)])
        mask_BT = mask_of(lengths, width).to(logp_N.device)
        return _Padded(rollout, rows, to_padded(logp_N, lengths, width), to_padded(entropy_N, lengths, width), mask_BT)

    def pick(self, all_BT: Tensor) -> Tensor:
        """Our rows of a rollout-wide host tensor."""
        return all_BT[self.rows_B, : self.mask_BT.shape[1]].to(self.logp_BT.device)

    def put(self, all_BT: Tensor, values_BT: Tensor) -> None:
        all_BT[self.rows_B, : values_BT.shape[1]] = values_BT.to(all_BT.device)


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
    out_BT = torch.zeros(first_row[-1], width)
    with without_dropout(model), reference.off() if reference is not None else nullcontext():
        for indices, layout, weight in passes(model, groups, max_tokens, world):
            logp_N, _ = model.answer_logprobs(layout, temperature)
            if weight:
                rows = [row for i in indices for row in range(first_row[i], first_row[i + 1])]
                out_BT[rows] = to_padded(logp_N, layout.lengths, width).cpu()
        # Before adapters come back on: peft switches gradients off and on, on the parameters that are in place then.
        free_gathered(model)
    return out_BT


def _check_finite(loss: Tensor, what: str, rows: list[int]) -> None:
    """Names the rows at once; ranks whose own loss is finite learn of it from the gradient norm."""
    if not torch.isfinite(loss.detach()):
        raise non_finite(f"{what} is {float(loss.detach())}", rows)
