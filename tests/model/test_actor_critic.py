"""The actor's and the critic's updates on a tiny model in one process.

Semantics pinned here: an on-policy step has ratio 1 and yet a gradient; how a batch is cut into micro-batches changes
nothing; scores are from before the update; equal text is worth the same and teaches nothing; groups without spread
teach nothing and are counted; empty answers are finite; what is not finite stops the run before any weight moves.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.tensor import DTensor

from gadcli.algo.advantages import group_advantages
from gadcli.config.schema import ModelConfig
from gadcli.distributed.world import World
from gadcli.errors import UnhealthyError
from gadcli.model.rollout_batch import Rollout, teacher_groups
from model.parts import (
    EOS,
    STILL,
    TEMPERATURE,
    build_actor,
    build_critic,
    last_gradient,
    same_answers,
    spread_advantages,
    tiny_rollout,
    values,
    weights,
    worst_relative,
)
from mutants import mutated

ROUNDING = 1e-6  # float32 log-probs of size 10 through two layers
PARITY = 1e-5  # relative, gradients and metrics under another order of summation
HUGE, TINY = 1 << 20, 1  # micro_batch_tokens: all rows at once, one group at a time


# ---- memory ----


def test_a_pass_without_gradients_leaves_no_gathered_weights(world: World, model_path: str) -> None:
    """FSDP2 frees them in the backward pass, which never comes for a reference, and late for the others."""
    rollout = tiny_rollout()
    in_bf16 = ModelConfig(dtype="bfloat16")  # in float32 a world of one is not sharded
    actor, critic = build_actor(world, model_path, model=in_bf16), build_critic(world, model_path, model=in_bf16)
    actor.logprobs(rollout.student_groups(), rollout.width)
    critic.score(rollout.pair_groups())
    for model in (actor.model, critic.model):
        assert all(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)


# ---- on-policy steps ----


def test_an_on_policy_step_has_no_loss_and_no_kl_but_a_gradient(world: World, model_path: str) -> None:
    rollout = tiny_rollout()
    actor = build_actor(world, model_path)
    found = values(actor.update(rollout, spread_advantages(rollout), None, None))
    assert abs(found["actor/pg_loss"]) < ROUNDING  # ratio 1 everywhere: minus the mean advantage, which is 0
    assert found["actor/ppo_kl"] == 0.0
    assert found["actor/pg_clipfrac"] == 0.0
    assert found["actor/grad_norm"] > 0.1


def test_a_second_epoch_is_off_policy(world: World, model_path: str) -> None:
    """The metrics average both epochs: the first adds exactly 0 to ppo_kl, so what is there comes from the second."""
    rollout = tiny_rollout()
    actor = build_actor(world, model_path, ppo_epochs=2)
    found = values(actor.update(rollout, spread_advantages(rollout), None, None))
    assert abs(found["actor/ppo_kl"]) > 1e-4
    assert actor.optimizer.updates == 2


def first_step_kl(world: World, model_path: str, old_temperature: float) -> float:
    """Mean |log ratio| as ppo_kl shows it when old_logp was computed at `old_temperature`."""
    rollout = tiny_rollout()
    actor = build_actor(world, model_path)
    old_BT = actor.logprobs(rollout.student_groups(), rollout.width, temperature=old_temperature)
    return abs(values(actor.update(rollout, spread_advantages(rollout), old_BT, None))["actor/ppo_kl"])


def test_old_logprobs_and_the_first_pass_are_the_same_function_at_temperature_08(world: World, model_path: str) -> None:
    assert first_step_kl(world, model_path, TEMPERATURE) < ROUNDING


def test_a_dropped_temperature_would_show_in_the_first_step(world: World, model_path: str) -> None:
    assert first_step_kl(world, model_path, 1.0) > 1e-2


@pytest.mark.parametrize("objective", ["sft", "policy"])
def test_kl_and_entropy_are_averaged_as_the_policy_loss_is(world: World, model_path: str, objective: str) -> None:
    """`auto` is token-mean for dapo: its gradient with KL and entropy equals that of token-mean spelled out."""
    rollout = tiny_rollout()
    found = {}
    for agg in ("auto", "token-mean", "seq-mean-token-mean"):
        actor = build_actor(world, model_path, optim=STILL, loss_agg_mode=agg, use_kl_loss=True, entropy_coeff=0.3)
        actor.cfg.policy_loss.loss_mode = "dapo"
        ref_BT = actor.logprobs(rollout.student_groups(), rollout.width) + 0.5
        if objective == "sft":
            actor.sft_update(teacher_groups(rollout.rows))
        else:
            actor.update(rollout, torch.zeros(4, 3), None, ref_BT)  # no advantage: KL and entropy alone
        found[agg] = last_gradient(actor)
    assert worst_relative(found["auto"], found["token-mean"]) == 0.0
    assert (worst_relative(found["auto"], found["seq-mean-token-mean"]) > 1e-2) == (objective == "policy")


# ---- micro-batches ----


def policy_step(
    world: World, path: str, budget: int, cls: type | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradient and metrics of one off-policy step with KL and entropy, cut by `budget`."""
    rollout = tiny_rollout(with_empty=True)
    actor = build_actor(
        world, path, *([cls] if cls else []), optim=STILL, micro_batch_tokens=budget, use_kl_loss=True,
        kl_loss_coef=0.1, entropy_coeff=0.05,
    )  # fmt: skip
    old_BT = actor.logprobs(rollout.student_groups(), rollout.width)
    draw = torch.Generator().manual_seed(2)
    ref_BT = old_BT + 0.3 * torch.randn(old_BT.shape, generator=draw)
    old_BT = old_BT + 0.02 * torch.randn(old_BT.shape, generator=draw)
    metrics = actor.update(rollout, spread_advantages(rollout), old_BT, ref_BT)
    return last_gradient(actor), values(metrics)


