"""How prompts and their answers are laid out for a forward pass: packed into one row, each prompt once.

Shapes: R rows (1 where packed), L tokens of a row, N predicted answer tokens of all rows in (group, answer, position)
order: all of an answer's tokens but the untrained ones (`Group.untrained`).

A group's prompt is forwarded once, its answers behind it, and the next group behind those: no token is padding. Each
answer attends to its prompt and to itself (`engine.attention`), and its positions restart after the prompt, so every
answer sees exactly what it would see alone. Models whose attention cannot do that get padded rows, an answer each.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Group:
    """One prompt with its answers (token ids, EOS included where the text ended).

    `row_id` names the row of the data in errors. `untrained` are spans of the only answer that are forwarded without
    being predicted: other speakers' turns (`data.turns=each`).
    """

    prompt_ids: list[int]
    answers: list[list[int]]
    row_id: int = -1
    untrained: tuple[tuple[int, int], ...] = ()

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.answers))

    def predicted(self, answer: list[int]) -> list[int]:
        """The positions of an answer's tokens that are predicted: all but the untrained ones."""
        edges = [0, *(edge for span in self.untrained for edge in span), len(answer)]
        return [i for start, end in zip(edges[::2], edges[1::2], strict=True) for i in range(start, end)]


@dataclass(frozen=True)
class Layout:
    """Groups as tensors, ready for a model: what to forward, and where the answers' tokens are.

    ids_RL, positions_RL : int64. spans : for each group of the packed row its prompt's tokens and those of each
    answer that has any; None for padded rows, whose real tokens are True in mask_RL.
    own_N : flat index into R*L of each answer token. predictor_N : flat index of the token before it (whose hidden
    state predicts it; for an answer's first token that is the prompt's last). target_N : the token's id.
    lengths : predicted tokens of each answer, in (group, answer) order. kept : what a device derives from it once (its
    masks).
    """

    ids_RL: torch.Tensor
    positions_RL: torch.Tensor
    mask_RL: torch.Tensor | None
    spans: tuple[tuple[int, ...], ...] | None
    own_N: torch.Tensor
    predictor_N: torch.Tensor
    target_N: torch.Tensor
    lengths: list[int]
    kept: dict[Any, Any] = field(default_factory=dict, compare=False)

    def to(self, device: torch.device) -> Layout:
        """The same layout with its tensors on `device`."""
        names = ("ids_RL", "positions_RL", "own_N", "predictor_N", "target_N", "mask_RL")
        present = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        moved: dict[str, Any] = dict(zip(present, to_device(tuple(present.values()), device), strict=True))
        return replace(self, **moved, kept={})


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Host tensors on `device`; the host does not wait for the copies to a GPU, which only pinned memory allows."""
    if device.type == "cpu":
        return tuple(tensors)
    return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)


def lay_out(groups: Sequence[Group]) -> Layout:
    """Pack groups into one row with their prompts shared. An empty answer takes no token and has length 0."""
    ids: list[int] = []
    positions: list[int] = []
    own: list[int] = []
    predictor: list[int] = []
    target: list[int] = []
    lengths: list[int] = []
    spans = []
    for group in groups:
        prompt_len = len(group.prompt_ids)
        ids += group.prompt_ids
        positions += range(prompt_len)
        last_of_prompt = len(ids) - 1
        for answer in group.answers:
            if not answer:
                lengths.append(0)
                continue
            first = len(ids)
            predicted = group.predicted(answer)
            own += [first + i for i in predicted]
            predictor += [first + i - 1 if i else last_of_prompt for i in predicted]
            target += [answer[i] for i in predicted]
            lengths.append(len(predicted))
            ids += answer
            positions += range(prompt_len, prompt_len + len(answer))
        sizes = [len(answer) for answer in group.answers if answer]
        # One answer alone simply goes on where its prompt ends.
        spans.append((prompt_len + sizes[0],) if len(sizes) == 1 else (prompt_len, *sizes))
    return Layout(
        _int64(ids)[None],
        _int64(positions)[None],
        None,
        tuple(spans),
        _int64(own),
        _int64(predictor),
        _int64(target),
        lengths,
    )


def lay_out_padded(groups: Sequence[Group]) -> Layout:
    """Every answer in a row of its own behind its own prompt, zeros behind: what any causal model can take."""
    rows = unshared(groups)
    longest = max(row.n_tokens for row in rows)
    ids_RL = torch.zeros(len(rows), longest, dtype=torch.int64)
    own: list[int] = []
    predicted = [row.predicted(row.answers[0]) for row in rows]
    for index, row in enumerate(rows):
        ids_RL[index, : row.n_tokens] = torch.tensor(row.prompt_ids + row.answers[0])
        first = index * longest + len(row.prompt_ids)
        own += [first + i for i in predicted[index]]
    own_N = _int64(own)
    return Layout(
        ids_RL,
        torch.arange(longest).expand(len(rows), -1),
        torch.arange(longest)[None, :] < _int64([row.n_tokens for row in rows])[:, None],
        None,
        own_N,
        own_N - 1,
        _int64([row.answers[0][i] for row, chosen in zip(rows, predicted, strict=True) for i in chosen]),
        list(map(len, predicted)),
    )


def _int64(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def unshared(groups: Sequence[Group]) -> list[Group]:
    """The same answers, each with a prompt of its own: the reference that sharing must agree with."""
    return [
        Group(group.prompt_ids, [answer], group.row_id, group.untrained) for group in groups for answer in group.answers
    ]


def micro_batches(tokens: Sequence[int], max_tokens: int, at_least: int = 1) -> list[list[int]]:
    """Split items of these sizes into as few lists of indices as keep each list's sum within `max_tokens`, balanced.

    Longest first, each to the list that is shortest so far: the lists then are of like size, so that none sets the
    peak of memory alone. An item over the budget goes alone. `at_least` asks for that many lists, items permitting.
    """
    order = sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))
    alone = [size for size in tokens if size > max_tokens]
    count = min(len(tokens), max(at_least, len(alone) + math.ceil((sum(tokens) - sum(alone)) / max_tokens)))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        sums = [(0, index) for index in range(count)]
        for item in order:
            total, index = heapq.heappop(sums)
            bins[index].append(item)
            heapq.heappush(sums, (total + tokens[item], index))
        if all(len(bins[index]) == 1 or total <= max_tokens for total, index in sums):
            return [sorted(items) for items in bins]
        count += 1


def to_padded(values_N: torch.Tensor, lengths: Sequence[int], width: int) -> torch.Tensor:
    """Flat per-token values [N] as rows [B, width], zeros behind each row's end."""
    rows = torch.split(values_N, list(lengths))
    padded_BT = values_N.new_zeros(len(lengths), width)
    for index, row in enumerate(rows):
        padded_BT[index, : len(row)] = row
    return padded_BT


def mask_of(lengths: Sequence[int], width: int) -> torch.Tensor:
    """Response mask [B, width] of rows with these lengths, float32."""
    return (torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]).float()
