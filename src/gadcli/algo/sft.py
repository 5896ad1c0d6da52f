"""Supervised loss on teacher text. Legend: B rows, T response tokens (padded)."""

from __future__ import annotations

from torch import Tensor

from .aggregate import Denominators, aggregate
from .mean import Mean


def sft_loss(logp_BT: Tensor, mask_BT: Tensor, tokens: float | None = None) -> tuple[Tensor, dict[str, Mean]]:
    """(loss, metrics): Σ -logp of teacher tokens (EOS included) / `tokens`, nats a token, at temperature 1.

    `tokens` is the number of teacher tokens of the whole optimiser step, over all micro-batches and ranks: a mean of
    their means would weigh short answers more, differently at each batch size and world size.
    Metrics: actor/sft_loss, and the same as actor/teacher_pg_loss for readers of older runs.
    """
    loss, mean = aggregate(-logp_BT.float(), mask_BT, "token-mean", Denominators(tokens=tokens))
    return loss, {"actor/sft_loss": mean, "actor/teacher_pg_loss": mean}
