"""Several rewards of an answer become one: each scaled within its group or not, weighted, summed, clipped.

Legend: P prompts, G answers per prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .advantages import group_advantages

SCALES = ("none", "group")


@dataclass(frozen=True)
class Part:
    """One reward before mixing: its values [P,G], its weight, and how it is scaled."""

    values_PG: Tensor
    weight: float = 1.0
    scale: str = "none"


def scaled(part: Part) -> Tensor:
    """The values as they enter the sum, without their weight [P,G], float32.

    none    as given
    group   (r - mean) / (std + 1e-6) within the group, 0 in a group of equal values (`group_advantages`, "grpo")

    ValueError for another `scale`.
    """
    if part.scale == "none":
        return part.values_PG.detach().float()
    if part.scale == "group":
        return group_advantages(part.values_PG, "grpo")[0]
    raise ValueError(f"unknown scale {part.scale!r}; known: {', '.join(SCALES)}")


def mix_rewards(parts: list[Part], clip: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    """(reward [P,G], each part's covariance with the sum [scalar each]), float32, detached.

    reward = clamp(sum_k w_k x_k, -clip, clip), x_k = `scaled`; `clip` 0 does not clamp.
    The covariances are sums over groups and answers of w_k x_k (R - its group mean), R the unclamped sum. They add up
    to the sum's own, so that a part's divided by their total is its share of the advantage's variance.
    """
    weighted = [part.weight * scaled(part) for part in parts]
    total_PG = torch.stack(weighted).sum(0)
    deviation_PG = total_PG - total_PG.mean(-1, keepdim=True)
    covariances = [(x_PG * deviation_PG).sum() for x_PG in weighted]  # deviations sum to 0, so x needs no centring
    return (total_PG.clamp(-clip, clip) if clip else total_PG), covariances
