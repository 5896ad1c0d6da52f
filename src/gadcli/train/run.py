"""A Run: what a stage trains with, and what happens around each step (order, rollouts, records, eval, saves)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gadcli.config.schema import GadConfig
from gadcli.data.batches import Dataset, TokenizedRow
from gadcli.data.order import BatchOrder
from gadcli.engine.accumulate import balanced_share
from gadcli.engine.actor import Actor, Reference
from gadcli.engine.background import BackgroundSaver
from gadcli.engine.critic import Critic, Scores
from gadcli.engine.dist import World, max_over_ranks, sum_over_ranks
from gadcli.engine.layout import Group
from gadcli.engine.rollout import Sampler, Sampling, request_seed
from gadcli.engine.rows import Rollout
from gadcli.engine.sync import Probe
from gadcli.engine.watchdog import WATCHDOG
from gadcli.train.evaluation import evaluate
from gadcli.train.measure import host_metrics, length_metrics
from gadcli.train.records import Records
from gadcli.train.saving import collect, save
from gadcli.train.steplog import StepLog
from gadcli.train.stopping import StopFlag

if TYPE_CHECKING:
    from gadcli.train.overlap import Ahead


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    total_steps: int = 0
    train_seconds: float = 0.0
    released_at: int | None = None  # the step after which the actor learns, when held-out d_acc ended the warm-up
    last_eval: dict[str, float] = field(default_factory=dict)
    last_eval_step: int = -1
    last_saved_step: int = -1


@dataclass
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
    reference: Reference | None = None
    maybe_critic: Critic | None = None
    synced_step: int = -1
    ahead: Ahead | None = None  # the next step's answers, where trainer.overlap has drawn them already
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

    def steps(self) -> Iterator[tuple[int, list[TokenizedRow]]]:
        """(step from 1, this rank's rows), from after the last save until the end, a stop or the time limit."""
        while self.progress.step < self.progress.total_steps:
            step = self.progress.step + 1
            yield step, self.rows_of(step)
            if self._asked_to_stop():
                return

    def rows_of(self, step: int) -> list[TokenizedRow]:
        """This rank's rows of a step."""
        rows = [self.train_data[i] for i in self.order.rows(step - 1)]
        return [rows[i] for i in self._share(rows)]

    def _share(self, rows: list[TokenizedRow]) -> list[int]:
        """This rank's rows: like counts and like tokens, the teacher's length standing in for the student's."""
        answers = 1 if self.cfg.stage == "seqkd" else self.cfg.rollout.n + 1
        tokens = [len(row.prompt_ids) + answers * len(row.teacher_ids) for row in rows]
        return balanced_share(
            tokens, self.world, math.gcd(self.cfg.actor.ppo_mini_batch_size, self.cfg.critic.ppo_mini_batch_size)
        )

    def _asked_to_stop(self) -> bool:
        """Agreed by all ranks, since a signal, the clock or an alarm may reach one before the others."""
        limit = self.cfg.trainer.max_time_s
        out_of_time = bool(limit) and self.progress.train_seconds >= limit
        self.unhealthy = max_over_ranks(float(self.records.alarm is not None)) > 0
        asked = max_over_ranks(2.0 if self.stop.number or self.unhealthy else float(out_of_time))
        if asked == 1.0:
            self.records.event("note", f"trainer.max_time_s={limit:g} is used up", step=self.progress.step)
        return asked > 0

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
        sampler_logp = self.sampler.logprobs(self.probe.ids)
        group = Group(self.probe.ids[:1], [self.probe.ids[1:]])
        actor_logp = self.actor.logprobs([group], len(self.probe.ids) - 1, temperature=1.0)[0].tolist()
        log.put("rollout/sync_probe", self.probe.check(actor_logp, sampler_logp, step))
        self.synced_step = self.actor.optimizer.updates

    def actor_has_moved(self) -> bool:
        """Whether the actor has been updated since the sampler last took its weights."""
        return self.synced_step != self.actor.optimizer.updates

    def roll_out(self, rows: list[TokenizedRow], step: int, log: StepLog) -> Rollout:
        """`rollout.n` answers to each prompt."""
        assert self.sampler is not None
        start = time.monotonic()
        rollout = self.draw(rows, step)
        self.sampler.rest()
        (tokens,) = sum_over_ranks([sum(rollout.lengths)])
        log.put("rollout/tokens_per_s", tokens / max(time.monotonic() - start, 1e-9))
        return rollout

    def draw(self, rows: list[TokenizedRow], step: int) -> Rollout:
        """Answers from seeds that only run seed, step and row decide, whenever and beside whatever they are drawn."""
        assert self.sampler is not None
        sampling = Sampling.of(self.cfg.rollout, self.cfg.data.max_response_length)
        seeds = [request_seed(self.cfg.trainer.seed, step, row.row_id) for row in rows]
        return Rollout(rows, self.sampler.generate([row.prompt_ids for row in rows], sampling, seeds))

    def finish_step(
        self, log: StepLog, rows: list[TokenizedRow], rollout: Rollout | None = None, scores: Scores | None = None
    ) -> None:
        """Reduce once, write, evaluate, save."""
        log.add(length_metrics(rows, rollout, self.cfg.data.max_response_length))
        self.progress.step = log.step
        tokens = sum(len(row.prompt_ids) + len(row.teacher_ids) for row in rows)
        if rollout is not None:
            tokens += sum(rollout.lengths)
        seconds = time.monotonic() - log.started
        # The clock that max_time_s reads must be one for all ranks and survive a resume.
        self.progress.train_seconds += max_over_ranks(seconds)
        (all_tokens,) = sum_over_ranks([tokens])
        log.put("perf/tokens_per_s", all_tokens / seconds)
        for name, value in host_metrics(self.world.device).items():
            log.put(name, value)
        self.records.step(log, epoch=log.step / self.order.steps_per_epoch)
        self.records.train_sample(self, rollout, scores)
        self._eval_and_save(log.step)

    def _eval_and_save(self, step: int) -> None:
        trainer = self.cfg.trainer
        collect(self)
        if trainer.test_freq and step % trainer.test_freq == 0:
            self.evaluate()
        if (trainer.save_freq and step % trainer.save_freq == 0) or max_over_ranks(
            float(self.stop.take_save_request())
        ):
            save(self)

    def evaluate(self) -> None:
        """Sample and score the held-out rows, once a step at most; may release the actor (critic_warmup_until)."""
        if self.val_data is None or self.progress.last_eval_step == self.progress.step:
            return
        self.progress.last_eval = evaluate(self)
        self.progress.last_eval_step = self.progress.step
        wanted, d_acc = self.cfg.trainer.critic_warmup_until, self.progress.last_eval.get("val/d_acc", 0.0)
        if wanted and d_acc >= wanted and not self.actor_learns(self.progress.step + 1):
            self.progress.released_at = self.progress.step
            self.records.event(
                "note",
                f"held-out d_acc {d_acc:.3f} >= {wanted:g}: the actor learns from now on",
                step=self.progress.step,
            )

    def finish(self) -> None:
        """The end of the steps: a last evaluation (unless interrupted) and a last checkpoint.

        Raises UnhealthyError, after saving, where health.on_bad=stop ended the run.
        """
        if not self.stop.number and not self.unhealthy:
            self.evaluate()
        save(self)
        collect(self, wait=True)
        if self.unhealthy:
            raise self.records.as_error()