def sft_step(
    world: World, path: str, budget: int, cls: type | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    actor = build_actor(world, path, *([cls] if cls else []), optim=STILL, micro_batch_tokens=budget)
    metrics = actor.sft_update(teacher_groups(tiny_rollout().rows))
    return last_gradient(actor), values(metrics)


def critic_step(
    world: World, path: str, budget: int, cls: type | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    critic = build_critic(world, path, *([cls] if cls else []), optim=STILL, micro_batch_tokens=budget, loss="final")
    _, metrics = critic.score_and_update(tiny_rollout(with_empty=True))
    return last_gradient(critic), values(metrics)


STEPS = {"policy": policy_step, "sft": sft_step, "critic": critic_step}
# Each mutant divides by what the micro-batch holds, in place of what the step holds.
MEAN_OF_MEANS = {
    "policy": (
        "model.actor", 'agg = {"rows": rows, "tokens": tokens,', 'agg = {"rows": None, "tokens": None,', "Actor",
    ),
    "sft": ("model.actor", "width), mask_BT, tokens)", "width), mask_BT, None)", "Actor"),
    "critic": ("model.critic", "pairs=pairs,", "pairs=None,", "Critic"),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_the_token_budget_changes_neither_gradient_nor_metrics(step: str, world: World, model_path: str) -> None:
    (whole, whole_log), (cut, cut_log) = (STEPS[step](world, model_path, budget) for budget in (HUGE, TINY))
    assert worst_relative(cut, whole) < PARITY
    assert cut_log.keys() == whole_log.keys()
    for name, value in whole_log.items():
        assert cut_log[name] == pytest.approx(value, rel=PARITY, abs=PARITY), name
    assert whole_log[f"{'critic' if step == 'critic' else 'actor'}/grad_norm"] > 1e-3


@pytest.mark.parametrize("step", STEPS)
def test_a_mean_of_means_over_micro_batches_would_be_caught(step: str, world: World, model_path: str) -> None:
    module, old, new, name = MEAN_OF_MEANS[step]
    mutant = getattr(mutated(module, old, new), name)
    whole, cut = (STEPS[step](world, model_path, budget, mutant)[0] for budget in (HUGE, TINY))
    assert worst_relative(cut, whole) > 1000 * PARITY


# ---- supervised ----


def test_the_supervised_loss_is_the_mean_log_softmax_of_teacher_tokens(world: World, model_path: str) -> None:
    """By hand: the model's own forward on each text, log_softmax, the teacher's tokens picked, one mean over all."""
    rows = tiny_rollout().rows
    actor = build_actor(world, model_path, optim=STILL, micro_batch_tokens=TINY)
    total, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = actor.model(input_ids=torch.tensor([row.prompt_ids + row.teacher_ids]), use_cache=False).logits
        logp = torch.log_softmax(logits[0, len(row.prompt_ids) - 1 : -1].float(), -1)
        total -= float(logp[torch.arange(len(row.teacher_ids)), torch.tensor(row.teacher_ids)].sum())
        tokens += len(row.teacher_ids)
    by_hand = total / tokens
    assert values(actor.sft_update(teacher_groups(rows)))["actor/sft_loss"] == pytest.approx(by_hand, rel=PARITY)
    # The mutant: supervised at the sampling temperature.
    cold = "logp_N, entropy_N = self.model.answer_logprobs(layout, 1.0)"
    hot = mutated("model.actor", cold, cold.replace("1.0", "self.temperature")).Actor
    at_08 = values(build_actor(world, model_path, hot, optim=STILL).sft_update(teacher_groups(rows)))
    assert abs(at_08["actor/sft_loss"] - by_hand) > 0.01


# ---- scores ----


@pytest.mark.parametrize("mini", [0, 2])
def test_the_scores_an_update_returns_are_those_from_before_it(mini: int, world: World, model_path: str) -> None:
    rollout = tiny_rollout()
    critic = build_critic(world, model_path, ppo_mini_batch_size=mini, micro_batch_tokens=64)
    before = torch.stack(critic.score(rollout.pair_groups()))
    scores, metrics = critic.score_and_update(rollout)
    assert torch.allclose(scores.student_PG, before[:, :-1], atol=ROUNDING, rtol=PARITY)
    assert torch.allclose(scores.teacher_P, before[:, -1], atol=ROUNDING, rtol=PARITY)
    after = torch.stack(critic.score(rollout.pair_groups()))
    assert float((after - before).abs().max()) > 100 * ROUNDING
    if not mini:  # one pass gave both: d_acc can be had from the scores
        wins = (before[:, -1:] > before[:, :-1]).float().mean()
        assert values(metrics)["critic/d_acc"] == pytest.approx(float(wins))


def test_scores_from_between_two_updates_would_be_caught(world: World, model_path: str) -> None:
    rollout = tiny_rollout()
    mutant = mutated("model.critic", "if others:", "if not others:").Critic
    critic = build_critic(world, model_path, mutant, ppo_mini_batch_size=2)
    before = torch.stack(critic.score(rollout.pair_groups()))
    scores, _ = critic.score_and_update(rollout)
    assert not torch.allclose(scores.student_PG, before[:, :-1], atol=100 * ROUNDING)


@pytest.mark.parametrize("pooling", ["last", "all"])
def test_equal_text_scores_equally_and_teaches_the_critic_nothing(pooling: str, world: World, model_path: str) -> None:
    """-log sigmoid(t - s) pulls t up and s down by 1/2 each: where t and s are one text, the pulls cancel."""
    rollout = tiny_rollout()
    norms = []
    for texts in (same_answers(rollout), rollout):
        critic = build_critic(world, model_path, optim=STILL, values=pooling)
        scores, metrics = critic.score_and_update(texts)
        found = values(metrics)
        norms.append(found["critic/grad_norm"])
        if texts is not rollout:
            spread = scores.student_PG - scores.teacher_P[:, None]
            assert float(spread.abs().max()) < 1e-5
            assert found["critic/d_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert norms[0] < 1e-5 * norms[1]


def test_a_teacher_without_eos_would_be_caught(world: World, model_path: str) -> None:
    """The mutant of the data: the same text, but one side ends with EOS and the other does not."""
    rollout = same_answers(tiny_rollout())
    for row in rollout.rows:
        assert row.teacher_ids.pop() == EOS
    scores, metrics = build_critic(world, model_path, optim=STILL).score_and_update(rollout)
    assert float((scores.student_PG - scores.teacher_P[:, None]).abs().max()) > 1e-2
    assert values(metrics)["critic/grad_norm"] > 1e-2


# ---- nothing to learn from ----


def test_groups_without_spread_teach_nothing_and_are_counted(world: World, model_path: str) -> None:
    rollout = tiny_rollout()
    rewards_PG = torch.tensor([[0.3, 0.3, 0.3], [7.0, 7.0, 7.0], [0.0, 0.0, 0.0], [-2.0, -2.0, -2.0]])
    advantages_PG, spread = group_advantages(rewards_PG, "grpo")
    actor = build_actor(world, model_path, optim=STILL)
    found = values(actor.update(rollout, advantages_PG, None, None))
    assert spread["critic/zero_std_fraction"].value == 1.0
    assert found["actor/grad_norm"] == 0.0
    rewards_PG[1, 0] += 1.0  # one group of four has something to say
    advantages_PG, spread = group_advantages(rewards_PG, "grpo")
    assert spread["critic/zero_std_fraction"].value == 0.75
    assert values(actor.update(rollout, advantages_PG, None, None))["actor/grad_norm"] > 0.01


def test_an_empty_answer_is_finite_and_weighs_nothing(world: World, model_path: str) -> None:
    rollout = tiny_rollout(with_empty=True)
    advantages_PG = spread_advantages(rollout)
    actor, critic = build_actor(world, model_path, optim=STILL), build_critic(world, model_path, optim=STILL)
    found = values(actor.update(rollout, advantages_PG, None, None))
    scores, critic_log = critic.score_and_update(rollout)
    assert all(math.isfinite(v) for v in (found | values(critic_log)).values())
    assert float(scores.student_PG[1, 0]) == 0.0  # a sum over no token
    gradient = last_gradient(actor)
    advantages_PG[1, 0] = 1e6  # the advantage of nothing
    actor.update(rollout, advantages_PG, None, None)
    assert worst_relative(last_gradient(actor), gradient) == 0.0


def test_a_rollout_of_empty_answers_only_is_finite(world: World, model_path: str) -> None:
    whole = tiny_rollout(with_empty=True)
    empty = Rollout(whole.rows[:1], [[whole.answers[1][0]] * 3])
    found = values(build_actor(world, model_path).update(empty, torch.zeros(1, 3), None, None))
    assert found["actor/grad_norm"] == 0.0


# ---- what is not finite ----


def test_a_loss_that_is_not_finite_names_its_rows_and_moves_no_weight(world: World, model_path: str) -> None:
    rollout = tiny_rollout()
    advantages_PG = spread_advantages(rollout)
    advantages_PG[2, 1] = math.inf  # row 102
    actor = build_actor(world, model_path, micro_batch_tokens=TINY)
    before = weights(actor.model)
    with pytest.raises(UnhealthyError, match=r"policy loss is .*no update was made \(rows 102\)"):
        actor.update(rollout, advantages_PG, None, None)
    after = weights(actor.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert actor.optimizer.updates == 0


@pytest.mark.parametrize("who", ["actor", "critic"])
def test_weights_that_are_not_finite_stop_both_updates(who: str, world: World, model_path: str) -> None:
    rollout = tiny_rollout()
    part = build_actor(world, model_path) if who == "actor" else build_critic(world, model_path)
    with torch.no_grad():
        part.model.model.norm.weight[3] = math.nan
    before = weights(part.model)
    what = "supervised" if who == "actor" else "discriminator"
    with pytest.raises(UnhealthyError, match=f"the {what} loss is nan; no update was made .rows 100, 101, 102, 103"):
        part.sft_update(teacher_groups(rollout.rows)) if who == "actor" else part.score_and_update(rollout)
    after = weights(part.model)
    assert all(torch.equal(before[n], after[n]) for n in before if n != "model.norm.weight")


def test_a_gradient_that_overflows_is_refused_though_its_loss_is_finite(world: World, model_path: str) -> None:
    rollout = tiny_rollout()
    actor = build_actor(world, model_path)
    before = weights(actor.model)
    # Of mean 0 in each group, so that the loss cancels to a finite number while its gradient is beyond float32.
    with pytest.raises(UnhealthyError, match="actor's gradient norm is inf"):
        actor.update(rollout, spread_advantages(rollout) * 1e30, None, None)
    after = weights(actor.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in actor.optimizer.parameters)
