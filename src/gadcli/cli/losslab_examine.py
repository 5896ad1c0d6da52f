"""What `gad losslab` reads and computes: sources of scores and hyperparameters, the examination, its verdicts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gadcli.config.schema import LOSS_NAMES, CriticConfig
from gadcli.errors import ConfigError, DataError

if TYPE_CHECKING:  # torch comes with it: imported where it is used
    from gadcli.algo.losslab import LossSpec, Point, Rest, Stored

TEACHER_LENGTH, STUDENT_LENGTH = 150.0, 250.0  # tokens, synthetic
TABLE_GAPS = (0.1, 1.0, 5.0, 15.5, 100.0)
CURVE_GAPS = tuple(10 ** (-2 + i / 16) for i in range(65))  # .01 .. 100
ACCURACIES = (0.6, 0.8, 0.95, 1.0)
SPREADS = (0.3, 1.0, 3.0, 30.0)  # of the resting raw gap


@dataclass(frozen=True)
class Scores:
    """Stored pairs of one evaluation."""

    step: int
    t_raw: list[float]
    s_raw: list[float]
    t_len: list[float]
    s_len: list[float]


@dataclass(frozen=True)
class Examined:
    """One loss: its curve, its gradient at a few gaps, where it rests for several qualities, its stored scores."""

    spec: LossSpec
    curve: list[Point]
    points: list[Point]
    rests: dict[float, Rest]  # by accuracy
    spreads: list[Rest]  # empty where it does not rest on scores alone
    stored: Stored | None


@dataclass(frozen=True)
class Lab:
    """Everything that is shown."""

    t_len: float
    s_len: float
    values: str
    used: str
    scores: Scores | None
    losses: list[Examined]

    def to_json(self) -> dict[str, Any]:
        tree = dataclasses.asdict(self)
        tree["verdicts"] = verdicts(self)
        finite: dict[str, Any] = json.loads(json.dumps(tree), parse_constant=lambda _: None)  # nan is not JSON
        return finite


def critic_config(run: Path | None, preset: str | None, config: Path | None, overrides: Sequence[str]) -> CriticConfig:
    """The critic's section: of the run if there is one, else as `gad train gad` would resolve it."""
    from gadcli.config.resolve import load_resolved, resolve

    if run is None:
        return resolve("gad", preset, config, {}, list(overrides)).config.critic
    if preset or config or overrides:
        raise ConfigError(
            f"{run}: a run's losses are examined with its own numbers",
            "gad losslab synthetic takes a preset, a config and KEY=VALUE words",
        )
    path = run / "config.yaml"
    if not path.is_file():
        raise DataError(f"{run}: not a run's folder (no config.yaml)", "gad losslab synthetic needs no run")
    return load_resolved(path).critic


def read_scores(run: Path, step: int | None) -> Scores:
    """Pairs with both scores from samples.jsonl, of `step` or of the last step that has any."""
    path = run / "samples.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: no stored samples", "they are written at each evaluation: trainer.test_freq=10")
    keys = ("teacher_score", "student_score", "teacher_length", "student_length")
    by_step: dict[int, list[list[float]]] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a run that is being written
            if all(row.get(key) is not None for key in keys):
                by_step.setdefault(int(row["step"]), []).append([float(row[key]) for key in keys])
    if not by_step or (step is not None and step not in by_step):
        known = ", ".join(map(str, sorted(by_step))) or "none"
        raise DataError(f"{path}: no scored pairs at step {step or 'any'}", f"steps with scores: {known}")
    at = max(by_step) if step is None else step
    return Scores(at, *(list(column) for column in zip(*by_step[at], strict=True)))


def examine(critic: CriticConfig, scores: Scores | None, only: Sequence[str], t_len: float | None,
            s_len: float | None) -> Lab:  # fmt: skip
    """Run every loss (or those named) at the given, the stored or the default lengths."""
    unknown = set(only) - set(LOSS_NAMES)
    if unknown:
        raise ConfigError(f"--loss {', '.join(sorted(unknown))} is unknown", f"losses: {', '.join(LOSS_NAMES)}")
    t_len = t_len or (_mean(scores.t_len) if scores else TEACHER_LENGTH)
    s_len = s_len or (_mean(scores.s_len) if scores else STUDENT_LENGTH)
    losses = [
        _examine_one(_spec(critic, name), scores, t_len, s_len, critic.values)
        for name in LOSS_NAMES
        if not only or name in only
    ]
    return Lab(t_len, s_len, critic.values, critic.loss, scores, losses)


def _spec(critic: CriticConfig, name: str) -> LossSpec:
    from gadcli.algo.losslab import LossSpec

    section = getattr(critic, name, None)  # `original` has no numbers and no section
    numbers = dataclasses.asdict(section) if section is not None else {}
    return LossSpec(name, numbers, critic.label_smoothing, critic.centring)


def _examine_one(spec: LossSpec, scores: Scores | None, t_len: float, s_len: float, values: str) -> Examined:
    from gadcli.algo.losslab import rest, stored, sweep

    rests = {p: rest(spec, t_len=t_len, s_len=s_len, accuracy=p) for p in ACCURACIES}
    sure = rests[1.0]
    spreads = []
    if sure.kind == "point" and not sure.raw_gap_free:
        spreads = [rest(spec, t_len=t_len, s_len=s_len, spread=abs(sure.raw_gap) * k) for k in SPREADS]
    return Examined(
        spec,
        curve=sweep(spec, CURVE_GAPS, t_len=t_len, s_len=s_len, values=values),
        points=sweep(spec, TABLE_GAPS, t_len=t_len, s_len=s_len, values=values),
        rests=rests,
        spreads=spreads,
        stored=stored(spec, scores.t_raw, scores.s_raw, scores.t_len, scores.s_len) if scores else None,
    )


def verdicts(lab: Lab) -> list[str]:
    """What the figures mean, a sentence each."""
    said = []
    for loss in lab.losses:
        name, sure = loss.spec.name, loss.rests[1.0]
        if sure.kind == "none":
            said.append(f"{name} never rests where texts are told apart: its pull fades but does not end.")
        elif sure.kind == "clamp":
            said.append(f"{name} rests only where its clamp cuts the gradient, at norm gap {sure.norm_gap:.3g}.")
        elif sure.raw_gap_free:
            said.append(f"{name} holds the norm gap at {sure.norm_gap:.3g} but lets raw scores drift: "
                        f"a raw gap of {sure.raw_gap:.0f} costs nothing.")  # fmt: skip
        weak = loss.rests[min(ACCURACIES)]
        if weak.kind != "none" and abs(weak.raw_gap) < 1e-6 and weak.norm_gap > 0.5 * sure.norm_gap:
            said.append(f"{name} can reach norm gap {weak.norm_gap:.3g} with equal raw scores, by length alone.")
        gaps = [at.norm_gap for at in loss.spreads]
        if gaps and max(gaps) - min(gaps) < 0.02 * abs(sure.norm_gap):
            accuracies = ", ".join(f"{at.d_acc:.2f}" for at in reversed(loss.spreads))
            said.append(f"{name} rests at norm gap {sure.norm_gap:.4f}, ranking_loss {sure.ranking_loss:.4f}, at d_acc "
                        f"{accuracies} alike (lower where evidence is weak): score_diff there shows lengths and "
                        "score_reg, not quality.")  # fmt: skip
        if loss.stored and name == lab.used and gaps and abs(loss.stored.norm_gap / sure.norm_gap - 1) < 0.25:
            said.append(f"the run's norm gap, {loss.stored.norm_gap:.4f}, is that resting point: not convergence.")
    return said


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
