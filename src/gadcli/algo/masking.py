"""Which response tokens count (the first EOS included, nothing after), and sums over them.

Legend: B rows, T response tokens (padded). Masks are bool or 0/1 of any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def response_mask(ids_BT: Tensor, eos_id: int | Sequence[int], valid_BT: Tensor | None = None) -> Tensor:
    """Bool [B,T]: True from the row's first valid token up to and including its first EOS.

    `valid_BT` says which positions hold tokens at all (see `length_mask`); without it every position does, so a row
    without EOS counts to its end. Padding is never recognised by its id: many tokenizers pad with EOS itself, and
    masking by pad id would delete the one token that ends the text.
    """
    eos = torch.as_tensor([eos_id] if isinstance(eos_id, int) else list(eos_id), device=ids_BT.device)
    is_eos_BT = torch.isin(ids_BT, eos)
    valid = torch.ones_like(is_eos_BT) if valid_BT is None else valid_BT.bool()
    is_eos_BT = is_eos_BT & valid  # left padding may be EOS by id; it ends nothing
    eos_before_BT = is_eos_BT.long().cumsum(-1) - is_eos_BT.long()
    return valid & (eos_before_BT == 0)


def length_mask(lengths_B: Tensor, width: int) -> Tensor:
    """Bool [B,width]: True for the first lengths_B[b] positions (right padding)."""
    return torch.arange(width, device=lengths_B.device) < lengths_B[:, None]


def masked_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Σ over T of x where the mask is set, [B]. What lies under the padding (even nan) has no influence."""
    return x_BT.masked_fill(~mask_BT.bool(), 0.0).sum(-1)


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over T of x where the mask is set, [B]; 0 for a row without tokens."""
    return masked_sum(x_BT, mask_BT) / lengths(mask_BT).clamp(min=1)


def lengths(mask_BT: Tensor) -> Tensor:
    """Response lengths in tokens, float [B]."""
    return mask_BT.bool().sum(-1).float()
