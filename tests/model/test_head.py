"""The chunked head equals log_softmax over all logits at once: values, gradients, entropy, temperature."""

from __future__ import annotations

import pytest
import torch

from gadcli.model import chunked_logprobs as head


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(17, 6, generator=draw, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 17, (11,), generator=draw)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("by", ["both", "logp", "entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_values_and_gradients_equal_the_whole_softmax(
    temperature: float, by: str, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", {"cpu": 17 * 4})  # 4 tokens a chunk: 3 chunks, the last one short
    results = []
    for chunked in (True, False):
        hidden, weight, target = inputs(torch.float32)
        if chunked:
            logp, entropy = head.head_logprobs(hidden, weight, target, temperature, softcap)
        else:
            logits = hidden @ weight.T
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            logsoft = torch.log_softmax(logits / temperature, -1)
            logp, entropy = logsoft[torch.arange(11), target], -(logsoft.exp() * logsoft).sum(-1)
        slope = torch.linspace(-1, 2, 11)
        terms = {"logp": logp * slope, "entropy": entropy * slope.flip(0)}
        sum((t for name, t in terms.items() if by in ("both", name)), torch.zeros(())).sum().backward()
        results.append((logp.detach(), entropy.detach(), hidden.grad, weight.grad))
    for ours, whole in zip(*results, strict=True):
        assert torch.allclose(ours, whole, atol=1e-6, rtol=1e-5)


def test_chunks_are_equal_and_within_the_bound() -> None:
    assert [c.stop - c.start for c in head._chunks(1024, 170)] == [147] * 6 + [142]
    assert head._chunks(0, 170) == []


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, target = inputs(torch.float32)
    weight.requires_grad_(False)
    head.head_logprobs(hidden, weight, target)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_a_dropped_temperature_would_be_caught() -> None:
    hidden, weight, target = inputs(torch.float32)
    at_one, _ = head.head_logprobs(hidden, weight, target, 1.0)
    at_08, _ = head.head_logprobs(hidden, weight, target, 0.8)
    assert float((at_one - at_08).detach().abs().max()) > 0.01
