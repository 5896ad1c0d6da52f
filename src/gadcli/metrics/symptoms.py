"""The symptoms a run can show: the field's known collapses, one rule each, with evidence, cause and cure.

Each rule looks at medians over the last steps (`Signals`), not at one step, and is silent on a healthy run. The
rules' numbers come from runs that collapsed in these ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gadcli.metrics.facts import RunFacts
from gadcli.metrics.health import number
from gadcli.metrics.signals import Evidence, Signals, known

FEWEST_STEPS = 8
LN2 = math.log(2.0)
HINGED = ("v1", "v2", "v2_raw")


@dataclass(frozen=True)
class Diagnosis:
    """A named state of a run. `info` is worth knowing and no fault; `cures` are overrides, best first."""

    name: str
    title: str
    level: Literal["info", "warn", "bad"]
    certainty: float
    evidence: tuple[Evidence, ...]
    cause: str
    cures: tuple[str, ...]
    advice: str = ""

    @property
    def since(self) -> int:
        """The step at which the last of the evidence began."""
        return max((item.since for item in self.evidence), default=0)


Rule = Callable[[Signals, RunFacts], Diagnosis | None]


def saturated_ranking(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """1: the ranking loss has no gradient left (loss 1e-6, d_acc 1.0, gap 15.5)."""
    gap = _raw_gap(s)
    if not (s.now("critic/d_loss") < 1e-4 and s.now("critic/d_acc") >= 0.97 and not gap < 5):
        return None
    grad = s.now("critic/grad_norm")
    if grad > 0.01:
        return None
    certainty = 0.7 + 0.1 * (grad < 0.01) + 0.1 * (gap > 8) + 0.05 * (s.now("critic/d_loss") < 1e-5)
    # With a gap this wide the loss is flat because the scores ran off: rule 2 or 8 names the cause.
    certainty -= 0.35 * (gap > 50)
    spread = facts.values != "last"
    return Diagnosis(
        "saturated_ranking", "the discriminator's ranking loss is saturated", "bad", certainty,
        known([s.evidence("critic/d_loss", lambda v: v < 1e-3), s.evidence("critic/d_acc", lambda v: v >= 0.97),
               s.evidence("critic/grad_norm", lambda v: v < 0.01),
               s.evidence("critic/student_value_mean", lambda v: True),
               s.evidence("critic/teacher_value_mean", lambda v: True)]),
        "the raw gap is so wide that -log sigmoid of it has no gradient: the critic stopped learning"
        + (", since values summed over many tokens grow with the length" if spread else ""),
        ("critic.values=last", "critic.loss=final") if spread else ("critic.loss=final", "critic.label_smoothing=0.1"),
        "score one token, or temper the loss; then warm the critic up again",
    )  # fmt: skip


def runaway_gap(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """2: the gap grows without bound (1.8 → 117) and answers shrink to one token."""
    gap, start = s.now("critic/score_diff"), s.start("critic/score_diff")
    # v1 asks for a gap of 1 and has nothing that ends it: five times that is on its way.
    limit = {"original": 30.0, None: 20.0, "v1": 5.0 * facts.margin}.get(facts.loss, 10.0)
    # A log may begin late (a resume, a cut file): far beyond the limit needs no beginning to compare with.
    if not gap > limit or not (gap >= 5 * max(start, 0.1) or gap > 3 * limit):
        return None
    length, length_start = s.now("response_length/mean"), s.start("response_length/mean")
    shrunk = length <= 2 or length < 0.2 * length_start
    certainty = 0.75 + 0.15 * shrunk + 0.05 * (facts.loss == "v1")
    certainty -= 0.2 * (_symmetric(s) and not shrunk)
    bounded = facts.loss in ("final", "v2_raw")
    return Diagnosis(
        "runaway_gap", "the score gap runs off without bound", "bad", certainty,
        known([s.evidence("critic/score_diff", lambda v: v > limit, f"{number(start)} at the start"),
               s.evidence("critic/student_value_mean", lambda v: v < -5),
               _from(s, "response_length/mean", lambda v: v < 0.5 * length_start, length_start) if shrunk else None]),
        f"the loss {facts.loss or 'in use'} "
        + ("is overruled by the critic's steps" if bounded else "keeps paying for a wider gap: it has no upper bound"),
        ("critic.optim.lr=3e-7",) if bounded else ("critic.loss=final", "critic.loss=v2_raw"),
        "stop this run: its actor is lost; go back to a checkpoint before the rise",
    )  # fmt: skip


def no_spread(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """3: groups without spread: advantages 0, actor gradient 3.6e-7, length 130 → 7."""
    if facts.sft or not (s.has("actor/grad_norm") or s.has("critic/zero_std_fraction")):
        return None
    grad, flat = s.now("actor/grad_norm"), s.now("critic/zero_std_fraction")
    spread = max(abs(s.now("critic/advantages/max")), abs(s.now("critic/advantages/min")))
    no_advantage = spread < 1e-6 or flat >= 0.8 or s.now("critic/score_std") < 1e-6
    no_gradient = grad < 1e-5
    measured = any(s.has(n) for n in ("critic/advantages/max", "critic/zero_std_fraction", "critic/score_std"))
    # A KL loss keeps some gradient alive, so groups that are all flat are enough.
    flat_groups = no_advantage and (flat >= 0.9 or not grad > 1e-2)
    if not flat_groups and (measured or not no_gradient):
        return None
    length, start = s.now("response_length/mean"), s.start("response_length/mean")
    certainty = 0.7 + 0.15 * no_gradient + 0.1 * (length < 0.5 * start)
    temperature, n = facts.temperature or 0.0, facts.rollout_n or 0
    warm = temperature >= 0.8 and n >= 8
    return Diagnosis(
        "no_spread", "the answers to a prompt score alike, so the actor learns nothing", "bad", certainty,
        known([s.evidence("actor/grad_norm", lambda v: v < 1e-4),
               s.evidence("critic/zero_std_fraction", lambda v: v >= 0.8),
               s.evidence("critic/advantages/max", lambda v: abs(v) < 1e-6),
               s.evidence("actor/pg_loss", lambda v: abs(v) < 1e-9),
               s.evidence("actor/ppo_kl", lambda v: abs(v) < 1e-9),
               _from(s, "response_length/mean", lambda v: v < 0.5 * start, start) if length < 0.5 * start else None]),
        "within a group all scores are equal (too cold a temperature or too few answers), so every advantage is 0",
        ("rollout.temperature=1.0 rollout.n=16",) if warm else ("rollout.temperature=0.8 rollout.n=8",),
        "advantages' mean is 0 by construction: look at their min and max, and at critic/score_std",
    )  # fmt: skip


def lower_hinge(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """4: d_acc .998 with score_diff .038: the lower hinge keeps the critic ahead for ever."""
    gap, margin = s.now("critic/score_diff"), facts.margin
    hinged = facts.loss in HINGED or s.has("critic/hinge_loss_lower") or s.has("critic/hinge_loss")
    if not hinged and facts.loss is not None:
        return None
    if not (s.now("critic/d_acc") >= 0.99 and 0 < gap < 0.3 * margin):
        return None
    lower = s.now("critic/hinge_loss_lower") if s.has("critic/hinge_loss_lower") else s.now("critic/hinge_loss")
    clipped = s.now("response_length/clip_ratio")
    certainty = 0.75 + 0.1 * (facts.loss in HINGED) + 0.05 * (lower > 0.5 * margin) + 0.05 * (clipped >= 0.8)
    return Diagnosis(
        "lower_hinge", "the lower hinge keeps the critic ahead of the student", "warn", certainty,
        known([s.evidence("critic/d_acc", lambda v: v >= 0.98),
               s.evidence("critic/score_diff", lambda v: v < 0.3 * margin),
               s.evidence("critic/hinge_loss_lower", lambda v: v > 0.5 * margin),
               s.evidence("response_length/clip_ratio", lambda v: v >= 0.8)]),
        f"the hinge asks for a gap of {number(margin)} that similar texts cannot have, so it pushes for ever: "
        "nearly every pair is told apart by a hair",
        ("critic.loss=final",),
        "final has no lower hinge, so no artificial gap has to remain",
    )  # fmt: skip


def length_giveaway(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """5: answers grow to the limit (477.6, 86.1 % cut) where the teacher's are short: the critic reads length."""
    if facts.sft and not s.has("critic/d_acc"):
        return None  # no critic that could read a length
    length, teacher = s.now("response_length/mean"), s.now("teacher_length/mean")
    clipped, limit = s.now("response_length/clip_ratio"), facts.max_response_length
    at_limit = limit is not None and length > 0.8 * limit
    # A limit below the teacher's own lengths cuts students too: `limit_too_low` names that.
    if not clipped >= 0.5 or length < 1.5 * teacher or not (length >= 1.5 * teacher or at_limit or clipped >= 0.8):
        return None
    start = s.start("response_length/mean")
    certainty = 0.7 + 0.1 * (clipped >= 0.8) + 0.1 * (length >= 2 * teacher) + 0.05 * (length > 1.3 * start)
    certainty -= 0.15 * (lower_hinge(s, facts) is not None)
    shorter = suggest_limit(teacher, limit)
    tight = limit is not None and shorter >= limit
    return Diagnosis(
        "length_giveaway", "answers run to the length limit, and the critic can read the length", "warn", certainty,
        known([s.evidence("response_length/clip_ratio", lambda v: v >= 0.5),
               s.evidence("response_length/mean", lambda v: v >= 1.5 * teacher if teacher == teacher else True,
                          f"{number(start)} at the start, teacher {number(teacher)}"),
               s.evidence("val/length_auc", lambda v: v >= 0.8)]),
        "the student does not end its answers: cut ones lack the end that the teacher's have" if tight
        else "the limit is far above the teacher's lengths: cut answers lack their end, so length tells",
        (f"data.max_response_length={2 * (limit or 0)}",) if tight else (f"data.max_response_length={shorter}",),
        "start from a student that has learnt to end: gad train seqkd first" if tight
        else "take the limit from the data: gad data analyze-tokens FILES -t MODEL (P99, rounded up to 16)",
    )  # fmt: skip


