"""Distance to the reference policy: the KL loss and the KL taken off the reward.

Legend: B rows, T response tokens (padded). Log-probs are of the sampled tokens, at the sampling temperature, in nats.
Estimators: http://joschu.net/blog/kl-approx.html
"""

from __future__ import annotations

from torch import Tensor

from .aggregate import Denominators, aggregate, token_mean
from .masking import masked_sum
from .mean import Mean

KL_KINDS = ("low_var_kl", "kl", "mse")


def token_kl(kind: str, logp_BT: Tensor, ref_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token [B,T], nats; 0 where the mask is not set.

    low_var_kl  k3: x = clamp(ref - logp, +-20); clamp(e^x - x - 1, +-10). At least 0, low variance.
    kl          k1: logp - ref. Unbiased as a value, but as a loss its expected gradient on-policy is 0.
    mse         k2: (logp - ref)^2 / 2. At least 0; its gradient is the true KL's.
    """
    x_BT = (ref_BT.detach().float() - logp_BT.float()).masked_fill(~mask_BT.bool(), 0.0)
    if kind == "low_var_kl":
        x_BT = x_BT.clamp(-20.0, 20.0)
        return (x_BT.exp() - x_BT - 1.0).clamp(-10.0, 10.0)
    if kind == "kl":
        return -x_BT
    if kind == "mse":
        return 0.5 * x_BT.square()
    raise ValueError(f"unknown KL estimator {kind!r}; known: {', '.join(KL_KINDS)}")


def kl_loss(
    kind: str,
    logp_BT: Tensor,
    ref_BT: Tensor,
    mask_BT: Tensor,
    *,
    agg: str = "seq-mean-token-mean",
    rows: float | None = None,
    tokens: float | None = None,
    horizon: float | None = None,
) -> tuple[Tensor, dict[str, Mean]]:
    """(loss before its coefficient, {"actor/kl_loss"}); see `token_kl` for kinds and `aggregate` for the rest."""
    kl_BT = token_kl(kind, logp_BT, ref_BT, mask_BT)
    loss, mean = aggregate(kl_BT, mask_BT, agg, Denominators(rows, tokens, horizon))
    return loss, {"actor/kl_loss": mean}


def kl_in_reward(
    rewards_B: Tensor, old_BT: Tensor, ref_BT: Tensor, mask_BT: Tensor, kl_coef: float
) -> tuple[Tensor, dict[str, Mean]]:
    """Rewards less kl_coef times the answer's summed k1, [B]: Σ (old - ref) over its tokens, nats. Detached.

    The sum, not the mean, is the sequence's KL sample, hence longer answers may pay more. Metric: the mean k1 a token.
    """
    kl_BT = token_kl("kl", old_BT.detach(), ref_BT, mask_BT)
    rewards_B = rewards_B.detach().float() - kl_coef * masked_sum(kl_BT, mask_BT)
    return rewards_B, {"actor/reward_kl_penalty": token_mean(kl_BT, mask_BT)}
