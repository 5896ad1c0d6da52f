"""Sums over the response tokens that count (the first EOS included, nothing after).

Legend: B rows, T response tokens (padded). Masks are bool or 0/1 of any dtype.
"""

from __future__ import annotations

from torch import Tensor


def masked_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Σ over T of x where the mask is set, [B]. What lies under the padding (even nan) has no influence."""
    return x_BT.masked_fill(~mask_BT.bool(), 0.0).sum(-1)


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over T of x where the mask is set, [B]; 0 for a row without tokens."""
    return masked_sum(x_BT, mask_BT) / lengths(mask_BT).clamp(min=1)


def lengths(mask_BT: Tensor) -> Tensor:
    """Response lengths in tokens, float [B]."""
    return mask_BT.bool().sum(-1).float()
