"""Log-probabilities from hidden states through the vocabulary head, without ever holding all logits.

Shapes: N tokens, H hidden size, V vocabulary. Logits exist for one chunk of tokens at a time, in the forward pass and
again in the backward pass, where they are computed anew: memory is bounded by chunk * V whatever N is.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_LOGITS = 8 * 1024 * 1024  # logits alive at once (32 MiB in float32, and as much for each of a few temporaries)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        target_N: torch.Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logp_N = torch.empty(len(hidden_NH), dtype=torch.float32, device=hidden_NH.device)
        entropy_N = torch.empty_like(logp_N)
        for rows in _chunks(len(hidden_NH), chunk):
            logsoft = _log_softmax(hidden_NH[rows], weight_VH, temperature)
            logp_N[rows] = logsoft.gather(1, target_N[rows, None])[:, 0]
            entropy_N[rows] = -(logsoft.exp() * logsoft).sum(1)
        ctx.save_for_backward(hidden_NH, weight_VH, target_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        grad_logp_N, grad_entropy_N = grads
        hidden_NH, weight_VH, target_N = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden_NH) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with_entropy = bool(grad_entropy_N.any())
        for rows in _chunks(len(hidden_NH), ctx.chunk):
            logsoft = _log_softmax(hidden_NH[rows], weight_VH, ctx.temperature)
            prob = logsoft.exp()
            # d logp / d logits = onehot - p;  d entropy / d logits = -p (log p + entropy)
            grad = prob * -grad_logp_N[rows, None]
            grad.scatter_add_(1, target_N[rows, None], grad_logp_N[rows, None])
            if with_entropy:
                entropy = -(prob * logsoft).sum(1, keepdim=True)
                grad -= grad_entropy_N[rows, None] * prob * (logsoft + entropy)
            grad = (grad / ctx.temperature).to(hidden_NH.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight_VH
            if grad_weight is not None:
                grad_weight += (grad.T @ hidden_NH[rows]).float()
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype), None, None, None


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _log_softmax(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = (hidden_CH @ weight_VH.T).float()
    if temperature != 1.0:
        logits /= temperature
    return torch.log_softmax(logits, dim=1)


def head_logprobs(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, target_N: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each distribution, at logits / temperature.

    Returns (logp_N in (-inf, 0], entropy_N in [0, ln V]), float32, in nats. Gradients reach `hidden_NH` and
    `weight_VH`.
    """
    chunk = max(1, CHUNK_LOGITS // weight_VH.shape[0])
    logp_N, entropy_N = _ChunkedLogprobs.apply(hidden_NH, weight_VH, target_N, temperature, chunk)
    return logp_N, entropy_N
