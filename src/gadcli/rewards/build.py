"""From `rewards:` to functions that score answers."""

from __future__ import annotations

from collections.abc import Sequence

from gadcli.config.rewards import RewardConfig
from gadcli.rewards.answer import AnswerText, Score
from gadcli.rewards.process import External
from gadcli.rewards.rules import rule


class RewardSet:
    """The configured rewards beside the discriminator, by name. One of weight 0 is computed and logged all the same."""

    def __init__(self, specs: Sequence[RewardConfig]) -> None:
        self.specs = list(specs)
        self._score: dict[str, Score] = {
            spec.name: External(spec) if spec.kind in ("python", "command") else rule(spec)
            for spec in specs
            if spec.kind != "discriminator"
        }

    def score(self, items: Sequence[AnswerText]) -> dict[str, list[float]]:
        """Each reward's numbers for these answers; errors name the reward (see `External`)."""
        return {name: score(items) for name, score in self._score.items()}

    def close(self) -> None:
        for score in self._score.values():
            if isinstance(score, External):
                score.close()
