"""What a step works on: prompts with teacher answers, and the student's rollouts of them, kept by prompt.

Shapes: P prompts on this rank, G answers a prompt, B = P*G rows in (prompt, answer) order, T the longest answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gadcli.model.packing import Group, mask_of

if TYPE_CHECKING:
    from gadcli.data.batches import TokenizedRow


@dataclass(frozen=True)
class Answer:
    """One sampled answer: token ids (EOS included where it ended), their log-probs at the sampling temperature."""

    ids: list[int]
    logps: list[float]
    finished: bool
    read: list[int] | None = None  # of ids, where the discriminator reads only a part (`critic.reads`)

    @property
    def read_ids(self) -> list[int]:
        """What the discriminator reads of the answer, and length metrics count."""
        return self.ids if self.read is None else self.read


@dataclass(frozen=True)
class Rollout:
    """The student's answers to a step's prompts, `answers[p][g]`, with the teacher's beside them in `rows[p]`."""

    rows: list[TokenizedRow]
    answers: list[list[Answer]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each of the B answers."""
        return [len(answer.ids) for group in self.answers for answer in group]

    @property
    def read_lengths(self) -> list[int]:
        """Tokens that the discriminator reads of each of the B answers."""
        return [len(answer.read_ids) for group in self.answers for answer in group]

    @property
    def width(self) -> int:
        return max(1, max(self.lengths))

    def mask_BT(self) -> torch.Tensor:
        return mask_of(self.lengths, self.width)

    def sampler_logp_BT(self) -> torch.Tensor:
        logp_BT = torch.zeros(len(self.lengths), self.width)
        for b, answer in enumerate(a for group in self.answers for a in group):
            logp_BT[b, : len(answer.logps)] = torch.tensor(answer.logps)
        return logp_BT

    def student_groups(self) -> list[Group]:
        """Each prompt with the student's answers."""
        return [
            Group(row.prompt_ids, [answer.ids for answer in group], row.row_id)
            for row, group in zip(self.rows, self.answers, strict=True)
        ]

    def pair_groups(self) -> list[Group]:
        """What the critic reads: each prompt with the student's answers and, last, the teacher's, which is forwarded
        once per prompt, not G times."""
        return [
            Group(row.prompt_ids, [answer.read_ids for answer in group] + [row.read_ids], row.row_id)
            for row, group in zip(self.rows, self.answers, strict=True)
        ]

    def select(self, prompts: list[int]) -> Rollout:
        return Rollout([self.rows[p] for p in prompts], [self.answers[p] for p in prompts])


def teacher_groups(rows: list[TokenizedRow]) -> list[Group]:
    """Each prompt with the teacher's answer alone (supervised training)."""
    return [Group(row.prompt_ids, [row.teacher_ids], row.row_id, row.untrained) for row in rows]


def best_groups(rollout: Rollout, scores_PG: torch.Tensor) -> list[Group]:
    """Each prompt with the one student answer that scores highest (the first of equals)."""
    best_P = scores_PG.argmax(-1).tolist()
    return [
        Group(row.prompt_ids, [group[best].ids], row.row_id)
        for row, group, best in zip(rollout.rows, rollout.answers, best_P, strict=True)
    ]
