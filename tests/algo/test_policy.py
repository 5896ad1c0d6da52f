"""Semantics pinned: GSPO, GRPO, PPO and DAPO by value and gradient, what a clip kills, and global denominators."""

from __future__ import annotations

import math

import pytest
import torch

from algo.mutants import mutated
from gadcli.algo import aggregate, policy
from gadcli.algo.mean import add_metrics
from gadcli.config import schema

LOW, HIGH, DUAL = 0.1, 0.2, 3.0
AGGS = aggregate.AGG_MODES


def batch(rows: int = 12, width: int = 7):
    """Ragged rows (one without tokens), both signs of advantage, a flat group, ratios on both sides of every clip."""
    g = torch.Generator().manual_seed(5)
    old = -torch.rand(rows, width, generator=g) * 3
    # Shared row shifts of up to ±2 push whole answers over the sequence clips, token noise over the token clips.
    logp = old + torch.randn(rows, 1, generator=g) * 0.7 + torch.randn(rows, width, generator=g) * 0.5
    adv = torch.randn(rows, generator=g)
    adv[4:8] = 0.0  # a zero-variance group
    adv[0], logp[0, 0] = -1.0, old[0, 0] + 1.5  # ratio 4.5: beyond the dual clip
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    lengths[9] = 0
    mask = torch.arange(width) < lengths[:, None]
    return logp, old, adv, mask


def oracle(mode, logp, old, adv, mask, agg, horizon=None):
    """(loss, d loss / d logp, killed tokens) from the papers' formulas, token by token in Python floats."""
    losses, grads, killed = [], [], 0
    for row, (lp_row, old_row, m_row) in enumerate(zip(logp.tolist(), old.tolist(), mask.tolist(), strict=True)):
        tokens = [i for i, m in enumerate(m_row) if m]
        a, row_losses, row_grads = adv[row].item(), [], [0.0] * len(m_row)
        k = sum(lp_row[i] - old_row[i] for i in tokens) / max(len(tokens), 1)
        for i in tokens:
            sequence = mode.startswith("gspo")
            r = math.exp(min(k, 10.0)) if sequence else math.exp(lp_row[i] - old_row[i])
            clipped = min(max(r, 1 - LOW), 1 + HIGH)
            value, slope = -a * r, -a * r  # d r / d logp_i = r, in GSPO by its stop-gradients
            if -a * clipped > value:
                value, slope = -a * clipped, 0.0
            if not sequence and a < 0 and value > -a * DUAL:
                value, slope = -a * DUAL, 0.0
            killed += a != 0 and slope == 0.0
            row_losses.append(value)
            row_grads[i] = slope
        losses.append(row_losses)
        grads.append(row_grads)
    rows, total = sum(1 for x in losses if x), sum(map(len, losses))
    divisors = [
        {
            "seq-mean-token-mean": rows * max(len(x), 1),
            "token-mean": total,
            "seq-mean-token-sum": rows,
            "seq-mean-token-sum-norm": rows * (horizon or 1),
        }[agg]
        for x in losses
    ]
    loss = sum(sum(x) / d for x, d in zip(losses, divisors, strict=True))
    return loss, torch.tensor([[g / d for g in x] for x, d in zip(grads, divisors, strict=True)]), killed


def run(module, mode, logp, old, adv, mask, **kwargs):
    return module.policy_loss(mode, logp, old, adv, mask, clip_low=LOW, clip_high=HIGH, clip_c=DUAL, **kwargs)


def check_against_floats(module, modes=schema.POLICY_LOSSES, aggs=AGGS) -> None:
    logp, old, adv, mask = batch()
    for mode in modes:
        for agg in aggs:
            leaf = logp.clone().requires_grad_()
            loss, metrics = run(module, mode, leaf, old, adv, mask, agg=agg, horizon=7.0)
            loss.backward()
            expected, grad, killed = oracle(mode, logp, old, adv, mask, agg, horizon=7)
            assert loss.item() == pytest.approx(expected, rel=1e-5), (mode, agg)
            assert leaf.grad is not None, (mode, agg)
            assert torch.allclose(leaf.grad, grad, atol=1e-7, rtol=1e-5), (mode, agg)
            assert metrics["actor/pg_loss"].value == pytest.approx(expected, rel=1e-5), (mode, agg)
            assert metrics["actor/pg_clipfrac"].value == pytest.approx(killed / mask.sum().item()), (mode, agg)
            assert 0 < killed < mask.sum()  # the batch reaches the clips


