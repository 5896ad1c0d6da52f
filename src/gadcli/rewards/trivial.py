"""What the configured rewards give to answers that nobody wants: asked before training, shown in the plan.

A reward that a trivial answer maximises will be found by the student. Lengths are counted in words here, since no
tokenizer is loaded yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from gadcli.config.rewards import RewardConfig
from gadcli.config.schema import DataConfig
from gadcli.data.check import open_files, scan_rows
from gadcli.data.read.findings import Summary
from gadcli.rewards.answer import AnswerText
from gadcli.rewards.build import RewardSet

ROWS = 16  # prompts asked about
TEACHER = "teacher"


@dataclass(frozen=True)
class Example:
    """One row: its prompt and the teacher's answer."""

    row_id: int
    messages: list[dict[str, Any]]
    teacher: str


# What stands in for the student's answer to example i.
TRIVIAL: dict[str, Callable[[Sequence[Example], int], str]] = {
    TEACHER: lambda rows, i: rows[i].teacher,
    "empty": lambda rows, i: "",
    "prompt repeated": lambda rows, i: str(rows[i].messages[-1].get("content") or ""),
    "another row's answer": lambda rows, i: rows[(i + 1) % len(rows)].teacher,
    "endless": lambda rows, i: " ".join([rows[i].teacher] * 8),
}


def first_rows(data: DataConfig, count: int = ROWS) -> list[Example]:
    """The first usable rows of the training files (none where no file is named)."""
    if not data.train_files:
        return []
    keys, summary = (data.prompt_key, data.response_key), Summary()
    batches = scan_rows(open_files(data.train_files, keys, summary), summary, most_rows=count)
    found = (row for batch in batches for row in batch.good())
    return [Example(row.row_id, list(row.messages), row.teacher) for row in islice(found, count)]


def trivial_scores(rewards: RewardSet, rows: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Mean of each reward (but the discriminator's, which is not trained yet) for each kind of trivial answer."""
    means: dict[str, dict[str, float]] = {}
    for kind, answer in TRIVIAL.items():
        items = [_item(row, answer(rows, i), finished=kind != "endless") for i, row in enumerate(rows)]
        for name, scores in rewards.score(items).items():
            means.setdefault(name, {})[kind] = fmean(scores)
    return means


def _item(row: Example, answer: str, finished: bool) -> AnswerText:
    words = len(answer.split()) + finished
    return AnswerText(row.messages, answer, row.teacher, words, len(row.teacher.split()) + 1, finished, row.row_id)


def reward_notes(entries: Sequence[RewardConfig], data: DataConfig) -> list[str]:
    """Lines for the plan: the scores of trivial answers, and a warning where one beats the teacher's own.

    A judge is not asked, since its answers cost money. The user's functions and commands run here, so their errors are
    raised before any model is loaded.
    """
    RewardSet(entries, Path(os.devnull)).close()  # refuses a wrong address or schema; asks nobody
    rows = first_rows(data)
    asked = [entry for entry in entries if entry.kind != "judge"]  # whose answers cost money
    if not rows or not asked:
        return []
    rewards = RewardSet(asked, Path(os.devnull))  # none of these keeps a journal
    try:
        means = trivial_scores(rewards, rows)
    finally:
        rewards.close()
    weights = {entry.name: entry.weight for entry in entries}
    return [_note(name, scores, weights[name]) for name, scores in means.items()]


def _note(name: str, scores: dict[str, float], weight: float) -> str:
    shown = ", ".join(f"{kind} {value:.3g}" for kind, value in scores.items())
    sign = (weight > 0) - (weight < 0)
    better = [kind for kind, score in scores.items() if sign * (score - scores[TEACHER]) > 0]
    if better:
        return f"reward {name} pays more for {' and '.join(better)} than for the teacher's own answer: {shown}"
    return f"reward {name}, by kind of answer: {shown}"
