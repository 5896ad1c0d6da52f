"""A Run: what a stage trains with, and what happens around each step (order, rollouts, records, eval, saves)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gadcli.chat.thinking import AnswerReader
from gadcli.config.schema import GadConfig
from gadcli.data.batches import Dataset, TokenizedRow
from gadcli.data.order import BatchOrder
from gadcli.distributed.signals import StopFlag
from gadcli.distributed.watchdog import WATCHDOG
from gadcli.distributed.world import World, sum_over_ranks
from gadcli.model.actor import Actor, Reference
from gadcli.model.critic import Critic
from gadcli.model.micro_batches import balanced_share
from gadcli.model.packing import Group
from gadcli.model.rollout_batch import Answer, Rollout
from gadcli.rewards.build import RewardSet
from gadcli.rollout.sampler import Sampler, Sampling, request_seed
from gadcli.rollout.weight_sync import Probe
from gadcli.train.async_save import BackgroundSaver
from gadcli.train.records import Records
from gadcli.train.steplog import StepLog


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    total_steps: int = 0
    train_seconds: float = 0.0
    released_at: int | None = None  # the step after which the actor learns, when held-out d_acc ended the warm-up
    last_eval: dict[str, float] = field(default_factory=dict)
    last_eval_step: int = -1
    best: float | None = None  # of trainer.keep_best over the evaluations so far
    evals_since_best: int = 0
    last_saved_step: int = -1


@dataclass(kw_only=True)
class Run:
    """One stage in training. `critic`, `reference` and `sampler` exist where the stage needs them."""

    cfg: GadConfig
    run_dir: Path
    world: World
    tokenizer: Any
    eos_ids: list[int]
    train_data: Dataset
    val_data: Dataset | None
    order: BatchOrder
    actor: Actor
    sampler: Sampler | None
    probe: Probe
    records: Records
    stop: StopFlag
    progress: Progress
    read: AnswerReader
    reference: Reference | None = None
    maybe_critic: Critic | None = None
    model_files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by role: what lies beside its weights
    synced_step: int = -1
    rewards: RewardSet | None = None  # where `rewards` is configured; the discriminator alone otherwise
    unhealthy: bool = False
    saver: BackgroundSaver = field(default_factory=BackgroundSaver)

    @property
    def critic(self) -> Critic:
        assert self.maybe_critic is not None, "this stage has no critic"
        return self.maybe_critic

    @property
    def several_mini_batches(self) -> bool:
        size = self.cfg.actor.ppo_mini_batch_size
        return 0 < size < self.cfg.data.train_batch_size

    def actor_learns(self, step: int) -> bool:
        """Steps 1..critic_warmup teach the critic only, unless held-out d_acc released the actor before."""
        released = self.progress.released_at
        return step > self.cfg.trainer.critic_warmup or (released is not None and step > released)

    def rows_of(self, step: int) -> list[TokenizedRow]:
        """This rank's rows of a step, each with one of the teacher's answers, by the run's seed and the step."""
        rows = [self.train_data.answer(i, self._draw(step, i)) for i in self.order.rows(step - 1)]
        return [self.with_read(rows[i]) for i in self._share(rows)]

    def _draw(self, step: int, item: int) -> int:
        """Which of several answers the critic meets; without a critic it is the first one, or every one is an item."""
        several = self.maybe_critic is not None and self.train_data.several_answers
        return request_seed(self.cfg.trainer.seed, step, item) if several else 0

    def with_read(self, row: TokenizedRow) -> TokenizedRow:
        """The row with what the discriminator reads of the teacher's answer (`critic.reads`)."""
        read = self.read(row.prompt_ids, row.teacher_ids)
        return row if read is row.teacher_ids else replace(row, read=read)

    def read_groups(self, rows: Sequence[TokenizedRow], groups: Sequence[Sequence[Answer]]) -> list[list[Answer]]:
        """The same of sampled answers."""
        return [
            [replace(answer, read=self.read(row.prompt_ids, answer.ids)) for answer in group]
            for row, group in zip(rows, groups, strict=True)
        ]

    def _share(self, rows: list[TokenizedRow]) -> list[int]:
        """This rank's rows: like counts and like tokens, the teacher's length standing in for the student's."""
        answers = self.cfg.rollout.n + 1
        if self.cfg.stage == "seqkd":
            answers = 2 if self.cfg.actor.objective == "soda" else 1
        tokens = [len(row.prompt_ids) + answers * len(row.teacher_ids) for row in rows]
        return balanced_share(
            tokens, self.world, math.gcd(self.cfg.actor.ppo_mini_batch_size, self.cfg.critic.ppo_mini_batch_size)
        )

    def on_phase(self, phase: str, step: int) -> None:
        """A phase begins: for the watchdog of this process and for whoever watches the run."""
        WATCHDOG.enter(phase, step)
        self.records.status(phase, step)

    def sync_sampler(self, step: int, log: StepLog) -> None:
        """Bring the actor's weights to the sampler and prove, on a fixed text, that it runs them."""
        assert self.sampler is not None
        if not self.actor_has_moved():
            return
        self.sampler.load(self.actor.model)
        if self.synced_step < 0 and self.sampler.unproved:
            names = ", ".join(self.sampler.unproved[:3])
            note = f"{len(self.sampler.unproved)} weights are not compared after a sync, only probed: {names}"
            self.records.event("note", note, level="warn", step=step)
        sampler_logp = self.sampler.logprobs(self.probe.ids)
        group = Group(self.probe.ids[:1], [self.probe.ids[1:]])
        actor_logp = self.actor.logprobs([group], len(self.probe.ids) - 1, temperature=1.0)[0].tolist()
        log.put("rollout/sync_probe", self.probe.check(actor_logp, sampler_logp, step))
        self.synced_step = self.actor.optimizer.updates

    def actor_has_moved(self) -> bool:
        """Whether the actor has been updated since the sampler last took its weights."""
        return self.synced_step != self.actor.optimizer.updates

    def roll_out(self, rows: list[TokenizedRow], step: int, log: StepLog) -> Rollout:
        """`rollout.n` answers to each prompt, from seeds that the run's seed, the step and the row alone decide."""
        assert self.sampler is not None
        start = time.monotonic()
        sampling = Sampling.of(self.cfg.rollout, self.cfg.data.max_response_length)
        seeds = [request_seed(self.cfg.trainer.seed, step, row.row_id) for row in rows]
        groups = self.sampler.generate([row.prompt_ids for row in rows], sampling, seeds)
        rollout = Rollout(rows, self.read_groups(rows, groups))
        self.sampler.sleep()
        (tokens,) = sum_over_ranks([sum(rollout.lengths)])
        log.put("rollout/tokens_per_s", tokens / max(time.monotonic() - start, 1e-9))
        return rollout