def test_every_mode_and_aggregation_agrees_with_plain_floats() -> None:
    check_against_floats(policy)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # GSPO: missing stop-gradients and a sum for the mean over tokens
        ("masked_mean(delta_BT, mask).detach()[:, None]", "masked_mean(delta_BT, mask)[:, None]"),
        ("delta_BT - delta_BT.detach() + k_B1", "k_B1 + 0 * delta_BT"),
        ("masked_mean(delta_BT, mask).detach()", "delta_BT.mean(-1).detach()"),  # divides by the padded width
        ('SEQUENCE_LEVEL = ("gspo", "gspo_token")', "SEQUENCE_LEVEL = ()"),
        # clips
        ("ratio_BT.clamp(1 - clip_low, 1 + clip_high)", "ratio_BT.clamp(1 - clip_high, 1 + clip_low)"),
        ("torch.maximum(-adv * ratio_BT,", "torch.minimum(-adv * ratio_BT,"),
        ("worst_BT = -adv * clip_c", "worst_BT = -adv * clip_c * 2"),
        ("torch.where(adv < 0, torch.minimum(loss_BT, worst_BT), loss_BT)", "torch.minimum(loss_BT, worst_BT)"),
        ("((adv < 0) & (ratio_BT < 1 - clip_low))", "((adv > 0) & (ratio_BT < 1 - clip_low))"),
        ("logp_BT.float() - old_BT.detach().float()", "old_BT.detach().float() - logp_BT.float()"),
    ],
)
def test_mutants_of_a_policy_loss_are_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_against_floats(mutated("policy", old, new))


