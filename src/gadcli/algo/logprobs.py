"""Log-probs of given tokens from logits, at a temperature. Legend: B rows, L tokens, V vocabulary."""

from __future__ import annotations

from torch import Tensor


def token_logp(logits_BLV: Tensor, ids_BL: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `ids_BL` [B,L], nats, float32; logits[b,l] must predict ids[b,l].

    The policy that sampled is the tempered one, so its log-probs must be too; only supervised loss is at 1.
    """
    logits = logits_BLV.float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits.gather(-1, ids_BL[..., None]).squeeze(-1) - logits.logsumexp(-1)


def next_token_logp(logits_BLV: Tensor, ids_BL: Tensor, temperature: float = 1.0) -> Tensor:
    """[B,L-1]: the log-prob of ids[b,l+1] given ids[b,:l+1], for a causal model's logits over `ids_BL`."""
    return token_logp(logits_BLV[:, :-1], ids_BL[:, 1:], temperature)
