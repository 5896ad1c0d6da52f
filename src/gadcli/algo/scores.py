"""From the critic's token values to one score a text, and how often the teacher's is the higher one.

Legend: B rows, T response tokens (padded), N pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .masking import lengths, masked_sum
from .mean import Mean

ROUNDING = 1e-6  # of float32 scores, relative, and absolute below a score of 1


def scores(values_BT: Tensor, mask_BT: Tensor, values: str) -> tuple[Tensor, Tensor]:
    """(raw_B, norm_B), float32, of values aligned with the token they have just read.

    `values` "last" keeps only the value at the last response token (EOS where the text ended), so raw is that scalar
    and holds no length; "all" sums over every response token. norm = raw / max(|y|, 1). A row without response
    tokens scores 0. Source: the GAD paper (arXiv 2511.10643) is "last". ValueError for another `values`.
    """
    mask = mask_BT.bool()
    if values == "last":
        # The last set position, whatever is padded on either side.
        positions = torch.arange(mask.shape[-1], device=mask.device)
        last_B = torch.where(mask, positions, -1).amax(-1, keepdim=True)
        keep = mask & (positions == last_B)
    elif values == "all":
        keep = mask
    else:
        raise ValueError(f"unknown critic values {values!r}; known: last, all")
    raw_B = masked_sum(values_BT.float(), keep)
    return raw_B, raw_B / lengths(mask).clamp(min=1)


def wins(t_raw_N: Tensor, s_raw_N: Tensor) -> Tensor:
    """1 where the teacher's score is the higher, 0 where the student's is, one half for a tie [N], float32, detached.

    Scores within rounding are a tie: one text at two places of a batch differs by some 1e-7, and not at random, so
    that a student who writes the teacher's very words would show as one that is told apart (or the reverse).
    """
    t, s = t_raw_N.detach(), s_raw_N.detach()
    tie = (t - s).abs() <= ROUNDING * torch.maximum(t.abs(), s.abs()).clamp(min=1.0)
    return torch.where(tie, 0.5, (t > s).float())


def d_acc(t_raw_N: Tensor, s_raw_N: Tensor) -> Mean:
    """Share of pairs whose teacher score is the higher, in [0, 1]; a tie counts one half (see `wins`)."""
    won_N = wins(t_raw_N, s_raw_N)
    return Mean(won_N.sum(), float(won_N.numel()))
