"""Entropy of the policy at each token, and the bonus made of it.

Legend: B rows, T response tokens (padded), V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from .aggregate import Denominators, aggregate, token_mean
from .mean import Mean


def token_entropy(logits_BTV: Tensor) -> Tensor:
    """Entropy in nats [B,T], in [0, ln V], of logits already divided by the temperature."""
    logp_BTV = logits_BTV.float().log_softmax(-1)
    return -(logp_BTV.exp() * logp_BTV).sum(-1)


def entropy_bonus(
    entropy_BT: Tensor,
    mask_BT: Tensor,
    *,
    agg: str = "seq-mean-token-mean",
    rows: float | None = None,
    tokens: float | None = None,
    horizon: float | None = None,
) -> tuple[Tensor, dict[str, Mean]]:
    """(loss before entropy_coeff = minus the aggregated entropy, {"actor/entropy": mean over tokens})."""
    entropy, _ = aggregate(entropy_BT.float(), mask_BT, agg, Denominators(rows, tokens, horizon))
    return -entropy, {"actor/entropy": token_mean(entropy_BT, mask_BT)}
