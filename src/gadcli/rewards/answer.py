"""What a reward sees of one answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AnswerText:
    """One answer with its prompt and the teacher's answer; lengths in tokens, the end token included."""

    messages: list[dict[str, Any]]  # the prompt's chat messages
    answer: str
    teacher: str
    tokens: int
    teacher_tokens: int
    finished: bool  # ended by itself, within the limit
    row_id: int = 0

    def row(self) -> dict[str, Any]:
        """What a user's function or command gets as the row."""
        return {
            "messages": self.messages, "teacher_response": self.teacher, "row_id": self.row_id,
            "tokens": self.tokens, "teacher_tokens": self.teacher_tokens, "finished": self.finished,
        }  # fmt: skip


# Scores a batch of answers: one finite number each, in order.
Score = Callable[[Sequence[AnswerText]], list[float]]


def extracted(pattern: str, text: str) -> str | None:
    """The part of an answer that is read: the first group of `pattern` (or its whole match); None without a match."""
    if not pattern:
        return text
    match = re.search(pattern, text, re.DOTALL)
    return None if match is None else match[1 if match.re.groups else 0]
