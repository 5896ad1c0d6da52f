"""The one table of metrics: name, unit, reduction over ranks, group, healthy range per loss, meaning, cure.

Reduction, sinks, dashboard, health rules, `gad why` and the docs read it; names are a contract.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Reduction = Literal["mean", "max", "min", "last"]
Group = Literal["discriminator", "actor", "responses", "engine"]

GROUPS: tuple[Group, ...] = ("discriminator", "actor", "responses", "engine")
INF = math.inf


@dataclass(frozen=True)
class Range:
    """Where a metric is healthy, and beyond which values it is unusual (warn) or broken (bad).

    A verdict rises when the windowed median leaves [warn_low, warn_high] (or the bad pair) and falls back to
    ok only inside [low, high]: the room between the two pairs is the hysteresis.
    """

    low: float
    high: float
    warn_low: float = -INF
    warn_high: float = INF
    bad_low: float = -INF
    bad_high: float = INF


@dataclass(frozen=True)
class Metric:
    """One metric. `healthy` is keyed by discriminator loss; "*" holds for every loss not named."""

    name: str
    unit: str
    group: Group
    meaning: str
    reduction: Reduction = "mean"
    healthy: Mapping[str, Range] = field(default_factory=dict)
    cure: str = ""  # the override for a value that is too high, or for any where cure_low is empty
    cure_low: str = ""
    high_means: str = ""
    low_means: str = ""
    headline: bool = False  # shown first where room is short

    def range_for(self, loss: str | None) -> Range | None:
        """Healthy range under discriminator loss `loss` (None: unknown or no critic)."""
        return self.healthy.get(loss or "*", self.healthy.get("*"))


def _every(low: float, high: float, **edges: float) -> dict[str, Range]:
    return {"*": Range(low, high, **edges)}


_SCORE_DIFF = {
    "final": Range(0.01, 0.5, warn_low=0.001, warn_high=1.0, bad_high=10.0),
    "v1": Range(0.3, 2.0, warn_low=0.01, warn_high=5.0, bad_high=20.0),
    "v2": Range(0.5, 5.0, warn_low=0.1, warn_high=6.0, bad_high=20.0),
    "v2_raw": Range(0.02, 5.0, warn_low=0.001, warn_high=6.0, bad_high=20.0),
    "original": Range(0.1, 3.0, warn_low=0.01, warn_high=8.0, bad_high=30.0),
}

_D: Group = "discriminator"
_ROWS: tuple[Metric, ...] = (
    Metric("critic/d_loss", "nats", _D, "discriminator loss over pairs", cure="critic.values=last"),
    Metric(
        "critic/d_acc",
        "share",
        _D,
        "pairs in which the teacher scores above the student (a tie is half)",
        healthy=_every(0.55, 0.80, warn_low=0.50, warn_high=0.90),
        headline=True,
        high_means="the discriminator is too strong",
        low_means="the discriminator is too weak",
        cure="critic.label_smoothing=0.1",
        cure_low="critic.optim.lr=3e-6",
    ),
    Metric(
        "critic/score_diff",
        "score",
        _D,
        "the gap teacher - student that the loss uses",
        healthy=_SCORE_DIFF,
        high_means="the gap is too wide for this loss",
        low_means="the scores carry no signal",
        cure="critic.loss=final",
        cure_low="critic.optim.lr=3e-6",
        headline=True,
    ),
    Metric(
        "critic/raw_score_diff",
        "score",
        _D,
        "gap of raw scores, teacher - student",
        healthy=_every(-50.0, 50.0, warn_low=-100.0, warn_high=100.0, bad_low=-300.0, bad_high=300.0),
        high_means="raw scores drift apart",
        low_means="raw scores drift apart, the wrong way round",
        cure="critic.loss=v2_raw",
    ),
    Metric(
        "critic/student_value_mean",
        "score",
        _D,
        "mean raw score of student text: the reward",
        healthy=_every(-30.0, 30.0, warn_low=-75.0, warn_high=75.0, bad_low=-150.0, bad_high=150.0),
        high_means="raw scores drift",
        low_means="raw scores drift",
        cure="critic.loss=v2_raw",
    ),
    Metric(
        "critic/teacher_value_mean",
        "score",
        _D,
        "mean raw score of teacher text",
        healthy=_every(-30.0, 30.0, warn_low=-75.0, warn_high=75.0, bad_low=-150.0, bad_high=150.0),
        high_means="raw scores drift",
        low_means="raw scores drift",
        cure="critic.loss=v2_raw",
    ),
    Metric("critic/hinge_loss", "score", _D, "v1: mean relu(margin - gap)"),
    Metric("critic/hinge_loss_lower", "score", _D, "v2, v2_raw: mean relu(margin - gap)"),
    Metric("critic/hinge_loss_upper", "score", _D, "v2, v2_raw: mean relu(gap - max_margin)"),
    Metric(
        "critic/ranking_loss",
        "nats",
        _D,
        "-log sigmoid of the tempered gap; ln 2 = 0.693 cannot tell apart",
        healthy={"final": Range(0.65, 0.6925, warn_low=0.30, warn_high=0.6932)},
        high_means="the critic cannot tell student from teacher",
        low_means="the critic is over-confident",
        cure="critic.optim.lr=3e-6",
        cure_low="critic.final.temperature=3.0",
    ),
    Metric("critic/score_reg", "score^2", _D, "regulariser: mean t_raw^2 + s_raw^2, weighted"),
    Metric(
        "critic/diff_penalty",
        "score^2",
        _D,
        "final: weighted square of the gap above its threshold",
        healthy=_every(0.0, 0.02, warn_high=0.1),
        high_means="the critic is over-confident",
        cure="critic.final.penalty_weight=1.0",
    ),
    Metric("critic/centring", "score^2", _D, "option: square of the pair's summed raw scores, weighted"),
    Metric("critic/gradient_penalty", "1", _D, "R1: squared gradient of teacher scores by the input embeddings"),
    Metric("critic/score_std", "score", _D, "spread of raw scores within a prompt's group"),
    Metric(
        "critic/zero_std_fraction",
        "share",
        _D,
        "groups without spread: they teach the actor nothing",
        healthy=_every(0.0, 0.2, warn_high=0.5),
        high_means="most groups score alike, so the actor learns nothing",
        cure="rollout.temperature=0.8 rollout.n=8",
    ),
    Metric(
        "critic/grad_norm",
        "norm",
        _D,
        "critic's gradient norm before clipping",
        healthy=_every(0.01, INF, warn_low=1e-3),
        low_means="the discriminator is saturated",
        cure="critic.values=last",
        headline=True,
    ),
    Metric("critic/lr", "1", _D, "critic's learning rate", "last"),
    Metric("critic/advantages/mean", "1", "actor", "mean advantage: 0 by construction, look at min and max"),
    Metric("critic/advantages/max", "1", "actor", "largest advantage", "max"),
    Metric("critic/advantages/min", "1", "actor", "smallest advantage", "min"),
    Metric("actor/sft_loss", "nats/token", "actor", "negative log-likelihood of teacher tokens", headline=True),
    Metric("actor/teacher_pg_loss", "nats/token", "actor", "the same as actor/sft_loss, by its older name"),
    Metric("actor/pg_loss", "1", "actor", "policy loss; exactly 0 in value where the step is on-policy", headline=True),
    Metric(
        "actor/grad_norm",
        "norm",
        "actor",
        "actor's gradient norm before clipping",
        healthy=_every(1e-3, 100.0, warn_low=1e-5, warn_high=1000.0),
        high_means="the actor's gradient explodes",
        low_means="the actor gets no gradient",
        cure="actor.grad_clip=1.0 actor.optim.lr=1e-6",
        cure_low="rollout.temperature=0.8 rollout.n=8",
        headline=True,
    ),
    Metric(
        "actor/pg_clipfrac",
        "share",
        "actor",
        "tokens whose clip kills the gradient",
        healthy=_every(0.0, 0.3, warn_high=0.5),
        high_means="most tokens are clipped",
        cure="actor.clip_ratio_low=0.1 actor.clip_ratio_high=0.1",
    ),
    Metric("actor/ppo_kl", "nats", "actor", "mean log-ratio old - new: how far this step moved the policy"),
    Metric(
        "actor/kl_loss",
        "nats",
        "actor",
        "KL to the reference (the frozen starting actor)",
        healthy=_every(0.0, 1.0, warn_high=3.0),
        high_means="the actor runs away from its reference",
        cure="actor.use_kl_loss=true actor.kl_loss_coef=0.01",
    ),
    Metric("actor/reward_kl_penalty", "score", "actor", "KL to the reference subtracted from the reward"),
    Metric("actor/soda_loss", "nats", "actor", "objective soda: preference loss; ln 2 = .693 = no preference"),
    Metric(
        "actor/soda_margin",
        "nats",
        "actor",
        "objective soda: beta times the preference for the teacher's answer",
        headline=True,
    ),
    Metric("actor/soda_acc", "share", "actor", "objective soda: pairs whose margin is above 0 (a tie is half)"),
    Metric("actor/soda_teacher_gain", "nats", "actor", "objective soda: log p/p0 of the teacher's answers"),
    Metric("actor/soda_snapshot_gain", "nats", "actor", "objective soda: log p/p0 of the start model's own answers"),
    Metric("actor/best_of_n_gain", "score", "actor", "objective best_of_n: best score of a group above its mean"),
    Metric("actor/entropy", "nats", "actor", "entropy of the next token"),
    Metric("actor/lr", "1", "actor", "actor's learning rate", "last"),
    Metric("response_length/mean", "tokens", "responses", "mean length of student answers", headline=True),
    Metric("response_length/max", "tokens", "responses", "longest student answer", "max"),
    Metric("response_length/min", "tokens", "responses", "shortest student answer", "min"),
    Metric(
        "response_length/clip_ratio",
        "share",
        "responses",
        "student answers cut at the limit",
        healthy=_every(0.0, 0.3, warn_high=0.8),
        high_means="answers are truncated by the mass",
        cure="data.max_response_length=256",
        headline=True,
    ),
    Metric("teacher_length/mean", "tokens", "responses", "mean length of teacher answers"),
    Metric("val/rouge_l", "F1", "responses", "ROUGE-L of held-out answers against the teacher's"),
    Metric("val/nll", "nats", "responses", "held-out teacher text: student's -log p per token; rises in overfitting"),
    Metric("val/d_acc", "share", "responses", "d_acc on held-out rows"),
    Metric("val/probe_teacher", "score", "responses", "probe set: today's critic's mean raw score of the teacher"),
    Metric("val/probe_start", "score", "responses", "probe set: today's critic's score of the start model's answers"),
    Metric("val/probe_student", "score", "responses", "probe set: today's critic's score of today's student"),
    Metric(
        "val/probe_beats_start", "share", "responses", "probe set: prompts on which today's student beats the start"
    ),
    Metric("val/probe_beats_earlier", "share", "responses", "probe set: the same against students in between"),
    Metric("val/exact_match", "share", "responses", "held-out answers equal to the teacher's"),
    Metric("val/distinct_1", "share", "responses", "distinct words among all of the held-out answers"),
    Metric("val/distinct_2", "share", "responses", "distinct pairs of words among the held-out answers"),
    Metric("val/finished", "share", "responses", "held-out answers that ended by themselves"),
    Metric("val/length_mean", "tokens", "responses", "mean length of held-out answers"),
    Metric("val/length_ratio", "ratio", "responses", "held-out student length / teacher length"),
    Metric(
        "val/length_auc",
        "AUC",
        "responses",
        "how well length alone separates student from teacher; .5 is blind",
        healthy=_every(0.5, 0.7, warn_high=0.9),  # folded at one half: too short counts as too long does
        high_means="length alone separates student from teacher (val/length_ratio says which way)",
        cure="data.max_response_length=256",
    ),
    Metric("rollout/tokens_per_s", "tokens/s", "engine", "sampled tokens a second", "last"),
    Metric(
        "rollout/logp_diff_mean",
        "nats",
        "engine",
        "mean |log-prob of trainer - of sampler|",
        healthy=_every(0.0, 0.03, warn_high=0.1),
        high_means="the sampler and the trainer disagree",
        cure="actor.importance_correction=tis",
    ),
    Metric("rollout/logp_diff_max", "nats", "engine", "largest |log-prob of trainer - of sampler|", "max"),
    Metric("rollout/sync_probe", "nats", "engine", "probe difference after the weight sync", "max"),
    Metric("timing_s/step", "s", "engine", "wall time of a step", "max", headline=True),
    Metric("perf/tokens_per_s", "tokens/s", "engine", "trained and sampled tokens a second", "last", headline=True),
    Metric("perf/rss_gb", "GiB", "engine", "resident host memory", "max"),
    Metric("perf/gpu_gb", "GiB", "engine", "peak device memory", "max"),
)

METRICS: Mapping[str, Metric] = {row.name: row for row in _ROWS}


def metric(name: str) -> Metric:
    """The table's row for `name`; families such as `timing_s/*` and foreign names get a plain one."""
    row = METRICS.get(name)
    if row is not None:
        return row
    if name.startswith("timing_s/"):
        return Metric(name, "s", "engine", f"wall time of {name.removeprefix('timing_s/')}", "max")
    prefix = name.split("/", 1)[0]
    groups: dict[str, Group] = {"critic": _D, "actor": "actor", "response_length": "responses",
                                "teacher_length": "responses", "val": "responses"}  # fmt: skip
    return Metric(name, "", groups.get(prefix, "engine"), "not in the metric table", "last")


_LABELS = {
    "critic/student_value_mean": "student value",
    "critic/teacher_value_mean": "teacher value",
    "critic/zero_std_fraction": "zero_std",
    "response_length/mean": "length",
    "response_length/clip_ratio": "clip_ratio",
    "teacher_length/mean": "teacher length",
    "rollout/logp_diff_mean": "logp_diff",
    "rollout/logp_diff_max": "logp_diff max",
    "rollout/tokens_per_s": "sampled tok/s",
    "rollout/sync_probe": "sync_probe",
    "perf/tokens_per_s": "tokens/s",
}


def label(name: str) -> str:
    """A metric's name where its group is already said: `d_acc`, `length`, `teacher length`, `val rouge_l`."""
    if name in _LABELS:
        return _LABELS[name]
    prefix, _, rest = name.partition("/")
    if prefix == "response_length":
        return f"length {rest}"
    if rest.startswith("advantages/"):
        return f"advantage {rest.removeprefix('advantages/')}"
    return rest if prefix in ("critic", "actor", "perf") and rest else f"{prefix} {rest}".strip()
