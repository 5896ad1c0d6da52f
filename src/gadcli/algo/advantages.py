"""Group-relative advantages: how much better an answer scored than its siblings on the same prompt.

Legend: P prompts, G answers per prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mean import Mean, extreme_of, mean_of

ESTIMATORS = ("grpo", "dr_grpo", "grpo_floor")
EPSILON = 1e-6  # of the formula, in score units
# Rounding of scores, in steps of their precision: relative, and at least that of a score near 0, which is a sum over
# hidden units of order 1.
NOISE_STEPS, LEAST_NOISE_STEPS = 8.0, 4.2


def group_advantages(
    rewards_PG: Tensor,
    estimator: str = "grpo",
    *,
    sigma_min: float = 0.1,
    precision: float = torch.finfo(torch.float32).eps,
) -> tuple[Tensor, dict[str, Mean]]:
    """(advantages [P,G], metrics), float32 and detached.

    grpo        (r - mean) / (std + 1e-6), unbiased std          arXiv 2402.03300
    dr_grpo      r - mean                                        arXiv 2503.20783
    grpo_floor  (r - mean) / max(std, sigma_min)                 a quiet group is not blown up to unit spread

    `precision` is the relative step of the type that scores were computed in: a spread of a few of them is rounding.
    A group of one, or of equal scores (up to rounding), gets exact zeros and is counted in
    `critic/zero_std_fraction`. Also `critic/score_std` (mean within-group std) and `critic/advantages/mean|min|max`
    (the mean is 0 by construction; look at the spread). ValueError for an unknown estimator.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown advantage estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    r_PG = rewards_PG.detach().float()
    centred_PG = r_PG - r_PG.mean(-1, keepdim=True)
    group = r_PG.shape[-1]
    # std of one sample is undefined (nan), and we define it as no spread.
    std_P = r_PG.std(-1) if group > 1 else r_PG.new_zeros(r_PG.shape[0])
    # Equal texts scored in different micro-batches differ in the last bits; divided by their own std (plus 1e-6)
    # those bits would become advantages.
    noise_P = precision * (NOISE_STEPS * r_PG.abs().amax(-1)).clamp(min=LEAST_NOISE_STEPS)
    flat_P = (r_PG.amax(-1) - r_PG.amin(-1)) <= noise_P
    if estimator == "grpo":
        adv_PG = centred_PG / (std_P + EPSILON)[:, None]
    elif estimator == "dr_grpo":
        adv_PG = centred_PG
    else:
        adv_PG = centred_PG / std_P.clamp(min=sigma_min)[:, None]
    adv_PG = adv_PG.masked_fill(flat_P[:, None], 0.0)
    return adv_PG, {
        "critic/zero_std_fraction": mean_of(flat_P),
        "critic/score_std": mean_of(std_P),
        "critic/advantages/mean": mean_of(adv_PG),
        "critic/advantages/min": extreme_of(adv_PG, "min"),
        "critic/advantages/max": extreme_of(adv_PG, "max"),
    }
