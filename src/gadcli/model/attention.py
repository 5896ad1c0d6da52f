"""Attention over a packed row: every answer attends to its prompt and to itself, and nothing else is computed.

Shapes: L tokens of the row, H query heads, K key heads, D head size; P tokens of a prompt, T of one answer.

Registered with transformers under two names, so that models of every family call it in place of their own attention:
SHARED (fused kernels) and SHARED_PLAIN (plain tensor operations, which have a second derivative). Without a layout both
behave as an ordinary attention with an ordinary mask, so a model loaded with them can be used as any other.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from gadcli.model.block_mask import flex_mask
from gadcli.model.packing import Layout

SHARED, SHARED_PLAIN = "gad_shared", "gad_shared_plain"


def shared_attention(
    module: Any,
    query_1HLD: Tensor,
    key_1KLD: Tensor,
    value_1KLD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention interface asks for: ([1, L, H, D], None). Dropout is ignored: there is none here."""
    plain = bool(softcap) or module.config._attn_implementation == SHARED_PLAIN
    attend = _Attend(plain, scaling, softcap)
    if layout is None or layout.spans is None:  # an ordinary forward pass; its mask, if any, is a boolean one
        out = attend(query_1HLD, key_1KLD, value_1KLD, attention_mask)
    elif query_1HLD.device.type == "cuda" and not plain:
        out = _flex(query_1HLD, key_1KLD, value_1KLD, layout, scaling, sliding_window)
    else:
        out = _by_span(attend, query_1HLD, key_1KLD, value_1KLD, layout.spans, sliding_window)
    return out.transpose(1, 2).contiguous(), None


def _by_span(
    attend: _Attend, query: Tensor, key: Tensor, value: Tensor, spans: tuple[tuple[int, ...], ...], window: int | None
) -> Tensor:
    """One call for a prompt and one for each of its answers: no score is computed that the mask would throw away.

    A single mask over the whole row computes L * L scores; with 8 answers that is four times what is needed, and took
    as long as half of the layer's matrix products. Splits, not slices: a slice's gradient is a zero-filled copy of all.
    """
    sizes = [size for group in spans for size in group]
    parts = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    out = []
    for prompt, *answers in spans:
        q, prompt_k, prompt_v = next(parts)
        out.append(attend(q, prompt_k, prompt_v, visible(0, prompt, window, q.device)))
        sight = visible(prompt, max(answers, default=0), window, q.device)
        for size in answers:
            q, k, v = next(parts)
            keys, values = torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2)
            out.append(attend(q, keys, values, None if sight is None else sight[:size, : prompt + size]))
    return torch.cat(out, 2)


def visible(prompt: int, size: int, window: int | None, device: torch.device) -> Tensor | None:
    """[T, P+T], True where the i-th of `size` tokens behind `prompt` sees a key; None for plain causal attention."""
    if not prompt and (window is None or size <= window):
        return None
    here = torch.arange(prompt, prompt + size, device=device)[:, None]
    there = torch.arange(prompt + size, device=device)[None, :]
    seen = there <= here
    return seen if window is None else seen & (here - there < window)


class _Attend:
    """Attention of one block of queries; a mask of None is the causal one."""

    def __init__(self, plain: bool, scaling: float | None, softcap: float | None) -> None:
        self.plain, self.scaling, self.softcap = plain, scaling, softcap

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if self.plain:
            return self._plain(query, key, value, mask)
        grouped = query.shape[1] != key.shape[1]
        if mask is None:
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=query.shape[2] > 1, scale=self.scaling, enable_gqa=grouped
            )
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling, enable_gqa=grouped)

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if self.scaling is None else self.scaling)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is None:
            mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ value


VARIANTS = 64  # of the compiled kernel: head shapes x windows x with and without gradients x short and long rows


@functools.cache
def _compiled_flex() -> Any:
    """flex attention as one kernel, compiled once; more than `VARIANTS` of it raise.

    Dynamo's own limit is 8, behind which it falls back, silently, to an attention that holds all L * L scores.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = VARIANTS
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None
) -> Tensor:
    """The same on GPUs: one kernel over the whole row that skips blocks nobody sees."""
    mask = layout.kept.get(window)
    if mask is None:
        mask = layout.kept[window] = flex_mask(layout, window, query.device)
    grouped = query.shape[1] != key.shape[1]
    return _compiled_flex()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)


def register() -> None:
    """Make both names known to transformers, with the masks of its own sdpa attention for ordinary use."""
    for name in (SHARED, SHARED_PLAIN):
        AttentionInterface.register(name, shared_attention)
        AttentionMaskInterface.register(name, sdpa_mask)


register()
