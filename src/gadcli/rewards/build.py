"""From `rewards:` to functions that score answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gadcli.config.rewards import RewardConfig
from gadcli.rewards.answer import AnswerText, Score
from gadcli.rewards.process import External
from gadcli.rewards.rules import rule


class RewardSet:
    """The configured rewards beside the discriminator, by name. One of weight 0 is computed and logged all the same."""

    def __init__(self, specs: Sequence[RewardConfig], folder: Path, rank: int = 0) -> None:
        """`folder` keeps what judges said, in a journal per reward and rank (two processes cannot share one)."""
        self.specs = list(specs)
        self._score: dict[str, Score] = {
            spec.name: _scorer(spec, folder / f"{spec.name}.rank_{rank}.jsonl")
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


def _scorer(spec: RewardConfig, journal: Path) -> Score:
    if spec.kind in ("python", "command"):
        return External(spec)
    if spec.kind == "judge":
        from gadcli.rewards.judge import Judge  # brings the openai package, a second of a start

        return Judge(spec, journal)
    return rule(spec)
