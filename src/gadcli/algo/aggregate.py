"""From a loss a token to one number, with global denominators: micro-batches and ranks add up exactly.

Legend: B rows, T response tokens (padded).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .masking import masked_sum
from .mean import Mean

AGG_MODES = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")

# What each policy loss's own paper averages over; taken for agg="auto".
AGG_OF_MODE = {
    "gspo": "seq-mean-token-mean",
    "gspo_token": "seq-mean-token-mean",
    "grpo": "seq-mean-token-mean",
    "ppo": "token-mean",
    "dapo": "token-mean",
}


@dataclass(frozen=True)
class Denominators:
    """What the optimiser step divides by, counted over all its micro-batches and ranks.

    `rows`: rows with at least one response token; `tokens`: response tokens; `horizon`: the constant length (tokens)
    that Dr.GRPO divides by, i.e. max_response_length. None takes what these tensors hold, which is right only when
    they are the whole optimiser step.
    """

    rows: float | None = None
    tokens: float | None = None
    horizon: float | None = None


def resolve_agg(mode: str, agg: str) -> str:
    """The aggregation of policy loss `mode`: `agg` itself, or the loss's own for "auto". ValueError if unknown."""
    if agg == "auto":
        return AGG_OF_MODE[mode]
    if agg not in AGG_MODES:
        raise ValueError(f"unknown aggregation {agg!r}; known: auto, {', '.join(AGG_MODES)}")
    return agg


def aggregate(loss_BT: Tensor, mask_BT: Tensor, agg: str, over: Denominators) -> tuple[Tensor, Mean]:
    """(loss, Mean) of a token loss [B,T].

    seq-mean-token-mean      Σ_rows (Σ_tokens / |y|) / rows      each answer weighs the same
    token-mean               Σ_tokens / tokens                   each token weighs the same (DAPO)
    seq-mean-token-sum       Σ_tokens / rows                     long answers weigh more
    seq-mean-token-sum-norm  Σ_tokens / (rows · horizon)         no length bias (Dr.GRPO, arXiv 2503.20783)

    The loss is these tensors' sum over the *global* denominator: summed over micro-batches and ranks it is the loss
    of the whole step, however it was split. (FSDP averages gradients over ranks: the caller multiplies by their
    number.) The Mean carries the local denominator instead, since means are added before they are divided.
    """
    tokens = mask_BT.bool().sum()
    length_B = mask_BT.bool().sum(-1)
    local_rows = (length_B > 0).sum()
    sums_B = masked_sum(loss_BT, mask_BT)
    rows = over.rows if over.rows is not None else local_rows.clamp(min=1)
    if agg == "seq-mean-token-mean":
        total, local, whole = (sums_B / length_B.clamp(min=1)).sum(), local_rows, rows
    elif agg == "token-mean":
        total, local = sums_B.sum(), tokens
        whole = over.tokens if over.tokens is not None else tokens.clamp(min=1)
    elif agg == "seq-mean-token-sum":
        total, local, whole = sums_B.sum(), local_rows, rows
    elif agg == "seq-mean-token-sum-norm":
        if over.horizon is None or over.horizon <= 0:
            raise ValueError("seq-mean-token-sum-norm divides by a constant length: pass horizon (tokens)")
        total, local, whole = sums_B.sum(), local_rows * over.horizon, rows * over.horizon
    else:
        raise ValueError(f"unknown aggregation {agg!r}; known: {', '.join(AGG_MODES)}")
    return total / whole, Mean(total.detach(), local.float())


def token_mean(x_BT: Tensor, mask_BT: Tensor) -> Mean:
    """The mean over response tokens as a metric, detached."""
    with torch.no_grad():
        return Mean(masked_sum(x_BT.detach().float(), mask_BT).sum(), mask_BT.bool().sum().float())
