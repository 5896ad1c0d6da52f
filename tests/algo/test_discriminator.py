"""Semantics pinned: value and gradient of every discriminator loss, by hand and against a plain-float oracle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch

from algo.mutants import mutated
from gadcli.algo import discriminator
from gadcli.algo.mean import add_metrics
from gadcli.config import schema

NUMBERS: dict[str, dict[str, float]] = {
    "original": {},
    "v1": dataclasses.asdict(schema.V1LossConfig()),
    "v2": dataclasses.asdict(schema.V2LossConfig()),
    "v2_raw": dataclasses.asdict(schema.V2RawLossConfig()),
    "final": dataclasses.asdict(schema.FinalLossConfig()),
}
LN2 = math.log(2)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def oracle(name: str, t: float, s: float, len_t: float, len_s: float, e: float = 0.0, lam: float = 0.0) -> float:
    """One pair's loss from raw scores and lengths, in Python floats, with the published numbers written out."""
    raw, d = t - s, t / len_t - s / len_s
    x = raw if name == "original" else min(max(d / 2.0, -10.0), 10.0)
    rank = (1 - e) * softplus(-x) + e * softplus(x)
    lower, reg = max(1.0 - d, 0.0), t * t + s * s
    loss = {
        "original": rank,
        "v1": lower + 0.5 * rank,
        "v2": lower + 0.5 * rank + max(d - 5.0, 0.0),
        "v2_raw": lower + 0.5 * rank + max(raw - 5.0, 0.0) + 0.005 * reg,
        "final": 1.5 * rank + 0.005 * reg + 0.5 * max(d - 1.5, 0.0) ** 2,
    }[name]
    return loss + lam * (t + s) ** 2


def run(module, name: str, t: torch.Tensor, s: torch.Tensor, len_t: torch.Tensor, len_s: torch.Tensor, **kwargs):
    return module.discriminator_loss(name, t, t / len_t, s, s / len_s, NUMBERS[name], **kwargs)


def random_pairs(n: int = 64) -> tuple[torch.Tensor, ...]:
    """Raw scores and lengths such that every hinge, clamp and penalty is active in some pairs and not in others."""
    g = torch.Generator().manual_seed(3)
    t, s = torch.randn(n, generator=g) * 8, torch.randn(n, generator=g) * 8
    len_t, len_s = torch.randint(1, 9, (n,), generator=g).float(), torch.randint(1, 9, (n,), generator=g).float()
    t[0], s[0], len_t[0], len_s[0] = 25.0, -5.0, 1.0, 1.0  # beyond the clamp
    return t, s, len_t, len_s


def check_against_floats(module) -> None:
    t, s, len_t, len_s = random_pairs()
    for name in schema.LOSS_NAMES:
        for e, lam in ((0.0, 0.0), (0.1, 0.02)):
            loss, _ = run(module, name, t, s, len_t, len_s, label_smoothing=e, centring=lam)
            pairs = zip(t.tolist(), s.tolist(), len_t.tolist(), len_s.tolist(), strict=True)
            expected = sum(oracle(name, *pair, e, lam) for pair in pairs) / len(t)
            assert loss.item() == pytest.approx(expected, rel=1e-5), (name, e)


def check_gradients(module) -> None:
    """Central differences of the float oracle against autograd, both sides of the pair."""
    t, s, len_t, len_s = random_pairs()
    for name in schema.LOSS_NAMES:
        t_leaf, s_leaf = t.clone().requires_grad_(), s.clone().requires_grad_()
        run(module, name, t_leaf, s_leaf, len_t, len_s, pairs=1.0)[0].backward()
        assert t_leaf.grad is not None and s_leaf.grad is not None, name
        for i in range(len(t)):
            ti, si, lens = t[i].item(), s[i].item(), (len_t[i].item(), len_s[i].item())
            h = 1e-5
            dt = (oracle(name, ti + h, si, *lens) - oracle(name, ti - h, si, *lens)) / (2 * h)
            ds = (oracle(name, ti, si + h, *lens) - oracle(name, ti, si - h, *lens)) / (2 * h)
            assert t_leaf.grad[i].item() == pytest.approx(dt, abs=1e-5, rel=1e-4), (name, i)
            assert s_leaf.grad[i].item() == pytest.approx(ds, abs=1e-5, rel=1e-4), (name, i)


