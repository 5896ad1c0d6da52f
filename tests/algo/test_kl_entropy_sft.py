"""Semantics pinned: KL estimators and their clamps, KL in the reward, entropy, SFT and sampler mismatch."""

from __future__ import annotations

import math

import pytest
import torch

from algo.mutants import mutated
from gadcli.algo import entropy, kl, mismatch, sft
from gadcli.algo.mean import Mean, add_metrics, extreme_of, mean_of
from gadcli.config import schema

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
LOGP = torch.tensor([[-1.0, -2.0, 5.0], [-0.5, 9.0, 9.0]])
REF = torch.tensor([[-1.5, -1.0, 0.0], [-0.5, 0.0, 0.0]])
# x = ref - logp at the three tokens: -.5, 1, 0


def k3(x: float) -> float:
    return math.exp(x) - x - 1


def check_kl(module) -> None:
    expected = {
        "low_var_kl": [k3(-0.5), k3(1.0), 0.0],  # .106531, .718282, 0
        "kl": [0.5, -1.0, 0.0],  # logp - ref
        "mse": [0.125, 0.5, 0.0],  # half the square
    }
    for kind, (a, b, c) in expected.items():
        loss, metrics = module.kl_loss(kind, LOGP, REF, MASK)
        assert loss.item() == pytest.approx(((a + b) / 2 + c) / 2, rel=1e-5), kind  # seq-mean of token-means
        assert metrics["actor/kl_loss"].value == pytest.approx(loss.item()), kind
        loss, _ = module.kl_loss(kind, LOGP, REF, MASK, agg="token-mean", tokens=6.0)
        assert loss.item() == pytest.approx((a + b + c) / 6, rel=1e-5), kind
    # Clamps of k3: x = 5 gives e^5 - 6 = 142.4, held at 10; the gradient is then 0.
    far = torch.tensor([[-5.0]], requires_grad=True)
    loss, _ = module.kl_loss("low_var_kl", far, torch.zeros(1, 1), torch.ones(1, 1))
    loss.backward()
    assert loss.item() == 10.0
    assert far.grad is not None and far.grad.item() == 0.0
    # x = -20 gives 19, held at 10 too, and x = -100 overflows nothing.
    for logp in (20.0, 100.0, -1000.0):
        leaf = torch.tensor([[logp]], requires_grad=True)
        loss, _ = module.kl_loss("low_var_kl", leaf, torch.zeros(1, 1), torch.ones(1, 1))
        loss.backward()
        assert loss.item() == 10.0
        assert leaf.grad is not None and leaf.grad.item() == 0.0


def test_kl_estimators_by_hand() -> None:
    check_kl(kl)
    assert set(kl.KL_KINDS) == {"low_var_kl", "kl", "mse"}
    assert schema.ActorConfig().kl_loss_type in kl.KL_KINDS


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ref_BT.detach().float() - logp_BT.float()", "logp_BT.float() - ref_BT.detach().float()"),
        ("(x_BT.exp() - x_BT - 1.0).clamp(-10.0, 10.0)", "(x_BT.exp() - x_BT - 1.0)"),
        ("x_BT.clamp(-20.0, 20.0)", "x_BT.clamp(-0.2, 0.2)"),
        ("0.5 * x_BT.square()", "x_BT.square()"),
        ("return -x_BT", "return x_BT.abs()"),
    ],
)
def test_mutants_of_the_kl_are_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_kl(mutated("kl", old, new))


def test_k1_and_k3_estimate_the_true_kl_on_samples() -> None:
    # Two categorical policies over 5 tokens, weighted by p itself, so the expectation is exact:
    # E_p[k1] = E_p[k3] = KL(p || q) (E_p[q/p - 1] = 0).
    p = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15]).double()
    q = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2]).double()
    true = (p * (p / q).log()).sum().item()
    for kind in ("kl", "low_var_kl"):
        tokens = kl.token_kl(kind, p.log()[None], q.log()[None], torch.ones(1, 5))
        assert (tokens[0] * p).sum().item() == pytest.approx(true, rel=1e-5)


def test_kl_in_the_reward_takes_off_the_answers_summed_k1() -> None:
    # Row 0: (old - ref) = .5 - 1 = -.5, so the reward rises by .1 · .5; row 1: 0.
    rewards, metrics = kl.kl_in_reward(torch.tensor([2.0, 3.0]), LOGP, REF, MASK, 0.1)
    assert rewards.tolist() == pytest.approx([2.05, 3.0])
    assert metrics["actor/reward_kl_penalty"].value == pytest.approx(-0.5 / 3)


def test_kl_in_reward_mutant_that_averages_is_caught() -> None:
    mutant = mutated("kl", "kl_coef * masked_sum(kl_BT, mask_BT)", "kl_coef * kl_BT.mean(-1)")
    assert mutant.kl_in_reward(torch.tensor([2.0, 3.0]), LOGP, REF, MASK, 0.1)[0].tolist() != pytest.approx([2.05, 3])


def test_the_entropy_bonus_is_minus_the_aggregated_entropy() -> None:
    ent = torch.tensor([[1.0, 2.0, 50.0], [4.0, 50.0, 50.0]])
    loss, metrics = entropy.entropy_bonus(ent, MASK)
    assert loss.item() == pytest.approx(-(1.5 + 4) / 2)  # seq-mean-token-mean
    assert metrics["actor/entropy"].value == pytest.approx(7 / 3)  # the metric is a mean over tokens