def check_aggregations(module) -> None:
    # Two rows of 1 and 3 tokens, values 6 and 1, 2, 3; padding holds 100.
    loss_BT = torch.tensor([[6.0, 100.0, 100.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    expected = {
        "seq-mean-token-mean": (6 / 1 + 6 / 3) / 2,  # 4
        "token-mean": 12 / 4,  # 3
        "seq-mean-token-sum": 12 / 2,  # 6
        "seq-mean-token-sum-norm": 12 / (2 * 8),  # .75 at horizon 8
    }
    for agg, value in expected.items():
        loss, mean = module.aggregate(loss_BT, mask, agg, module.Denominators(horizon=8))
        assert loss.item() == pytest.approx(value) and mean.value == pytest.approx(value), agg


def test_aggregations_by_hand() -> None:
    check_aggregations(aggregate)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(sums_B / length_B.clamp(min=1)).sum(), local_rows, rows", "sums_B.sum(), tokens, rows"),
        ("sums_B = masked_sum(loss_BT, mask_BT)", "sums_B = loss_BT.sum(-1)"),  # padding counted
        ("local_rows * over.horizon, rows * over.horizon", "local_rows * mask_BT.shape[-1], rows * mask_BT.shape[-1]"),
    ],
)
def test_mutants_of_the_aggregation_are_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_aggregations(mutated("aggregate", old, new))


@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("mode", schema.POLICY_LOSSES)
def test_ragged_micro_batches_and_ranks_add_up_to_the_whole_step(mode: str, agg: str) -> None:
    def gradient(pieces, **denominators):
        leaf, added, total = batch()[0].requires_grad_(), {}, 0.0
        for piece in pieces:
            _, old, adv, mask = batch()
            loss, metrics = run(
                policy, mode, leaf[piece], old[piece], adv[piece], mask[piece], agg=agg, horizon=7.0, **denominators
            )
            loss.backward()
            total += loss.item()
            add_metrics(added, metrics)
        return total, leaf.grad, {name: mean.value for name, mean in added.items()}

    mask = batch()[3]
    whole = gradient([slice(0, 12)])
    denominators = {"rows": float((mask.sum(-1) > 0).sum()), "tokens": float(mask.sum())}
    # Uneven pieces; one of them (9:10) holds no response token, one no row.
    parts = gradient([slice(0, 1), slice(1, 9), slice(9, 10), slice(10, 10), slice(10, 12)], **denominators)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert torch.allclose(parts[1], whole[1], rtol=1e-5, atol=1e-9)
    assert parts[2] == pytest.approx(whole[2], rel=1e-5)


def test_mean_of_micro_batch_means_would_not_add_up() -> None:
    # The law above can fail: local denominators (the default) over uneven pieces give another number.
    logp, old, adv, mask = batch()
    whole = run(policy, "ppo", logp, old, adv, mask)[0].item()
    pieces = [slice(0, 1), slice(1, 12)]
    means = [run(policy, "ppo", logp[p], old[p], adv[p], mask[p])[0].item() for p in pieces]
    assert sum(means) / 2 != pytest.approx(whole, rel=1e-2)


@pytest.mark.parametrize("mode", schema.POLICY_LOSSES)
def test_padding_and_row_order_change_nothing(mode: str) -> None:
    logp, old, adv, mask = batch()
    base = logp.clone().requires_grad_()
    run(policy, mode, base, old, adv, mask)[0].backward()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))

    def padded(x: torch.Tensor, left: int, right: int, fill: float) -> torch.Tensor:
        return torch.nn.functional.pad(x[order].float(), (left, right), value=fill)

    for left, right in ((3, 0), (0, 4), (2, 1)):
        leaf = padded(logp, left, right, float("nan")).requires_grad_()  # forwards leave anything under the padding
        loss, _ = run(
            policy, mode, leaf, padded(old, left, right, 7.0), adv[order], padded(mask, left, right, 0.0).bool()
        )
        loss.backward()
        assert leaf.grad is not None and base.grad is not None
        inner = leaf.grad[:, left : leaf.shape[1] - right]
        assert torch.allclose(inner, base.grad[order], rtol=1e-5, atol=1e-9)
        assert leaf.grad.abs().sum() == pytest.approx(inner.abs().sum().item())  # nothing leaks into padding


def test_gspo_of_length_one_is_ppo() -> None:
    # With |y| = 1, k is the token's own delta, so ratio and gradient are PPO's (inside the dual clip's reach none).
    logp, old, adv, mask = (x[:, :1] if x.dim() == 2 else x for x in batch())
    adv = adv.abs()  # dual clip acts on negative advantages only, and GSPO has none
    grads = []
    for mode in ("gspo", "ppo"):
        leaf = logp.clone().requires_grad_()
        loss, _ = run(policy, mode, leaf, old, adv, mask, agg="token-mean")
        loss.backward()
        grads.append((loss.item(), leaf.grad))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-6)
    assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-5)


