"""Log-probabilities from hidden states through the vocabulary head, without ever holding all logits.

Shapes: N tokens, H hidden size, V vocabulary. Logits exist for one chunk of tokens at a time, in the forward pass and
again in the backward pass, where they are computed anew: memory is bounded by chunk * V whatever N is.
"""

from __future__ import annotations

import math
from typing import Any

import torch

# Logits alive at once, in float32, with as much for each of three temporaries: what a CPU's caches like, and on GPUs
# about a thousand rows of a large vocabulary, from which on products run at full speed (`gad doctor --gpu` times it).
CHUNK_LOGITS = {"cpu": 8 * 2**20, "cuda": 128 * 2**20}


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        target_N: torch.Tensor,
        temperature: float,
        softcap: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logp_N = torch.empty(len(hidden_NH), dtype=torch.float32, device=hidden_NH.device)
        entropy_N = torch.empty_like(logp_N)
        for rows in _chunks(len(hidden_NH), chunk):
            logsoft, _ = _log_softmax(hidden_NH[rows], weight_VH, temperature, softcap)
            logp_N[rows] = logsoft.gather(1, target_N[rows, None])[:, 0]
            entropy_N[rows] = -logsoft.exp().mul_(logsoft).sum(1)
        ctx.save_for_backward(hidden_NH, weight_VH, target_N)
        ctx.temperature, ctx.softcap, ctx.chunk = temperature, softcap, chunk
        ctx.set_materialize_grads(False)  # no bonus on the entropy: no gradient of it, rather than one of zeros
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        # d logits / d (logits / T) is 1 / T: cheaper on a number a token than on its V logits.
        grad_logp_N, grad_entropy_N = (None if grad is None else grad / ctx.temperature for grad in grads)
        hidden_NH, weight_VH, target_N = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden_NH) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(hidden_NH), ctx.chunk):
            logsoft, slope = _log_softmax(hidden_NH[rows], weight_VH, ctx.temperature, ctx.softcap)
            by_entropy = None if grad_entropy_N is None else grad_entropy_N[rows, None]
            by_logp = None if grad_logp_N is None else grad_logp_N[rows, None]
            grad = _logits_grad(logsoft, target_N[rows, None], by_logp, by_entropy)
            if slope is not None:
                grad *= slope
            grad = grad.to(hidden_NH.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight_VH
            if grad_weight is not None:
                _add_product(grad_weight, grad, hidden_NH[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype), None, None, None, None


def _logits_grad(
    logsoft: torch.Tensor, target: torch.Tensor, by_logp: torch.Tensor | None, by_entropy: torch.Tensor | None
) -> torch.Tensor:
    """Gradient of the chunk's tempered logits; `logsoft` is used up.

    d logp / d logits = onehot - p;  d entropy / d logits = -p (log p + entropy).
    """
    if by_entropy is None:
        grad = logsoft.exp_()
    else:
        grad = logsoft.exp()
        logsoft += -(grad * logsoft).sum(1, keepdim=True)  # log p + entropy
        entropy_part = logsoft.mul_(grad).mul_(by_entropy)
    if by_logp is None:
        return entropy_part.neg_()
    grad.mul_(-by_logp).scatter_add_(1, target, by_logp)
    return grad if by_entropy is None else grad.sub_(entropy_part)


def _add_product(total_VH: torch.Tensor, grad_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
    """total += grad^T hidden, in place: a product of its own would be as large as the head, once a chunk."""
    if grad_CV.dtype == total_VH.dtype:
        total_VH.addmm_(grad_CV.T, hidden_CH)
    elif grad_CV.device.type == "cuda":  # adds up in float32 without a product in bf16 between
        torch.addmm(total_VH, grad_CV.T, hidden_CH, out_dtype=torch.float32, out=total_VH)
    else:
        total_VH += (grad_CV.T @ hidden_CH).float()


def _chunks(n: int, largest: int) -> list[slice]:
    """Equal chunks: a last one of a few tokens would read the whole head for them."""
    size = max(1, math.ceil(n / max(1, math.ceil(n / largest))))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _log_softmax(
    hidden_CH: torch.Tensor, weight_VH: torch.Tensor, temperature: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(log softmax of the capped and tempered logits, the cap's derivative or None where logits are not capped)."""
    logits = (hidden_CH @ weight_VH.T).float()
    slope = None
    if softcap:
        squashed = torch.tanh(logits / softcap)
        slope = 1 - squashed.square()
        logits = softcap * squashed
    if temperature != 1.0:
        logits /= temperature
    return torch.log_softmax(logits, dim=1), slope


def head_logprobs(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_N: torch.Tensor,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each distribution, at logits / temperature.

    `softcap` c (0: none) makes logits c * tanh(logits / c) first, as Gemma does. Returns (logp_N in (-inf, 0],
    entropy_N in [0, ln V]), float32, in nats. Gradients reach `hidden_NH` and `weight_VH`.
    """
    chunk = max(1, CHUNK_LOGITS[weight_VH.device.type] // weight_VH.shape[0])
    logp_N, entropy_N = _ChunkedLogprobs.apply(hidden_NH, weight_VH, target_N, temperature, softcap, chunk)
    return logp_N, entropy_N