def check_sft(module) -> None:
    # Tokens -1, -2 | -.5: (1 + 2 + .5) / 3. Mean of row means would be (1.5 + .5) / 2 = 1.
    loss, metrics = module.sft_loss(LOGP, MASK)
    assert loss.item() == pytest.approx(3.5 / 3)
    assert metrics["actor/sft_loss"].value == pytest.approx(3.5 / 3)
    assert metrics["actor/teacher_pg_loss"].value == metrics["actor/sft_loss"].value
    # As one of two micro-batches of a step with 7 teacher tokens in all:
    assert module.sft_loss(LOGP, MASK, tokens=7.0)[0].item() == pytest.approx(3.5 / 7)


def test_sft_divides_by_the_global_number_of_teacher_tokens() -> None:
    check_sft(sft)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('mask_BT, "token-mean"', 'mask_BT, "seq-mean-token-mean"'),  # mean of means
        ("Denominators(tokens=tokens)", "Denominators()"),  # the micro-batch's own tokens
        ("-logp_BT.float()", "logp_BT.float()"),
    ],
)
def test_mutants_of_sft_are_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_sft(mutated("sft", old, new))


def check_tis(module) -> None:
    old = torch.tensor([[math.log(0.6), math.log(0.9), 3.0]])
    rollout = torch.tensor([[math.log(0.3), math.log(0.1), -3.0]])
    # .6/.3 = 2 (at the cap), .9/.1 = 9 (cut to 2), padding 1
    assert module.tis_weights(old, rollout, torch.tensor([[1, 1, 0]])).tolist()[0] == pytest.approx([2.0, 2.0, 1.0])
    # .3/.6 = .5 stays: the truncation is from above only
    assert module.tis_weights(rollout, old, torch.tensor([[1, 1, 1]]))[0, 0].item() == pytest.approx(0.5)
    leaf = old.clone().requires_grad_()
    assert not module.tis_weights(leaf, rollout, torch.ones(1, 3)).requires_grad


def test_tis_weights_are_truncated_from_above_and_carry_no_gradient() -> None:
    check_tis(mismatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("clamp(max=cap)", "clamp(0.9, cap)"),
        ("old_BT.detach().float() - rollout_BT.detach().float()", "rollout_BT.detach().float() - old_BT.float()"),
        ("old_BT.detach().float() - rollout_BT.detach()", "old_BT.float() - rollout_BT"),  # missing stop-gradient
    ],
)
def test_mutants_of_tis_are_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_tis(mutated("mismatch", old, new))


def test_bfloat16_log_probs_are_compared_in_float32() -> None:
    # k3 of x = -.125: e^-.125 + .125 - 1 = .0074969; in bfloat16 that difference would keep two digits.
    logp, ref = torch.tensor([[-30.0]]).bfloat16(), torch.tensor([[-30.125]]).bfloat16()
    assert kl.kl_loss("low_var_kl", logp, ref, torch.ones(1, 1))[0].item() == pytest.approx(k3(-0.125), rel=1e-4)
    assert sft.sft_loss(logp, torch.ones(1, 1))[0].dtype == torch.float32


def test_gradients_reach_the_policy_and_never_the_reference() -> None:
    logp, ref, ent = LOGP.clone().requires_grad_(), REF.clone().requires_grad_(), LOGP.clone().requires_grad_()
    metrics: dict[str, Mean] = {}
    for kind in kl.KL_KINDS:
        loss, parts = kl.kl_loss(kind, logp, ref, MASK)
        loss.backward()
        metrics |= parts
    for loss, parts in (sft.sft_loss(logp, MASK), entropy.entropy_bonus(ent, MASK)):
        loss.backward()
        metrics |= parts
    rewards, parts = kl.kl_in_reward(logp[:, 0], logp, ref, MASK, 0.1)
    metrics |= parts | mismatch.mismatch_metrics(logp, ref, MASK)
    assert logp.grad is not None and ent.grad is not None and ref.grad is None
    assert not rewards.requires_grad
    assert not any(torch.as_tensor(mean.total).requires_grad for mean in metrics.values())


def test_the_mismatch_is_measured_over_response_tokens_only() -> None:
    metrics = mismatch.mismatch_metrics(LOGP, REF, MASK)
    # |diff|: .5, 1, 0; the 5s and 9s under the padding are not seen
    assert metrics["rollout/logp_diff_mean"].value == pytest.approx(0.5)
    assert metrics["rollout/logp_diff_max"].value == 1.0


def test_the_mismatch_of_an_empty_rank_adds_nothing() -> None:
    empty = mismatch.mismatch_metrics(LOGP[:0], REF[:0], MASK[:0])
    both = add_metrics(empty, mismatch.mismatch_metrics(LOGP, REF, MASK))
    assert both["rollout/logp_diff_max"].value == 1.0 and both["rollout/logp_diff_mean"].value == pytest.approx(0.5)


def test_means_add_before_they_divide() -> None:
    # 1 item of 4 and 3 items of 0: the mean is 1, not (4 + 0) / 2.
    assert (mean_of(torch.tensor([4.0])) + mean_of(torch.zeros(3))).value == 1.0
    assert math.isnan(Mean(0.0, 0.0).value)
    with pytest.raises(ValueError, match="max"):
        mean_of(torch.ones(1)) + extreme_of(torch.ones(1), "max")
    assert (extreme_of(torch.tensor([1.0, 5.0]), "min") + extreme_of(torch.tensor([-2.0]), "min")).value == -2.0


def test_an_extreme_has_count_one_and_of_nothing_count_zero() -> None:
    # Reducers divide totals by counts and leave out what has none.
    assert extreme_of(torch.tensor([1.0, 5.0]), "max") == Mean(torch.tensor(5.0), 1.0, "max")
    for op, neutral in (("max", -math.inf), ("min", math.inf)):
        nothing = extreme_of(torch.zeros(0), op)
        assert nothing.count == 0.0 and float(nothing.total) == neutral and math.isnan(nothing.value)