def test_every_loss_agrees_with_plain_floats() -> None:
    check_against_floats(discriminator)


def test_every_gradient_agrees_with_central_differences_on_both_sides() -> None:
    check_gradients(discriminator)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('(pair.norm_gap_N / numbers["temperature"])', "pair.norm_gap_N"),  # dropped temperature
        (".clamp(-clamp, clamp)", ""),
        ("return F.softplus(-x_N)", "return F.softplus(x_N)"),  # flipped sign
        ("(1 - label_smoothing) * F.softplus(-x_N)", "F.softplus(-x_N)"),
        ('numbers["margin"] - pair.norm_gap_N', 'numbers["margin"] - pair.raw_gap_N'),
        ('numbers["ranking_weight"] * rank_N, {"hinge', 'rank_N, {"hinge'),
        ("_bounded(pair, pair.raw_gap_N,", "_bounded(pair, pair.norm_gap_N,"),  # v2_raw bounded on the norm
        ("pair.t_raw_N.square() + pair.s_raw_N.square()", "(pair.t_raw_N - pair.s_raw_N).square()"),
        ('- numbers["penalty_threshold"]).square()', '- numbers["penalty_threshold"])'),  # linear for square
        ("centring * (pair.t_raw_N + pair.s_raw_N).square()", "centring * (pair.t_raw_N - pair.s_raw_N).square()"),
        ("max(loss_N.numel(), 1)", "1"),  # sum for mean
    ],
)
def test_mutants_of_a_loss_are_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_against_floats(mutated("discriminator", old, new))


@pytest.mark.parametrize("side", ["self.t_raw_N - self.s_raw_N", "self.t_norm_N - self.s_norm_N"])
def test_mutants_that_stop_the_student_sides_gradient_are_caught(side: str) -> None:
    minuend, subtrahend = side.split(" - ")
    mutant = mutated("discriminator", side, f"{minuend} - {subtrahend}.detach()")
    check_against_floats(mutant)  # the value is untouched: only the gradient test can see it
    with pytest.raises(AssertionError):
        check_gradients(mutant)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # d = 0 and both scores 0.4 over 100 tokens: rank = ln 2; t² + s² = .32
        ("original", LN2),
        ("v1", 1 + 0.5 * LN2),
        ("v2", 1 + 0.5 * LN2),
        ("v2_raw", 1 + 0.5 * LN2 + 0.005 * 0.32),
        ("final", 1.5 * LN2 + 0.005 * 0.32),
    ],
)
def test_equal_scores_cost_what_the_formula_says(name: str, expected: float) -> None:
    score, length = torch.tensor([0.4, 0.4]), torch.tensor([100.0, 100.0])
    loss, metrics = run(discriminator, name, score, score, length, length)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert metrics["critic/score_diff"].value == 0.0 and metrics["critic/d_acc"].value == 0.5
    assert metrics["critic/ranking_loss"].value == pytest.approx(LN2, rel=1e-6)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # dL/dt at t = 15.5, s = 0, lengths 1 (so raw = norm = d = 15.5). rank' = -sigmoid(-x), x = 15.5 or 7.75.
        ("original", -sigmoid(-15.5)),  # -1.86e-7: saturated
        ("v1", -0.5 * sigmoid(-7.75) / 2),  # -1.08e-4: still pushing outwards, nothing holds it
        ("v2", -0.5 * sigmoid(-7.75) / 2 + 1),  # the upper hinge pulls back with slope 1
        ("v2_raw", -0.5 * sigmoid(-7.75) / 2 + 1 + 0.005 * 2 * 15.5),
        ("final", -1.5 * sigmoid(-7.75) / 2 + 0.005 * 2 * 15.5 + 0.5 * 2 * (15.5 - 1.5)),  # +14.15
    ],
)
def test_the_gradient_at_a_gap_of_15_5_is_what_each_loss_promises(name: str, expected: float) -> None:
    t, one = torch.tensor([15.5], requires_grad=True), torch.ones(1)
    run(discriminator, name, t, torch.zeros(1), one, one)[0].backward()
    assert t.grad is not None
    # float32 keeps seven digits of the sum; the saturated gradient stands alone and keeps them all
    assert t.grad.item() == pytest.approx(expected, rel=1e-5)


