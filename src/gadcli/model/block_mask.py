"""The visibility of a packed row as flex attention's block mask, from the spans alone: no L x L tensor is ever made.

torch's `create_block_mask` evaluates the mask at every pair of tokens: 16,384 tokens are 268 million pairs, several
times per micro-batch. Here the host walks over the spans; what reaches the device are lists of blocks.
Shapes: L tokens of the row, S of a block, Q blocks of the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gadcli.model.packing import Layout, to_device

BLOCK = 128  # tokens; flex attention's own block


def flex_mask(layout: Layout, window: int | None, device: torch.device, block: int = BLOCK) -> Any:
    """Same group, and the prompt or one's own answer, not in the future, and within the window if there is one."""
    from torch.nn.attention.flex_attention import BlockMask

    assert layout.spans is not None
    length = sum(map(sum, layout.spans))
    some_QQ, full_QQ = block_visibility(layout.spans, window, block)
    segment_L, prompt_L, position_L = to_device(_token_tables(layout.spans), device)

    def seen(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (segment_L[k] == segment_L[q]) | (segment_L[k] == prompt_L[q])
        near = position_L[q] - position_L[k] < window if window is not None else True
        return (k <= q) & own & near

    counts, indices = _block_lists(some_QQ & ~full_QQ)
    full_counts, full_indices = _block_lists(full_QQ)
    count, index, full_count, full_index = to_device((counts, indices, full_counts, full_indices), device)
    return BlockMask.from_kv_blocks(
        count, index, full_count, full_index, BLOCK_SIZE=block, mask_mod=seen, seq_lengths=(length, length)
    )


def block_visibility(spans: tuple[tuple[int, ...], ...], window: int | None, block: int) -> tuple[Tensor, Tensor]:
    """(whether any query of block q sees any key of block k, whether every one sees every one), [Q, Q] each, bool."""
    length = sum(map(sum, spans))
    blocks = -(-length // block)
    some = torch.zeros(blocks, blocks, dtype=torch.bool)
    seen_by_all = torch.full((blocks, blocks), block)  # keys of a block that all of a block's queries see
    if length % block:  # queries that are not there see nothing
        seen_by_all[-1] = 0
    edges = torch.arange(blocks) * block
    for segment in _segments(spans):
        for row in range(segment.start // block, (segment.end - 1) // block + 1):
            first, last = max(segment.start, row * block), min(segment.end, (row + 1) * block) - 1
            counted = torch.zeros(blocks, dtype=torch.int64)
            for (begin, begin_of_all), (end_of_all, end) in zip(
                zip(segment.from_key(first, window), segment.from_key(last, window), strict=True),
                zip(segment.to_key(first), segment.to_key(last), strict=True),
                strict=True,
            ):
                some[row] |= _overlap(edges, block, begin, end) > 0
                counted += _overlap(edges, block, begin_of_all, end_of_all)
            seen_by_all[row] = torch.minimum(seen_by_all[row], counted)
    return some, seen_by_all == block


@dataclass(frozen=True)
class Segment:
    """A prompt or an answer, tokens [start, end) of the row, and the prompt before it (of no tokens for a prompt)."""

    start: int
    end: int
    prompt_start: int
    prompt: int

    def from_key(self, query: int, window: int | None) -> tuple[int, int]:
        """The first key that a query sees of its own segment and of the prompt. A window looks back over both."""
        if window is None:
            return self.start, self.prompt_start
        own = query + 1 - window
        return max(self.start, own), max(self.prompt_start, own - self.start + self.prompt_start + self.prompt)

    def to_key(self, query: int) -> tuple[int, int]:
        """Behind the last key that it sees of either."""
        return query + 1, self.prompt_start + self.prompt


def _overlap(edges: Tensor, block: int, begin: int, end: int) -> Tensor:
    """How many of the tokens [begin, end) lie in each block."""
    return (torch.clamp(edges + block, max=end) - torch.clamp(edges, min=begin)).clamp(min=0)


def _segments(spans: tuple[tuple[int, ...], ...]) -> Iterator[Segment]:
    start = 0
    for prompt, *answers in spans:
        prompt_start = start
        yield Segment(start, start + prompt, start, 0)
        start += prompt
        for size in answers:
            yield Segment(start, start + size, prompt_start, prompt)
            start += size


def _token_tables(spans: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Of every token [L]: its segment's number, its prompt's segment's, and its position behind the prompt's start."""
    segment: list[int] = []
    prompts: list[int] = []
    position: list[int] = []
    number = 0
    for prompt, *answers in spans:
        own = number
        for index, size in enumerate((prompt, *answers)):
            segment += [number] * size
            prompts += [own] * size
            position += range(prompt if index else 0, (prompt if index else 0) + size)
            number += 1
    return torch.tensor(segment), torch.tensor(prompts), torch.tensor(position)


def _block_lists(present_QQ: Tensor) -> tuple[Tensor, Tensor]:
    """(number of blocks per row [1, 1, Q], their indices first [1, 1, Q, Q]), int32, as `BlockMask` wants them."""
    order = torch.sort(present_QQ.to(torch.int8), dim=1, descending=True, stable=True).indices
    return present_QQ.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
