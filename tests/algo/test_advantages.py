"""Semantics pinned: group-relative advantages, unbiased std, and that a flat group gives zeros and a count."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algo.mutants import mutated
from gadcli.algo import advantages

# One group with a spread, one flat, one with a small spread.
REWARDS = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.7, 0.7, 0.7, 0.7], [0.00, 0.01, 0.02, 0.03]])


def oracle(rewards: list[list[float]], estimator: str, sigma_min: float) -> list[list[float]]:
    """The formulas in the standard library's arithmetic (statistics.stdev is the unbiased one)."""
    out = []
    for group in rewards:
        mean, std = statistics.fmean(group), statistics.stdev(group)
        scale = {"grpo": std + 1e-6, "dr_grpo": 1.0, "grpo_floor": max(std, sigma_min)}[estimator]
        out.append([(r - mean) / scale for r in group])
    return out


def check_against_statistics(module) -> None:
    for estimator in advantages.ESTIMATORS:
        adv, _ = module.group_advantages(REWARDS, estimator, sigma_min=0.1)
        expected = oracle(REWARDS.tolist(), estimator, 0.1)
        assert torch.allclose(adv, torch.tensor(expected), atol=1e-6, rtol=1e-5), estimator


def test_every_estimator_agrees_with_the_standard_library() -> None:
    check_against_statistics(advantages)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("r_PG.std(-1)", "r_PG.std(-1, unbiased=False)"),  # biased std: sqrt(4/3) too large
        ("r_PG.mean(-1, keepdim=True)", "r_PG.mean()"),  # the batch's mean, not the group's
        ("(std_P + EPSILON)", "(std_P + 0.1)"),
        ("std_P.clamp(min=sigma_min)", "(std_P + sigma_min)"),
    ],
)
def test_mutants_of_the_advantage_are_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_against_statistics(mutated("advantages", old, new))


def test_grpo_by_hand() -> None:
    # mean 3, deviations -2 -1 0 3, variance 14/3, std 2.160247: -.925820, -.462910, 0, 1.388730
    adv, _ = advantages.group_advantages(REWARDS[:1], "grpo")
    assert adv[0].tolist() == pytest.approx([-0.925820, -0.462910, 0.0, 1.388730], abs=2e-6)


@pytest.mark.parametrize("estimator", advantages.ESTIMATORS)
def test_a_flat_group_gives_zeros_and_is_counted(estimator: str) -> None:
    adv, metrics = advantages.group_advantages(REWARDS, estimator)
    assert adv[1].tolist() == [0.0] * 4
    assert metrics["critic/zero_std_fraction"].value == pytest.approx(1 / 3)
    assert metrics["critic/zero_std_fraction"].count == 3


def test_scores_equal_but_for_their_last_bit_are_a_flat_group() -> None:
    # Equal texts scored in two micro-batches: 1 ulp apart. Without the rule grpo would make +-.1 of 1.2e-7.
    score = torch.tensor(0.7)
    group = torch.stack([score, torch.nextafter(score, torch.tensor(1.0)), score, score])[None]
    adv, metrics = advantages.group_advantages(group, "grpo")
    assert adv.tolist() == [[0.0] * 4] and metrics["critic/zero_std_fraction"].value == 1.0


def test_what_counts_as_rounding_grows_with_the_scores() -> None:
    # Around 100 the last bit is 7.6e-6: one bit apart is flat. Around .01 it is 9e-10: 1e-6 apart is a real spread.
    hundred = torch.tensor(100.0)
    group = torch.stack([hundred, torch.nextafter(hundred, torch.tensor(101.0))])[None]
    assert advantages.group_advantages(group, "dr_grpo")[1]["critic/zero_std_fraction"].value == 1.0
    adv, metrics = advantages.group_advantages(torch.tensor([[0.01, 0.010001]]), "dr_grpo")
    assert metrics["critic/zero_std_fraction"].value == 0.0 and adv.abs().min() > 4e-7


def test_equal_texts_with_small_scores_are_a_flat_group() -> None:
    # One text at four places of a batch: a score of .01 is the sum of far larger terms and wanders by 2e-7.
    group = torch.tensor([[0.01, 0.01 + 2e-7, 0.01 - 2e-7, 0.01]])
    adv, metrics = advantages.group_advantages(group, "grpo")
    assert adv.tolist() == [[0.0] * 4] and metrics["critic/zero_std_fraction"].value == 1.0


def test_a_group_of_zeros_is_counted() -> None:
    assert advantages.group_advantages(torch.zeros(1, 4), "grpo")[1]["critic/zero_std_fraction"].value == 1.0


def test_bfloat16_scores_are_normalised_in_float32() -> None:
    # 1, 1, 1, 1.0078125 (the next bfloat16): deviations -1/4 and 3/4 of a step, std half of one: -.5 and 1.5
    adv, _ = advantages.group_advantages(torch.tensor([[1.0, 1.0, 1.0, 1.0078125]]).bfloat16(), "grpo")
    assert adv[0].tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5], rel=1e-3)


def test_scores_large_and_equal_give_exact_zeros() -> None:
    # The mean of three times 0.1 is not 0.1 in binary: the zero must be by rule, not by luck.
    for value in (0.1, 115.75, -167.3):
        adv, _ = advantages.group_advantages(torch.full((2, 3), value), "dr_grpo")
        assert adv.abs().max() == 0.0


def test_a_group_of_one_is_flat_not_nan() -> None:
    adv, metrics = advantages.group_advantages(torch.tensor([[3.0], [4.0]]), "grpo")
    assert adv.tolist() == [[0.0], [0.0]] and metrics["critic/zero_std_fraction"].value == 1.0
    assert metrics["critic/score_std"].value == 0.0


def test_metrics_describe_the_advantages() -> None:
    adv, metrics = advantages.group_advantages(REWARDS, "dr_grpo")
    # stds 2.160247, 0, .0129099 (deviations .015 .005: variance .0005/3); their mean is .724386
    assert metrics["critic/score_std"].value == pytest.approx(0.724386, rel=1e-5)
    assert metrics["critic/advantages/max"].value == 3.0 and metrics["critic/advantages/min"].value == -2.0
    assert metrics["critic/advantages/mean"].value == pytest.approx(adv.mean().item(), abs=1e-7)


def test_advantages_carry_no_gradient() -> None:
    adv, _ = advantages.group_advantages(REWARDS.clone().requires_grad_(), "grpo")
    assert not adv.requires_grad


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="rloo"):
        advantages.group_advantages(REWARDS, "rloo")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), st.floats(-50, 50, width=32))
def test_a_shift_of_all_scores_changes_nothing(group: list[float], shift: float) -> None:
    # The game's value is relative. Rounding: scores up to 150 are held to 1e-5, divided by a std of at least .5.
    rewards = torch.tensor([group])
    if rewards.std() < 0.5:
        return
    plain, _ = advantages.group_advantages(rewards, "grpo")
    shifted, _ = advantages.group_advantages(rewards + shift, "grpo")
    assert torch.allclose(plain, shifted, atol=1e-4)
