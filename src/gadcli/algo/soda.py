"""SODA: a preference for the teacher's answer over one that the student itself gave before it was trained.

Legend: N pairs (teacher's answer, snapshot's answer) to one prompt each. Log-probs are sums over an answer's tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .mean import Mean, mean_of
from .scores import wins


def soda_loss(
    teacher_N: Tensor,
    snapshot_N: Tensor,
    teacher_ref_N: Tensor,
    snapshot_ref_N: Tensor,
    *,
    beta: float,
    pairs: float | None = None,
) -> tuple[Tensor, dict[str, Mean]]:
    """(loss, metrics): Σ -log sigmoid(beta [log p/p0 (teacher's) - log p/p0 (snapshot's)]) / `pairs`, nats a pair.

    `teacher_N`, `snapshot_N` are log p of the two answers under the student (natural log, temperature 1, EOS
    included, not divided by length), `…_ref_N` the same under p0, the model the snapshot was sampled from; gradients
    flow through the first two. `pairs` counts the pairs of the whole optimiser step, over micro-batches and ranks.
    Where p is p0 the margin is 0 and the loss ln 2.

    Metrics: actor/soda_loss; actor/soda_margin, mean of beta times the bracket; actor/soda_acc, share of pairs with a
    margin above 0 (a tie, as at the start, is half); actor/soda_teacher_gain and actor/soda_snapshot_gain, means of
    log p/p0 (nats an answer): the margin also grows while both fall.
    Source: SODA (arXiv 2604.03873); the loss is DPO's (arXiv 2305.18290, eq. 7).
    """
    teacher_gain_N = teacher_N.float() - teacher_ref_N.detach().float()
    snapshot_gain_N = snapshot_N.float() - snapshot_ref_N.detach().float()
    margin_N = beta * (teacher_gain_N - snapshot_gain_N)
    loss_N = F.softplus(-margin_N)
    won_N = wins(teacher_gain_N, snapshot_gain_N)
    return loss_N.sum() / (pairs if pairs is not None else max(loss_N.numel(), 1)), {
        "actor/soda_loss": mean_of(loss_N),
        "actor/soda_margin": mean_of(margin_N),
        "actor/soda_acc": mean_of(won_N),
        "actor/soda_teacher_gain": mean_of(teacher_gain_N),
        "actor/soda_snapshot_gain": mean_of(snapshot_gain_N),
    }