def limit_too_low(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """Answers are cut although they are no longer than the teacher's: the limit is below what the task needs."""
    if facts.sft and not s.has("critic/d_acc"):
        return None  # SFT is what teaches a student to end
    length, teacher = s.now("response_length/mean"), s.now("teacher_length/mean")
    clipped, before = s.now("response_length/clip_ratio"), s.start("response_length/clip_ratio")
    stopped_ending = clipped > 0.5 and clipped > before + 0.25
    if not (clipped > 0.8 or stopped_ending) or not length < 1.5 * teacher:
        return None
    limit = facts.max_response_length or int(length)
    return Diagnosis(
        "limit_too_low",
        "the student stops ending its answers" if stopped_ending else "most answers are cut at the limit", "warn", 0.7,
        known([s.evidence("response_length/clip_ratio", lambda v: v > 0.5, f"{number(before)} at the start"),
               s.evidence("response_length/mean", lambda v: True, f"teacher {number(teacher)}")]),
        "unfinished answers score better than ended ones, and the limit cuts them" if stopped_ending
        else "the student never gets to end an answer: the limit is near what the teacher itself needs",
        (f"data.max_response_length={2 * limit}",),
        "see what each limit would cut: gad data analyze-tokens FILES -t MODEL",
    )  # fmt: skip


def clip_fraction(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """6: 63 % of the tokens clipped at 3e-4/4e-4."""
    clipped = s.now("actor/pg_clipfrac")
    if not clipped > 0.5:
        return None
    narrow = facts.clip_high is None or facts.clip_high < 0.1
    here = "" if facts.clip_high is None else f" at {number(facts.clip_low)}/{number(facts.clip_high)}"
    return Diagnosis(
        "clip_fraction", f"{clipped:.0%} of the tokens are clipped{here}", "warn", 0.9,
        known([s.evidence("actor/pg_clipfrac", lambda v: v > 0.5)]),
        "the clip is narrower than one update moves the policy" if narrow else "one update moves the policy too far",
        ("actor.clip_ratio_low=0.1 actor.clip_ratio_high=0.1",) if narrow
        else ("actor.ppo_epochs=1", f"actor.optim.lr={(facts.actor_lr or 3e-6) / 3:.0e}"),
        "GSPO clips far more tokens than GRPO by design; if d_acc and lengths are healthy it may be accepted",
    )  # fmt: skip


def on_policy(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """7: ppo_kl 0 with one epoch and one mini-batch is what on-policy means; with more, nothing moved."""
    if not abs(s.now("actor/ppo_kl")) < 1e-9 or facts.on_policy is None or no_spread(s, facts) is not None:
        return None
    evidence = known([s.evidence("actor/ppo_kl", lambda v: abs(v) < 1e-9),
                      s.evidence("actor/pg_loss", lambda v: abs(v) < 1e-6),
                      s.evidence("actor/grad_norm", lambda v: True)])  # fmt: skip
    if facts.on_policy:
        return Diagnosis(
            "on_policy", "ppo_kl is 0 because the step is on-policy: not a fault", "info", 0.95, evidence,
            "one epoch over one mini-batch: the ratio is 1 in value while its gradient is not", (),
            "judge the actor by actor/grad_norm, critic/score_std and actor/kl_loss",
        )  # fmt: skip
    return Diagnosis(
        "policy_still", "the policy does not move within a step", "warn", 0.8, evidence,
        f"{facts.ppo_epochs} epochs over {facts.mini_batches} mini-batches, and the log-probs stay the same",
        (f"actor.optim.lr={max(3e-6, 3 * (facts.actor_lr or 0)):.0e}".replace("e-0", "e-"),),
        "check actor/lr and actor/grad_norm: an update that small changes nothing",
    )  # fmt: skip


def raw_drift(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """8: means ±167, raw gap 335: raw scores drift although their difference per token is bounded."""
    student, teacher, gap = s.now("critic/student_value_mean"), s.now("critic/teacher_value_mean"), _raw_gap(s)
    if not (abs(student) > 50 or abs(teacher) > 50) or not (abs(gap) > 100 or abs(student + teacher) > 100):
        return None
    certainty = 0.7 + 0.15 * _symmetric(s) + 0.1 * (s.now("critic/score_diff") < 10)
    cures = {"v2_raw": ("critic.v2_raw.score_reg=0.01",), "final": ("critic.final.score_reg=0.01",)}
    return Diagnosis(
        "raw_drift", "raw scores drift apart", "bad", certainty,
        known([s.evidence("critic/student_value_mean", lambda v: abs(v) > 50),
               s.evidence("critic/teacher_value_mean", lambda v: abs(v) > 50),
               s.evidence("critic/raw_score_diff", lambda v: abs(v) > 100),
               s.evidence("critic/score_diff", lambda v: True)]),
        ("nothing bounds the gap" if facts.loss in ("v1", "original") else "the loss bounds the gap per token")
        + ", and nothing holds the raw scores themselves",
        cures.get(facts.loss or "", ("critic.loss=v2_raw critic.v2_raw.score_reg=0.005", "critic.loss=final")),
        "regularise the raw scores; what was learned from scores this large is best thrown away",
    )  # fmt: skip


def giveaway(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """9: d_acc exactly 1.0 from the first step: the sides differ by something other than their text."""
    if s.now("critic/d_acc") != 1.0:
        return None
    values = s.series("critic/d_acc")[1]
    if len(values) < FEWEST_STEPS or values[0] != 1.0 or sum(v == 1.0 for v in values) < 0.98 * len(values):
        return None
    clipped = s.now("response_length/clip_ratio")
    cut = clipped > 0.5
    student, teacher = s.start("critic/student_value_mean"), s.start("critic/teacher_value_mean")
    # A critic that was already saturated when this stage began is rule 1's.
    certainty = 0.9 - 0.3 * (teacher - student > 8 and s.now("critic/d_loss") < 1e-4) + 0.05 * cut
    return Diagnosis(
        "giveaway", "the critic tells every pair apart from the first step", "bad", certainty,
        known([s.evidence("critic/d_acc", lambda v: v == 1.0, "exactly"),
               s.evidence("response_length/clip_ratio", lambda v: v > 0.5) if cut else None]),
        "masks or EOS differ between the sides, "
        + ("since cut student answers have no EOS and teacher text has one" if cut else "or the critic came saturated"),
        (f"data.max_response_length={suggest_limit(s.now('teacher_length/mean'), None)}",) if cut
        else ("data.truncation=drop",),
        "look at a few pairs first: gad samples RUN --sort gap, and gad data check FILES -t MODEL",
    )  # fmt: skip


def resting_point(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """`final` on last-token values rests at gap .002-.003 and ranking_loss .6926 whatever the quality."""
    if facts.loss not in ("final", None) or facts.values == "all":
        return None
    gap, ranking = s.now("critic/score_diff"), s.now("critic/ranking_loss")
    if not (0.001 <= gap <= 0.006 and 0.6910 <= ranking <= LN2):
        return None
    return Diagnosis(
        "resting_point", "the discriminator is at its resting point: this is not convergence", "info", 0.85,
        known([s.evidence("critic/score_diff", lambda v: 0.001 <= v <= 0.006),
               s.evidence("critic/ranking_loss", lambda v: 0.691 <= v <= LN2),
               s.evidence("critic/d_acc", lambda v: True)]),
        "score_reg balances the ranking term at a raw gap of about 0.4, whatever the student's quality",
        ("critic.loss=original", "critic.values=all"),
        "the scores say nothing about quality here: judge by held-out evaluation; gad losslab RUN shows the point",
    )  # fmt: skip


def length_collapse(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """Answers shrink to almost nothing, for whatever reason."""
    length, start, teacher = (
        s.now("response_length/mean"),
        s.start("response_length/mean"),
        s.now("teacher_length/mean"),
    )
    wanted = teacher if s.has("teacher_length/mean") else start
    if not (wanted >= 8 and (length <= 2 or length < 0.1 * wanted) and length < 0.5 * start):
        return None
    return Diagnosis(
        "length_collapse", "answers collapsed to almost nothing", "bad", 0.65,
        known([s.evidence("response_length/mean", lambda v: v < 0.5 * start, f"{number(start)} at the start"),
               s.evidence("teacher_length/mean", lambda v: True)]),
        "the actor found that saying little scores best",
        ("actor.use_kl_loss=true actor.kl_loss_coef=0.01", "critic.loss=final"),
        "stop this run; go back to a checkpoint before the fall",
    )  # fmt: skip


RULES: tuple[Rule, ...] = (
    saturated_ranking, runaway_gap, no_spread, lower_hinge, length_giveaway, clip_fraction, on_policy, raw_drift,
    giveaway, resting_point, length_collapse, limit_too_low,
)  # fmt: skip


def suggest_limit(teacher_mean: float, limit: int | None) -> int:
    """A round response limit with room above the teacher's mean (its tail is about 1.5 times that): 256 at least
    for a mean of 100-170 tokens, and below the present limit."""
    if math.isnan(teacher_mean) or teacher_mean <= 0:
        return max(16, (limit or 512) // 2)
    power = 1 << max(4, math.ceil(math.log2(1.5 * teacher_mean)))
    return power if limit is None or power < limit else max(16, 16 * math.ceil(1.5 * teacher_mean / 16))


def _raw_gap(s: Signals) -> float:
    if s.has("critic/raw_score_diff"):
        return s.now("critic/raw_score_diff")
    return s.now("critic/teacher_value_mean") - s.now("critic/student_value_mean")


def _symmetric(s: Signals) -> bool:
    """Both sides moved away from 0, about equally far."""
    student, teacher = s.now("critic/student_value_mean"), s.now("critic/teacher_value_mean")
    return student * teacher < 0 and abs(student + teacher) < 0.3 * abs(teacher - student)


def _from(s: Signals, name: str, holds: Callable[[float], bool], start: float) -> Evidence | None:
    return s.evidence(name, holds, f"{number(start)} at the start")