def test_beyond_the_clamp_v1_gives_no_gradient_at_all() -> None:
    # d = 25: the lower hinge is over, d/2 = 12.5 is clamped at 10.
    t, one = torch.tensor([25.0], requires_grad=True), torch.ones(1)
    loss, _ = run(discriminator, "v1", t, torch.zeros(1), one, one)
    loss.backward()
    assert t.grad is not None and t.grad.item() == 0.0
    assert loss.item() == pytest.approx(0.5 * softplus(-10.0), rel=1e-5)


def test_original_does_not_overflow_on_absurd_gaps() -> None:
    one = torch.ones(2)
    t, s = torch.tensor([500.0, -500.0], requires_grad=True), torch.tensor([-500.0, 500.0])
    loss, _ = run(discriminator, "original", t, s, one, one)
    loss.backward()
    # -log sigmoid(1000) = 0 and -log sigmoid(-1000) = 1000; their mean is 500, their slopes 0 and -1/2
    assert loss.item() == 500.0 and t.grad is not None and t.grad.tolist() == [0.0, -0.5]


def test_smoothing_puts_the_minimum_at_a_finite_gap() -> None:
    # (1-e) rank(x) + e rank(-x) is smallest at x = logit(1 - e): for e = .1, x = ln 9 = 2.197.
    one = torch.ones(1)
    t = torch.tensor([math.log(9.0)], requires_grad=True)
    run(discriminator, "original", t, torch.zeros(1), one, one, label_smoothing=0.1)[0].backward()
    assert t.grad is not None and abs(t.grad.item()) < 1e-6


NAMES = {
    "original": {"ranking_loss"},
    "v1": {"hinge_loss", "ranking_loss"},
    "v2": {"hinge_loss_lower", "hinge_loss_upper", "ranking_loss"},
    "v2_raw": {"hinge_loss_lower", "hinge_loss_upper", "ranking_loss", "score_reg"},
    "final": {"ranking_loss", "score_reg", "diff_penalty"},
}
ALWAYS = {"d_loss", "d_acc", "score_diff", "raw_score_diff", "student_value_mean", "teacher_value_mean"}


@pytest.mark.parametrize("name", schema.LOSS_NAMES)
def test_each_loss_reports_its_terms_and_no_other(name: str) -> None:
    _, metrics = run(discriminator, name, *random_pairs())
    assert set(metrics) == {f"critic/{term}" for term in ALWAYS | NAMES[name]}


def test_ranking_is_reported_before_its_weight_and_regularisers_as_they_enter_the_loss() -> None:
    # t = 4, s = 1, lengths 2 and 1: d = 2 - 1 = 1; x = .5; rank = softplus(-.5) = .474077; reg = .005 · 17; penalty 0.
    t, s, len_t, len_s = (torch.tensor([v]) for v in (4.0, 1.0, 2.0, 1.0))
    loss, metrics = run(discriminator, "final", t, s, len_t, len_s)
    assert metrics["critic/ranking_loss"].value == pytest.approx(0.474077, rel=1e-5)
    assert metrics["critic/score_reg"].value == pytest.approx(0.085) and metrics["critic/diff_penalty"].value == 0.0
    assert loss.item() == pytest.approx(1.5 * 0.474077 + 0.005 * 17, rel=1e-5)
    assert metrics["critic/d_loss"].value == pytest.approx(loss.item(), rel=1e-6)
    # At d = 3.5 (s = -1.5) the penalty is .5 · (3.5 - 1.5)² = 2.
    wide = run(discriminator, "final", t, torch.tensor([-1.5]), len_t, len_s)[1]
    assert wide["critic/diff_penalty"].value == pytest.approx(2.0)
    assert metrics["critic/score_diff"].value == 1.0 and metrics["critic/raw_score_diff"].value == 3.0
    assert metrics["critic/teacher_value_mean"].value == 4.0 and metrics["critic/student_value_mean"].value == 1.0


