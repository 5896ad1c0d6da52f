"""Policy losses: GSPO and its token form, GRPO, PPO, DAPO, all clipped importance-sampled policy gradients.

Legend: B rows, T response tokens (padded). delta = logp - old_logp, |y| = response tokens of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .aggregate import AGG_OF_MODE, Denominators, aggregate, resolve_agg, token_mean
from .masking import masked_mean
from .mean import Mean

POLICY_LOSSES = tuple(AGG_OF_MODE)
SEQUENCE_LEVEL = ("gspo", "gspo_token")
MAX_LOG_RATIO = 10.0  # of an answer
# Of a token. Not of the papers: clips bound the loss anyway, but 0 * inf in exp's gradient would be nan.
MAX_TOKEN_LOG_RATIO = 20.0


def policy_loss(
    mode: str,
    logp_BT: Tensor,
    old_BT: Tensor,
    adv_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_c: float = 3.0,
    agg: str = "auto",
    weights_BT: Tensor | None = None,
    rows: float | None = None,
    tokens: float | None = None,
    horizon: float | None = None,
) -> tuple[Tensor, dict[str, Mean]]:
    """(loss, metrics) of one micro-batch; gradients flow through `logp_BT` alone.

    gspo        r = exp(min(sg(k) + logp - sg(logp), 10)), k = Σ delta / max(|y|, 1): one ratio an answer, whose value
                every token shares and whose gradient every token feeds   (arXiv 2507.18071, eq. 5 and 14)
    gspo_token  the same, for advantages that differ from token to token
    grpo, ppo   r = exp(delta) a token, with dual clip; they differ in what agg="auto" means
    dapo        the same over all tokens alike; its clip-higher is clip_high > clip_low   (arXiv 2503.14476)

    loss of a token = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); with dual clip (arXiv 1912.09729), where
    A < 0, no more than -A clip_c. `adv_BT` is [B,T] or [B]. Log-probs are at the sampling temperature, natural log.
    `weights_BT` (detached) multiply the token losses: importance correction. `agg`, `rows`, `tokens`, `horizon`: see
    `aggregate`. On-policy (logp equal to old) r is exactly 1 and the loss -mean A, about 0, but its gradient is not.

    Metrics: actor/pg_loss; actor/pg_clipfrac, the share of tokens whose gradient a clip has killed (so not a ratio
    outside the range on the side that still learns); actor/ppo_kl, mean of old - logp.
    """
    if mode not in AGG_OF_MODE:
        raise ValueError(f"unknown policy loss {mode!r}; known: {', '.join(POLICY_LOSSES)}")
    mask = mask_BT.bool()
    # Masked before exp: what the forward left under the padding must not reach the loss, nor nan its gradient.
    delta_BT = (logp_BT.float() - old_BT.detach().float()).masked_fill(~mask, 0.0)
    adv = adv_BT.detach().float()
    adv = adv[:, None].expand_as(delta_BT) if adv.dim() == 1 else adv
    if mode in SEQUENCE_LEVEL:
        k_B1 = masked_mean(delta_BT, mask).detach()[:, None]
        log_ratio_BT, limit = delta_BT - delta_BT.detach() + k_B1, MAX_LOG_RATIO
        worst_BT = None
    else:
        log_ratio_BT, limit = delta_BT, MAX_TOKEN_LOG_RATIO
        worst_BT = -adv * clip_c
    ratio_BT = log_ratio_BT.clamp(max=limit).exp()
    loss_BT = torch.maximum(-adv * ratio_BT, -adv * ratio_BT.clamp(1 - clip_low, 1 + clip_high))
    with torch.no_grad():
        killed_BT = ((adv > 0) & (ratio_BT > 1 + clip_high)) | ((adv < 0) & (ratio_BT < 1 - clip_low))
        killed_BT |= (adv != 0) & (log_ratio_BT > limit)
    if worst_BT is not None:
        loss_BT = torch.where(adv < 0, torch.minimum(loss_BT, worst_BT), loss_BT)
        killed_BT |= (adv < 0) & (ratio_BT > clip_c)
    if weights_BT is not None:
        loss_BT = loss_BT * weights_BT.detach()
    loss, pg_loss = aggregate(loss_BT, mask, resolve_agg(mode, agg), Denominators(rows, tokens, horizon))
    return loss, {
        "actor/pg_loss": pg_loss,
        "actor/pg_clipfrac": token_mean(killed_BT, mask),
        "actor/ppo_kl": token_mean(-delta_BT, mask),
    }
