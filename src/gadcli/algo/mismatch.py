"""Sampler and trainer give the same weights slightly different log-probs: measure it, and correct for it.

Legend: B rows, T response tokens (padded). Both log-probs must be at one temperature: engines often return theirs at
temperature 1 whatever they sampled at, and compared with the trainer's at 0.8 that looks like a mismatch and is none.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .aggregate import token_mean
from .mean import Mean, extreme_of


def tis_weights(old_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor, cap: float = 2.0) -> Tensor:
    """Truncated importance weights min(pi_old / pi_rollout, cap) a token [B,T], detached; 1 outside the mask."""
    log_ratio_BT = (old_BT.detach().float() - rollout_BT.detach().float()).masked_fill(~mask_BT.bool(), 0.0)
    # min before exp would need log(cap); after it, an inf is capped all the same and carries no gradient.
    return log_ratio_BT.exp().clamp(max=cap)


def mismatch_metrics(old_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor) -> dict[str, Mean]:
    """rollout/logp_diff_mean and logp_diff_max: |log pi_old - log pi_rollout| over response tokens, nats."""
    with torch.no_grad():
        mask = mask_BT.bool()
        diff_BT = (old_BT.float() - rollout_BT.float()).abs()
        # Not diff_BT[mask]: the host would wait for the device to learn its size.
        largest = extreme_of(diff_BT.masked_fill(~mask, -torch.inf), "max")
        return {
            "rollout/logp_diff_mean": token_mean(diff_BT, mask),
            "rollout/logp_diff_max": replace(largest, count=mask.any().float()),
        }
