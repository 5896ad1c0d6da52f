"""The bonus made of the policy's entropy at each token.

Legend: B rows, T response tokens (padded).
"""

from __future__ import annotations

from torch import Tensor

from .aggregate import Denominators, aggregate, token_mean
from .mean import Mean


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
