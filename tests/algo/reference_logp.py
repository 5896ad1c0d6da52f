"""The plainest log-probs from whole logits, which other formulas are held against. B rows, L tokens, V vocabulary."""

from __future__ import annotations

from torch import Tensor


def token_logp(logits_BLV: Tensor, ids_BL: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `ids_BL`, nats, float32; logits[b,l] must predict ids[b,l]."""
    return (logits_BLV.float() / temperature).log_softmax(-1).gather(-1, ids_BL[..., None]).squeeze(-1)


def next_token_logp(logits_BLV: Tensor, ids_BL: Tensor, temperature: float = 1.0) -> Tensor:
    """[B,L-1]: the log-prob of ids[b,l+1] given ids[b,:l+1], for a causal model's logits over `ids_BL`."""
    return token_logp(logits_BLV[:, :-1], ids_BL[:, 1:], temperature)