def test_the_ratio_is_one_on_the_first_mini_batch_at_temperature_0_8() -> None:
    """On-policy at temperature .8: ratio exactly 1, pg_loss and ppo_kl 0, and yet a gradient."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 6, 11, generator=g, requires_grad=True)
    ids = torch.randint(0, 11, (2, 6), generator=g)
    logp = (logits / 0.8).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    adv, mask = torch.tensor([1.0, -1.0]), torch.ones(2, 5).bool()
    for mode in schema.POLICY_LOSSES:
        logits.grad = None
        loss, metrics = run(policy, mode, logp, logp.detach(), adv, mask)
        loss.backward(retain_graph=True)
        assert loss.item() == 0.0 and metrics["actor/ppo_kl"].value == 0.0, mode
        assert metrics["actor/pg_clipfrac"].value == 0.0, mode
        assert logits.grad is not None and logits.grad.norm() > 0.05, mode


def test_clipfrac_counts_only_clips_that_kill_a_gradient() -> None:
    # Ratios 2 and .5 under advantages +1 and -1: the clip kills (+, 2) and (-, .5); (+, .5) and (-, 2) still learn.
    logp, old = torch.tensor([[2.0], [2.0], [0.5], [0.5]]).log(), torch.zeros(4, 1)
    adv, mask = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.ones(4, 1)
    leaf = logp.clone().requires_grad_()
    loss, metrics = run(policy, "ppo", leaf, old, adv, mask)
    loss.backward()
    assert metrics["actor/pg_clipfrac"].value == 0.5
    assert leaf.grad is not None and (leaf.grad == 0).flatten().tolist() == [True, False, False, True]


def test_dual_clip_stops_a_runaway_token_of_a_bad_answer() -> None:
    # ratio 5 > c = 3 with A = -2: loss -A c = 6 and no gradient, where plain PPO has 10 and slope 10.
    leaf = torch.tensor([[math.log(5.0)]], requires_grad=True)
    loss, metrics = run(policy, "grpo", leaf, torch.zeros(1, 1), torch.tensor([-2.0]), torch.ones(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(6.0) and leaf.grad is not None and leaf.grad.item() == 0.0
    assert metrics["actor/pg_clipfrac"].value == 1.0


def test_dapo_clips_higher_than_lower() -> None:
    # A = 1, ratio 1.25: inside an upper clip of .28, outside one of .2.
    leaf = torch.tensor([[math.log(1.25)]], requires_grad=True)
    wide, _ = policy.policy_loss("dapo", leaf, torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1),
                                 clip_low=0.2, clip_high=0.28)  # fmt: skip
    wide.backward()
    assert wide.item() == pytest.approx(-1.25) and leaf.grad is not None and leaf.grad.item() == pytest.approx(-1.25)


def test_auto_averages_as_each_paper_does() -> None:
    logp, old, adv, mask = batch()
    for mode, agg in aggregate.AGG_OF_MODE.items():
        assert run(policy, mode, logp, old, adv, mask)[0] == run(policy, mode, logp, old, adv, mask, agg=agg)[0]
    assert set(aggregate.AGG_OF_MODE) == set(schema.POLICY_LOSSES)
    assert {"auto", *aggregate.AGG_MODES} == set(schema.LOSS_AGG_MODES)


def test_gspo_token_takes_an_advantage_for_each_token() -> None:
    # One row, two tokens, ratio 1 (on-policy): d loss / d logp = -A_t / 2.
    leaf = torch.zeros(1, 2, requires_grad=True)
    run(policy, "gspo_token", leaf, torch.zeros(1, 2), torch.tensor([[1.0, -3.0]]), torch.ones(1, 2))[0].backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [[-0.5, 1.5]]


def test_importance_weights_scale_each_tokens_loss() -> None:
    leaf = torch.zeros(1, 2, requires_grad=True)
    weights = torch.tensor([[2.0, 0.5]])
    run(policy, "ppo", leaf, torch.zeros(1, 2), torch.tensor([1.0]), torch.ones(1, 2), weights_BT=weights)[0].backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [[-1.0, -0.25]]  # -A w / 2 tokens


def test_an_absurd_ratio_stays_finite_in_value_and_gradient() -> None:
    for mode in schema.POLICY_LOSSES:
        for sign in (1.0, -1.0):
            leaf = torch.full((1, 2), 200.0, requires_grad=True)
            loss, metrics = run(policy, mode, leaf, torch.zeros(1, 2), torch.tensor([sign]), torch.ones(1, 2))
            loss.backward()
            # gspo, A < 0: the log-ratio is clamped at 10, so the loss is e^10 and learns nothing more
            assert math.isfinite(loss.item()) and leaf.grad is not None and leaf.grad.abs().max() == 0.0, mode
            assert metrics["actor/pg_clipfrac"].value == 1.0
    assert run(policy, "gspo", leaf, torch.zeros(1, 2), torch.tensor([-1.0]), torch.ones(1, 2))[0].item() == (
        pytest.approx(math.exp(10.0), rel=1e-6)
    )


def test_zero_advantages_give_no_gradient_and_no_clips() -> None:
    logp, old, _, mask = batch()
    for mode in schema.POLICY_LOSSES:
        leaf = (logp + 200 * torch.eye(12, 7)).requires_grad_()  # absurd ratios too
        loss, metrics = run(policy, mode, leaf, old, torch.zeros(12), mask)
        loss.backward()
        assert loss.item() == 0.0 and leaf.grad is not None and leaf.grad.abs().max() == 0.0
        assert metrics["actor/pg_clipfrac"].value == 0.0


def test_ppo_kl_is_the_token_mean_of_old_minus_new() -> None:
    # Rows of 1 and 2 tokens: (1 + .5 + .3) / 3 = .6, not the mean of the rows' means (.7).
    old, logp = torch.zeros(2, 2), -torch.tensor([[1.0, 9.0], [0.5, 0.3]])
    _, metrics = run(policy, "ppo", logp, old, torch.ones(2), torch.tensor([[1, 0], [1, 1]]))
    assert metrics["actor/ppo_kl"].value == pytest.approx(0.6)


@pytest.mark.parametrize("agg", AGGS)
def test_a_batch_without_response_tokens_costs_nothing_and_can_run_backward(agg: str) -> None:
    # A rank may have nothing but padding; it must still take part in the backward pass of its peers.
    leaf = torch.zeros(2, 3, requires_grad=True)
    loss, metrics = run(policy, "gspo", leaf, torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3), agg=agg, horizon=3.0)
    loss.backward()
    assert loss.item() == 0.0 and leaf.grad is not None and leaf.grad.abs().max() == 0.0
    assert all(float(mean.count) == 0.0 for mean in metrics.values())


def test_no_metric_holds_a_graph() -> None:
    logp, old, adv, mask = batch()
    _, metrics = run(policy, "gspo", logp.requires_grad_(), old, adv, mask)
    assert not any(torch.as_tensor(mean.total).requires_grad for mean in metrics.values())


def test_a_ratio_on_the_edge_of_its_clip_still_learns() -> None:
    # Clips of 0 put ratio 1 on both edges at once: the gradient passes (-A / 1 token), so nothing counts as killed.
    for sign in (1.0, -1.0):
        leaf = torch.zeros(1, 1, requires_grad=True)
        loss, metrics = policy.policy_loss("ppo", leaf, torch.zeros(1, 1), torch.tensor([sign]), torch.ones(1, 1),
                                           clip_low=0.0, clip_high=0.0)  # fmt: skip
        loss.backward()
        assert leaf.grad is not None and leaf.grad.item() == -sign and metrics["actor/pg_clipfrac"].value == 0.0


def test_bfloat16_log_probs_are_compared_in_float32() -> None:
    # -30 and -30.125 in bfloat16 (spacing .125 there): delta .125 and exp(.125) = 1.133148, not bfloat16's 1.1328125.
    logp, old = torch.tensor([[-30.0]]).bfloat16(), torch.tensor([[-30.125]]).bfloat16()
    loss, _ = run(policy, "ppo", logp, old, torch.tensor([1.0]), torch.ones(1, 1))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(-math.exp(0.125), rel=1e-6)


def test_only_the_new_log_probs_get_a_gradient() -> None:
    logp, old, adv, mask = batch()
    leaves = [x.clone().requires_grad_() for x in (logp, old, adv, torch.ones_like(logp))]
    run(policy, "ppo", leaves[0], leaves[1], leaves[2], mask, weights_BT=leaves[3])[0].backward()
    assert leaves[0].grad is not None and [leaf.grad for leaf in leaves[1:]] == [None, None, None]


def test_unknown_names_are_refused() -> None:
    logp, old, adv, mask = batch()
    with pytest.raises(ValueError, match="reinforce"):
        run(policy, "reinforce", logp, old, adv, mask)
    with pytest.raises(ValueError, match="mean"):
        run(policy, "ppo", logp, old, adv, mask, agg="mean")
    with pytest.raises(ValueError, match="horizon"):
        run(policy, "ppo", logp, old, adv, mask, agg="seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="horizon"):
        run(policy, "ppo", logp, old, adv, mask, agg="seq-mean-token-sum-norm", horizon=0.0)
