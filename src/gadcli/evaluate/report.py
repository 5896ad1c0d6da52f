"""From answers to a report: metrics with intervals for each model, paired differences, and their plain rendering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gadcli.evaluate.answers import AnswerSet
from gadcli.evaluate.text import Sample, bootstrap_interval, exact_match, rouge_l, summary

PER_ROW: dict[str, Callable[[Sample], float]] = {
    "val/rouge_l": lambda sample: rouge_l(sample.student, sample.teacher),
    "val/exact_match": lambda sample: exact_match(sample.student, sample.teacher),
}
FRESH = "val/fresh_accuracy"
ROUNDING = 1e-6  # of scores, as in training (algo.scores)
MEANINGS = {
    "val/rouge_l": "overlap with the teacher's answer, word order counted (0-1)",
    "val/exact_match": "share of answers equal to the teacher's",
    FRESH: "held-out accuracy of a new discriminator: .5 cannot tell student from teacher, 1 always",
    "val/d_acc": "the given discriminator's held-out accuracy on (teacher, student) pairs",
    "val/length_auc": "how well length alone tells them apart: .5 not at all, 1 always",
    "val/length_ratio": "mean length over the teacher's",
    "val/length_mean": "mean length in tokens",
    "val/finished": "share of answers that ended by themselves",
    "val/distinct_1": "different words over all words",
    "val/distinct_2": "different word pairs over all word pairs",
}


@dataclass(frozen=True)
class ModelReport:
    """One model at one temperature: metrics by name, and 95 % bootstrap intervals (by prompt) where they exist."""

    model: str
    temperature: float
    answers: int
    prompts: int
    dropped: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Difference:
    """First model minus second, over the same prompts; `low` and `high` bound it at 95 %."""

    temperature: float
    metric: str
    difference: float
    low: float
    high: float


@dataclass
class Report:
    """Everything `gad eval` found; `to_json` is the shape of its --json."""

    files: list[str]
    models: list[ModelReport]
    differences: list[Difference] = field(default_factory=list)
    judge: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def model_report(answers: AnswerSet, fresh: bool, seed: int = 0) -> ModelReport:
    """Metrics of one answer set. `fresh` adds the fresh discriminator where there are prompts enough for one."""
    samples = answers.samples
    metrics = summary(samples)
    intervals = {
        name: bootstrap_interval([measure(sample) for sample in samples], answers.row_ids, seed=seed)
        for name, measure in PER_ROW.items()
    }
    if answers.scores is not None:
        metrics["val/d_acc"] = d_acc(answers.scores)
    prompts = len(set(answers.row_ids))
    if fresh:
        from gadcli.evaluate.fresh_discriminator import MIN_PROMPTS, fresh_discriminator

        if len({sample.prompt for sample in samples}) >= MIN_PROMPTS:
            result = fresh_discriminator(samples, seed=seed)
            metrics[FRESH] = result.accuracy
            metrics["val/fresh_pair_accuracy"] = result.pair_accuracy
    return ModelReport(answers.model, answers.temperature, len(samples), prompts, answers.dropped, metrics, intervals)


def d_acc(scores: Sequence[tuple[float, float]]) -> float:
    """Share of (student, teacher) scores whose teacher's is the higher; a tie counts one half."""
    return sum(_win(teacher, student) for student, teacher in scores) / len(scores)


def _win(teacher: float, student: float) -> float:
    """1, 0, or one half within rounding: the same text at two places of a batch differs in its last bits."""
    if abs(teacher - student) <= ROUNDING * max(1.0, abs(teacher), abs(student)):
        return 0.5
    return float(teacher > student)


def differences(one: AnswerSet, two: AnswerSet, seed: int = 0) -> list[Difference]:
    """Paired differences between two models' answers to the same prompts, each prompt's draws averaged first."""
    found = []
    for name, measure in PER_ROW.items():
        ones, twos = _by_row(one, measure), _by_row(two, measure)
        shared = sorted(ones.keys() & twos.keys())
        values = [ones[row] - twos[row] for row in shared]
        low, high = bootstrap_interval(values, seed=seed)
        found.append(Difference(one.temperature, name, sum(values) / len(values), low, high))
    return found


def _by_row(answers: AnswerSet, measure: Callable[[Sample], float]) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for row, sample in zip(answers.row_ids, answers.samples, strict=True):
        values.setdefault(row, []).append(measure(sample))
    return {row: sum(found) / len(found) for row, found in values.items()}


def render(report: Report) -> list[str]:
    """The report as plain lines, at most 80 wide unless a model's name is longer."""
    names = short_names([model.model for model in report.models])
    lines = []
    for model in report.models:
        lines.append(f"{names[model.model]}  at temperature {model.temperature:g}  "
                     f"({model.answers} answers to {model.prompts} prompts)")  # fmt: skip
        if model.dropped:
            lines.append(f"  {model.dropped} rows left out: bad, or over the length limits")
        for name, value in model.metrics.items():
            low_high = model.intervals.get(name)
            interval = f"  [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else ""
            lines.append(f"  {name:<26}{value:>8.3f}{interval}")
        lines.append("")
    for d in report.differences:
        verdict = "no difference shown" if d.low <= 0.0 <= d.high else "higher" if d.difference > 0 else "lower"
        lines.append(
            f"difference at {d.temperature:g}: {d.metric} {d.difference:+.3f} [{d.low:+.3f}, {d.high:+.3f}] {verdict}"
        )
    if report.judge is not None:
        lines += ["", *judge_lines(report.judge)]
    return lines


def judge_lines(judge: dict[str, Any]) -> list[str]:
    """A judge's result in words."""
    lines = [
        f"judge {judge['model']}: win rate {judge['win_rate']:.3f} "
        f"[{judge['win_rate_low']:.3f}, {judge['win_rate_high']:.3f}] against {judge['against']}",
        f"  {judge['wins']} wins, {judge['ties']} ties, {judge['losses']} losses of {judge['pairs']} pairs; "
        f"{judge['flipped']} followed the position, {judge['unparsed']} gave no verdict",
        f"  mean length {judge['answer_chars']:.0f} against {judge['reference_chars']:.0f} characters",
    ]
    if judge["longer_share"] is not None:
        lines.append(f"  the longer answer won {judge['longer_share']:.2f} of the decided pairs")
    return lines


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each name's last path components, as many as tell the names apart."""
    unique = list(dict.fromkeys(names))
    for depth in range(1, 12):
        short = {name: "/".join(name.rstrip("/").split("/")[-depth:]) for name in unique}
        if len(set(short.values())) == len(unique):
            return short
    return {name: name for name in unique}