def test_score_diff_of_original_is_the_raw_gap() -> None:
    t, s, len_t, len_s = (torch.tensor([v]) for v in (4.0, 1.0, 2.0, 1.0))
    assert run(discriminator, "original", t, s, len_t, len_s)[1]["critic/score_diff"].value == 3.0


@pytest.mark.parametrize("name", schema.LOSS_NAMES)
def test_ragged_micro_batches_add_up_to_the_whole_step(name: str) -> None:
    whole, metrics = run(discriminator, name, *random_pairs(), centring=0.01)
    parts, added = torch.zeros(()), {}
    for piece in zip(*(x.split([1, 40, 0, 23]) for x in random_pairs()), strict=True):  # a rank may be empty
        loss, more = run(discriminator, name, *piece, centring=0.01, pairs=64.0)
        parts = parts + loss
        add_metrics(added, more)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)
    assert {k: m.value for k, m in added.items()} == pytest.approx({k: m.value for k, m in metrics.items()}, rel=1e-5)


def test_no_metric_holds_a_graph() -> None:
    t, s, len_t, len_s = random_pairs()
    _, metrics = run(discriminator, "v2_raw", t.requires_grad_(), s, len_t, len_s, centring=0.1)
    assert not any(torch.as_tensor(mean.total).requires_grad for mean in metrics.values())


def test_a_rank_without_pairs_can_still_run_backward() -> None:
    t = torch.zeros(0, requires_grad=True)
    loss, _ = run(discriminator, "final", t, torch.zeros(0), torch.zeros(0), torch.zeros(0), pairs=8.0)
    loss.backward()
    assert loss.item() == 0.0 and t.grad is not None and t.grad.shape == (0,)


def test_a_number_of_another_loss_is_refused_and_a_missing_one_too() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="max_margin"):
        discriminator.discriminator_loss("v1", one, one, one, one, NUMBERS["v2"])
    with pytest.raises(KeyError):
        discriminator.discriminator_loss("v2", one, one, one, one, NUMBERS["v1"])
    with pytest.raises(ValueError, match="v3"):
        discriminator.discriminator_loss("v3", one, one, one, one, {})


def test_changed_numbers_change_the_loss() -> None:
    # None may be hard-coded: each number, halved, must move the loss of some pair.
    t, s, len_t, len_s = random_pairs()
    for name, numbers in NUMBERS.items():
        base = run(discriminator, name, t, s, len_t, len_s)[0].item()
        for key, value in numbers.items():
            changed: Mapping[str, float] = {**numbers, key: value / 2}
            loss, _ = discriminator.discriminator_loss(name, t, t / len_t, s, s / len_s, changed)
            assert loss.item() != pytest.approx(base, rel=1e-7), (name, key)


def test_r1_of_a_linear_critic_is_half_its_squared_weight() -> None:
    # raw = Σ_t w·e_t, so d raw / d e_t = w at every one of 3 tokens: |grad|² = 3 |w|² = 3 · 5 = 15.
    # weight 2 · ½ · 15 = 15, and its derivative to w is 2 · ½ · 3 · 2 w = 6 w.
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    embeds = torch.randn(4, 3, 2, requires_grad=True)
    loss, metrics = discriminator.gradient_penalty((embeds @ w).sum(-1), embeds, weight=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(15.0, rel=1e-6)
    assert w.grad is not None and w.grad.tolist() == pytest.approx([6.0, 12.0], rel=1e-6)
    assert metrics["critic/gradient_penalty"].value == pytest.approx(15.0)


def test_r1_of_two_micro_batches_adds_up() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    total = torch.zeros(())
    for n in (1, 3):
        embeds = torch.randn(n, 3, 2, requires_grad=True)
        total = total + discriminator.gradient_penalty((embeds @ w).sum(-1), embeds, weight=2.0, rows=4.0)[0]
    assert total.item() == pytest.approx(15.0, rel=1e-6)
