"""Which forward passes a step makes, counted by hooks on each model's first layer: none that another has given already.

Pinned here, for 4 prompts of 2 answers each: with one mini-batch one pass of the student and one of the critic a step ·
with two, old log-probs and scores are computed for the second alone · the teacher's text goes through the critic once a
prompt · the reference runs once a step where a KL asks for it, and does not exist at a coefficient of 0 · nothing of
the student runs while the critic learns alone, and no sync where no weight has moved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gadcli.model.rollout_batch import Rollout
from gadcli.train.build import close_run
from gadcli.train.run import Run
from gadcli.train.stages import learn_from, roll_out
from gadcli.train.steplog import StepLog
from train.in_process import begin

pytestmark = pytest.mark.usefixtures("left_as_it_was")

SMALL = ["trainer.test_freq=0", "data.train_batch_size=4", "data.val_files=[]"]


class Counted:
    """Tokens of every forward pass through a model, with and without gradients."""

    def __init__(self, model: Any) -> None:
        self.learning: list[int] = []
        self.looking: list[int] = []
        model.model.layers[0].register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        (self.learning if torch.is_grad_enabled() else self.looking).append(hidden.shape[0] * hidden.shape[1])


def tokens(rollout: Rollout, prompts: list[int], *, teacher: bool = False) -> int:
    """Of a packed row: every prompt once, its answers behind it."""
    part = rollout.select(prompts)
    groups = part.pair_groups() if teacher else part.student_groups()
    return sum(group.n_tokens for group in groups)


def one_step(run: Run, step: int = 1) -> tuple[Rollout, Counted, Counted]:
    """(answers, the student's passes, the critic's passes) of the learning of one step."""
    log = StepLog(step)
    rollout = roll_out(run, run.rows_of(step), log)
    actor, critic = Counted(run.actor.model), Counted(run.critic.model)
    learn_from(run, rollout, log)
    run.progress.step = step
    return rollout, actor, critic


ALL, FIRST, SECOND = [0, 1, 2, 3], [0, 1], [2, 3]


def test_one_mini_batch_is_one_pass_of_each_model(inputs: Path, tmp_path: Path) -> None:
    run = begin(tmp_path / "run", inputs, *SMALL)
    rollout, actor, critic = one_step(run)
    assert (actor.looking, actor.learning) == ([], [tokens(rollout, ALL)])
    assert (critic.looking, critic.learning) == ([], [tokens(rollout, ALL, teacher=True)])
    close_run(run)


def test_the_teachers_text_and_the_prompt_go_through_the_critic_once_a_prompt(inputs: Path, tmp_path: Path) -> None:
    run = begin(tmp_path / "run", inputs, *SMALL)
    rollout, _, critic = one_step(run)
    answers = sum(rollout.lengths)
    once = sum(len(row.prompt_ids) + len(row.teacher_ids) for row in rollout.rows)
    assert critic.learning == [answers + once]
    close_run(run)


def test_with_several_mini_batches_only_those_behind_the_first_are_looked_at_before(
    inputs: Path, tmp_path: Path
) -> None:
    two = ["actor.ppo_mini_batch_size=2", "critic.ppo_mini_batch_size=2", "actor.ppo_epochs=2"]
    run = begin(tmp_path / "run", inputs, *SMALL, *two)
    rollout, actor, critic = one_step(run)
    parts = [tokens(rollout, FIRST), tokens(rollout, SECOND)]
    assert actor.looking == [parts[1]] and actor.learning == parts * 2
    pairs = [tokens(rollout, FIRST, teacher=True), tokens(rollout, SECOND, teacher=True)]
    assert critic.looking == [pairs[1]] and critic.learning == pairs
    close_run(run)


def test_old_logprobs_are_those_from_before_the_first_update_in_every_mini_batch(inputs: Path, tmp_path: Path) -> None:
    """The second mini-batch is off-policy in its first pass: its ratio is not 1, where a pass then would say 1."""
    run = begin(tmp_path / "run", inputs, *SMALL, "actor.ppo_mini_batch_size=2", "actor.optim.lr=1e-2")
    rollout = roll_out(run, run.rows_of(1), StepLog(1))
    before = run.actor.logprobs(rollout.student_groups(), rollout.width)
    old = run.actor.old_logprobs(rollout)
    rows = len(FIRST) * len(rollout.answers[0])
    assert old[:rows].isnan().all()
    assert torch.allclose(old[rows:], before[rows:], atol=1e-6)
    advantages = torch.tensor([[1.0, -1.0]] * 4)
    assert abs(run.actor.update(rollout, advantages, old, None)["actor/ppo_kl"].value) > 1e-4
    assert torch.allclose(old, before, atol=1e-5)  # the first mini-batch's own pass has filled its part in
    close_run(run)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        (["actor.use_kl_loss=true"], 1),
        (["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef=0.1"], 1),
        (["actor.use_kl_loss=true", "algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef=0.1"], 1),
        (["actor.use_kl_loss=true", "actor.kl_loss_coef=0"], None),
        (["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef=0"], None),
        (["algorithm.kl_ctrl.kl_coef=0.1"], None),  # inert: nobody asks for it
    ],
)
def test_the_reference_runs_once_where_a_kl_asks_for_it_and_does_not_exist_at_0(
    settings: list[str], passes: int | None, inputs: Path, tmp_path: Path
) -> None:
    run = begin(tmp_path / "run", inputs, *SMALL, *settings)
    if passes is None:
        assert run.reference is None
        _, actor, _ = one_step(run)
        assert actor.looking == []
    else:
        assert run.reference is not None
        reference = Counted(run.reference.model)
        rollout, actor, _ = one_step(run)
        assert reference.looking == [tokens(rollout, ALL)] * passes and reference.learning == []
        in_reward = "algorithm.use_kl_in_reward=true" in settings  # which needs the old log-probs before the update
        assert actor.looking == ([tokens(rollout, ALL)] if in_reward else [])
    close_run(run)


def test_while_the_critic_learns_alone_no_pass_of_the_student_is_made_and_no_weight_is_sent(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(tmp_path / "run", inputs, *SMALL, "trainer.critic_warmup=2", "actor.use_kl_loss=true", stage="warmup")
    one_step(run)
    monkeypatch.setattr(run.sampler, "load", lambda model: pytest.fail("weights that have not moved were sent"))
    _, actor, critic = one_step(run, step=2)
    assert actor.looking == actor.learning == []
    assert critic.looking == [] and len(critic.learning) == 1
    close_run(run)
