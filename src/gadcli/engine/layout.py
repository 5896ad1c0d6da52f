"""How prompts and their answers are laid out for a forward pass: one row a prompt, its answers behind it.

Shapes: R rows, L tokens of the longest row, N answer tokens of all rows in (row, answer, position) order.

A group's prompt is forwarded once. Each answer attends to the prompt and to itself, and its positions
restart after the prompt, so every answer sees exactly what it would see alone. This module is the only one that
knows that prefixes are shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Group:
    """One prompt with its answers (token ids, EOS included where the text ended).

    `row_id` names the row of the data in errors.
    """

    prompt_ids: list[int]
    answers: list[list[int]]
    row_id: int = -1

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.answers))


@dataclass(frozen=True)
class Layout:
    """Groups as tensors, ready for a model: what to forward, and where the answers' tokens are.

    ids_RL, positions_RL : int64. mask_R1LL : bool, True where a query (row) may see a key (column).
    own_N : flat index into R*L of each answer token. predictor_N : flat index of the token before it (whose hidden
    state predicts it; for an answer's first token that is the prompt's last). target_N : the token's id.
    lengths : tokens of each answer, in (row, answer) order.
    """

    ids_RL: torch.Tensor
    positions_RL: torch.Tensor
    mask_R1LL: torch.Tensor
    own_N: torch.Tensor
    predictor_N: torch.Tensor
    target_N: torch.Tensor
    lengths: list[int]

    def to(self, device: torch.device) -> Layout:
        """The same layout with its tensors on `device`."""
        names = ("ids_RL", "positions_RL", "mask_R1LL", "own_N", "predictor_N", "target_N")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def lay_out(groups: Sequence[Group]) -> Layout:
    """Lay groups out with their prompts shared. An empty answer takes no token and has length 0."""
    longest = max(group.n_tokens for group in groups)
    ids_RL = torch.zeros(len(groups), longest, dtype=torch.int64)
    positions_RL = torch.zeros_like(ids_RL)
    segment_RL = torch.full_like(ids_RL, -1)  # 0 the prompt, 1.. the answers, -1 padding
    own: list[int] = []
    predictor: list[int] = []
    target: list[int] = []
    for row, group in enumerate(groups):
        start, prompt_len = row * longest, len(group.prompt_ids)
        tokens = list(group.prompt_ids)
        segments = [0] * prompt_len
        positions = list(range(prompt_len))
        for index, answer in enumerate(group.answers, start=1):
            first = start + len(tokens)
            own.extend(range(first, first + len(answer)))
            if answer:
                predictor.append(start + prompt_len - 1)
                predictor.extend(range(first, first + len(answer) - 1))
            target.extend(answer)
            tokens.extend(answer)
            segments.extend([index] * len(answer))
            positions.extend(range(prompt_len, prompt_len + len(answer)))
        ids_RL[row, : len(tokens)] = torch.tensor(tokens)
        positions_RL[row, : len(tokens)] = torch.tensor(positions)
        segment_RL[row, : len(tokens)] = torch.tensor(segments)
    return Layout(
        ids_RL,
        positions_RL,
        _visibility(segment_RL),
        torch.tensor(own, dtype=torch.int64),
        torch.tensor(predictor, dtype=torch.int64),
        torch.tensor(target, dtype=torch.int64),
        [len(answer) for group in groups for answer in group.answers],
    )


def _visibility(segment_RL: torch.Tensor) -> torch.Tensor:
    """Causal, and only within the prompt and one's own answer; padding sees itself (a softmax needs one key)."""
    query, key = segment_RL[:, :, None], segment_RL[:, None, :]
    length = segment_RL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = causal & (query >= 0) & ((key == 0) | (key == query))
    return (seen | torch.eye(length, dtype=torch.bool)).unsqueeze(1)


def unshared(groups: Sequence[Group]) -> list[Group]:
    """The same answers, each with a prompt of its own: the reference that sharing must agree with."""
    return [Group(group.prompt_ids, [answer], group.row_id) for group in groups for answer in group.answers]


def micro_batches(groups: Sequence[Group], max_tokens: int) -> Iterator[list[int]]:
    """Split groups into lists of indices whose padded size (rows x longest) stays within `max_tokens`.

    Longest first, so that rows of like length share a batch and little is padded. A group over the budget goes alone.
    """
    order = sorted(range(len(groups)), key=lambda i: -groups[i].n_tokens)
    batch: list[int] = []
    for index in order:
        if batch and groups[batch[0]].n_tokens * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


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
