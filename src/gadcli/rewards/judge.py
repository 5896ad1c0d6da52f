"""A judge as a reward: an OpenAI-compatible endpoint grades each answer from 1 to 10.

Grades are journalled as they come, so that a run that is killed within a batch pays for no answer twice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from gadcli.config.rewards import RewardConfig
from gadcli.endpoint.ask import Messages, Tally, ask_all
from gadcli.endpoint.client import ChatEndpoint
from gadcli.endpoint.journal import Journal, request_key
from gadcli.errors import ConfigError
from gadcli.rewards.answer import AnswerText

KEY_VARIABLE = "GAD_JUDGE_API_KEY"
INSTRUCTIONS = (
    "You grade an answer to a request. Judge correctness, helpfulness and how well it does what was asked, not its "
    "length. End with exactly one grade from [[1]] (useless) to [[10]] (could not be better)."
)
TEMPLATE = "# Request\n{prompt}\n\n# Answer\n{answer}"
GRADE = re.compile(r"\[\[\s*(10|[1-9])\s*\]\]")
MOST_TOKENS = 512
WORKERS = 8
FEWEST_GRADES = 0.5  # of a batch; with fewer the judge does not understand what it is asked


class Judge:
    """A `judge` reward: (grade - 1) / 9, in [0, 1]."""

    def __init__(self, spec: RewardConfig, journal: Path) -> None:
        self.spec, self.journal = spec, journal
        params = {"temperature": 0, "max_tokens": MOST_TOKENS}
        key = os.environ.get(KEY_VARIABLE, "")
        self.endpoint = ChatEndpoint(
            spec.endpoint, spec.model, key, KEY_VARIABLE, params, optional=("temperature",), timeout_s=spec.timeout_s
        )

    def __call__(self, items: Sequence[AnswerText]) -> list[float]:
        """One grade per answer; a reply without a grade counts as the mean of the batch's others.

        Raises DataError where the endpoint does not answer, ConfigError where it refuses the request or grades fewer
        than half of a batch. What was graded so far stays in the journal.
        """
        asked = [self._messages(item) for item in items]
        keys = [request_key(self.spec.model, messages, self.endpoint.params) for messages in asked]
        with Journal(self.journal, wait=True) as journal:
            missing = {key: m for key, m in zip(keys, asked, strict=True) if _grade(journal, key) is None}
            tally = Tally(total=len(items), reused=len(items) - len(missing))
            ask_all(self.endpoint, missing.items(), journal, tally, concurrency=WORKERS)
            tally.raise_unanswered()
            grades = [_grade(journal, key) for key in keys]
        known = [grade for grade in grades if grade is not None]
        if len(known) < FEWEST_GRADES * len(grades):
            raise ConfigError(
                f"reward {self.spec.name}: {self.spec.model} graded {len(known)} of {len(grades)} answers",
                f"its replies are in {self.journal}; take another model, or take it out of `rewards`",
            )
        return [fmean(known) if grade is None else grade for grade in grades]

    @staticmethod
    def _messages(item: AnswerText) -> Messages:
        prompt = "\n\n".join(str(message.get("content") or "") for message in item.messages)
        text = TEMPLATE.format(prompt=prompt, answer=item.answer)
        return [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": text}]

    def close(self) -> None:
        """Nothing stays open between batches."""


def _grade(journal: Journal, key: str) -> float | None:
    """The last grade in a journalled reply (or, without text, in its reasoning); None without one."""
    entry = journal.get(key) if key in journal else {}
    found = GRADE.findall(str(entry.get("text") or entry.get("reasoning") or ""))
    return (int(found[-1]) - 1) / 9 if found else None
