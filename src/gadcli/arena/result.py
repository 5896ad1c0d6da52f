"""From answers to a table: each measure's scores by arm, temperature and prompt, varieties, costs, verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gadcli.arena.compare import Arena, Array, Verdict, verdicts
from gadcli.arena.run import ArenaSpec, ArmResult
from gadcli.config.rewards import RewardConfig
from gadcli.errors import DataError
from gadcli.evaluate.answers import AnswerSet
from gadcli.evaluate.text import Sample, distinct_n, rouge_l
from gadcli.rewards.answer import AnswerText
from gadcli.rewards.build import RewardSet

TEACHER, ROUGE = "teacher log-prob", "ROUGE-L"
Scores = dict[str, list[list[float]]]  # measure -> temperature -> sample


@dataclass(frozen=True)
class Row:
    """One arm over all seeds: what it cost beyond the start (means), and its lengths at each temperature."""

    arm: str
    seconds: float
    steps: float
    teacher_rows: float
    lengths: list[float]
    finished: list[float]


@dataclass(frozen=True)
class Table:
    """All that the report shows, measures in the order they were asked for; `teacher_variety` is of its own answers."""

    temperatures: tuple[float, ...]
    seeds: tuple[int, ...]
    prompts: int
    rows: list[Row]
    measures: dict[str, Arena]
    verdicts: dict[str, list[Verdict]]
    teacher_variety: float
    commands: dict[str, list[str]]

    def to_json(self) -> dict[str, Any]:
        """Means instead of single scores."""
        return {
            "temperatures": self.temperatures, "seeds": self.seeds, "prompts": self.prompts,
            "arms": [asdict(row) for row in self.rows], "teacher_variety": self.teacher_variety,
            "variety": {arm: values.tolist() for arm, values in next(iter(self.measures.values())).variety.items()},
            "measures": {
                name: {arm: scores.mean((0, 2)).tolist() for arm, scores in arena.scores.items()}
                for name, arena in self.measures.items()
            },
            "verdicts": {name: [asdict(found) for found in each] for name, each in self.verdicts.items()},
            "commands": self.commands,
        }  # fmt: skip


def make_table(spec: ArenaSpec, results: Sequence[ArmResult]) -> Table:
    """Score every answer by every measure and compare the arms. Raises what a user's measure raises."""
    by_result = [scores_of(result.answers, spec.measures, spec.folder / "judge") for result in results]
    arms = list(dict.fromkeys(result.arm for result in results))
    row_ids = {tuple(sorted(set(found.row_ids))) for result in results for found in result.answers}
    if len(row_ids) != 1:
        raise DataError("arms were sampled on different prompts", "delete the arena's answers/ and run it again")
    variety = {arm: mean_over_seeds(results, arm, lambda found: distinct_n(first_texts(found), 2)) for arm in arms}
    measures = {}
    for name in by_result[0]:
        scores = {
            arm: np.stack([
                np.stack([by_prompt(found, values) for found, values in zip(r.answers, own[name], strict=True)])
                for r, own in zip(results, by_result, strict=True) if r.arm == arm
            ])
            for arm in arms
        }  # fmt: skip
        measures[name] = Arena(spec.temperatures, scores, variety)
    teachers = {row: s.teacher for row, s in results[0].answers[0].first_draws().items()}
    return Table(
        spec.temperatures, spec.seeds, len(teachers), [row_of(results, arm) for arm in arms], measures,
        {name: verdicts(arena) for name, arena in measures.items()}, distinct_n(list(teachers.values()), 2),
        {r.arm: r.commands for r in results if r.seed == spec.seeds[0]},
    )  # fmt: skip


def scores_of(answers: Sequence[AnswerSet], measures: Sequence[RewardConfig], judged: Path) -> Scores:
    """Every measure of one arm's answers; `judged` keeps what a judge said.

    The teacher's log-prob comes first where there is a teacher at hand.
    """
    scores: Scores = {}
    if all(found.teacher_logps is not None for found in answers):
        scores[TEACHER] = [list(found.teacher_logps or []) for found in answers]
    rewards = RewardSet(measures, judged)
    try:
        for found in answers:
            items = [answer_text(sample, row) for sample, row in zip(found.samples, found.row_ids, strict=True)]
            for name, values in rewards.score(items).items():
                scores.setdefault(name, []).append(values)
    finally:
        rewards.close()
    scores[ROUGE] = [[rouge_l(sample.student, sample.teacher) for sample in found.samples] for found in answers]
    return scores


def answer_text(sample: Sample, row: int) -> AnswerText:
    """A sample as measures see it; the prompt stands as one user message."""
    messages = [{"role": "user", "content": sample.prompt}]
    return AnswerText(
        messages, sample.student, sample.teacher, sample.student_length, sample.teacher_length, sample.finished, row
    )


def by_prompt(found: AnswerSet, values: Sequence[float]) -> Array:
    """[P]: each prompt's answers averaged, prompts in order."""
    rows: dict[int, list[float]] = {}
    for row, value in zip(found.row_ids, values, strict=True):
        rows.setdefault(row, []).append(value)
    return np.array([statistics.fmean(rows[row]) for row in sorted(rows)])


def first_texts(found: AnswerSet) -> list[str]:
    """One answer to each prompt: variety is comparable between equal numbers of texts alone."""
    return [sample.student for sample in found.first_draws().values()]


def mean_over_seeds(results: Sequence[ArmResult], arm: str, value: Callable[[AnswerSet], float]) -> Array:
    """[K] of one arm."""
    return np.mean([[value(found) for found in result.answers] for result in results if result.arm == arm], axis=0)


def row_of(results: Sequence[ArmResult], arm: str) -> Row:
    own = [result for result in results if result.arm == arm]
    length = mean_over_seeds(own, arm, lambda found: statistics.fmean(s.student_length for s in found.samples))
    finished = mean_over_seeds(own, arm, lambda found: statistics.fmean(s.finished for s in found.samples))
    costs = [result.cost for result in own]
    return Row(
        arm, statistics.fmean(c.seconds for c in costs), statistics.fmean(c.steps for c in costs),
        statistics.fmean(c.rows for c in costs), length.tolist(), finished.tolist(),
    )  # fmt: skip
