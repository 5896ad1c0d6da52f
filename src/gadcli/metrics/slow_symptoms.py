"""Symptoms that build up over many steps: quality against reward, a blind critic, lost variety, a stuck SFT loss.

The quick collapses are in `symptoms.py`. These rules are about trends; each needs a long stretch of evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gadcli.metrics.facts import RunFacts
from gadcli.metrics.health import median, number
from gadcli.metrics.signals import Evidence, Signals, known
from gadcli.metrics.symptoms import Diagnosis, Rule

BLIND_STEPS, BLIND_WINDOW = 60, 120


def quality_falls(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """Held-out ROUGE-L has fallen from its best; with a rising reward that is reward hacking."""
    steps, values = _finite(s.series("val/rouge_l"))
    if len(values) < 6:
        return None
    # Medians of three: one lucky evaluation is no best, and one poor one no fall.
    smooth = [median(values[i - 1 : i + 2]) for i in range(1, len(values) - 1)]
    best = max(range(len(smooth)), key=smooth.__getitem__)
    now = smooth[-1]
    if smooth[best] - now < max(0.08, 0.2 * smooth[best]):
        return None
    best_step = steps[best + 1]
    rise = 0.0 if facts.sft else _rise(s, best_step)
    gamed = rise > 0
    evidence = [Evidence("val/rouge_l", now, best_step, f"{number(smooth[best])} at its best")]
    if gamed:
        evidence.append(Evidence("critic/student_value_mean", s.now("critic/student_value_mean"), best_step,
                                 f"+{number(rise)} since then"))  # fmt: skip
    slower = f"actor.optim.lr={(facts.actor_lr or 3e-6) / 3:.0e}"
    return Diagnosis(
        "quality_falls",
        "the reward rises while held-out answers get worse" if gamed else "held-out answers get worse",
        "warn", 0.85 if gamed else 0.65, tuple(evidence),
        "the student found what the discriminator likes beside quality" if gamed
        else "the student unlearns what the held-out rows ask for",
        (slower,) if facts.sft else ("actor.use_kl_loss=true actor.kl_loss_coef=0.01", slower),
        f"go back to the checkpoint near step {best_step} (trainer.keep_best=val/rouge_l keeps it); "
        "gad samples RUN --sort student shows what scores best",
    )  # fmt: skip


def overfits(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """Supervised: held-out teacher text has become less likely again while the training loss goes on falling."""
    steps, values = _finite(s.series("val/nll"))
    if not facts.sft or len(values) < 3:
        return None
    best = min(range(len(values)), key=values.__getitem__)
    if len(values) - 1 - best < 2 or min(values[best + 1 :]) < values[best] * 1.01:
        return None
    return Diagnosis(
        "overfits", "held-out text gets less likely: the student has converged and now overfits", "warn", 0.75,
        (Evidence("val/nll", values[-1], steps[best], f"{number(values[best])} at its best"),
         *known([s.evidence("actor/sft_loss", lambda v: v < values[best])])),
        "more passes over the same rows teach the rows themselves",
        ("trainer.keep_best=val/nll trainer.stop_after=3",),
        f"go on from the checkpoint near step {steps[best]}, or collect more rows",
    )  # fmt: skip


def blind_critic(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """d_acc has stayed at one half for a long time: the scores are noise, or the student has caught up."""
    if facts.sft and not s.has("critic/d_acc"):
        return None
    steps, values = _finite(s.history.tail("critic/d_acc", BLIND_WINDOW))
    if len(values) < BLIND_STEPS:
        return None
    mean = sum(values) / len(values)
    if not 0.45 < mean < 0.508 or s.start("critic/d_acc") > 0.6:
        return None
    lr = facts.critic_lr
    return Diagnosis(
        "blind_critic", "the discriminator cannot tell student from teacher", "warn", 0.6,
        (Evidence("critic/d_acc", mean, steps[0], f"mean of {len(values)} steps"),
         *known([s.evidence("critic/score_diff", lambda v: abs(v) < 0.05)])),
        "it learns too slowly or sees too little; until it does, its scores are noise to the actor",
        ((f"critic.optim.lr={3 * lr:.0e}" if lr else "critic.optim.lr=3e-6"), "trainer.critic_warmup=40"),
        "if held-out answers equal the teacher's (val/exact_match), the student has caught up and this is the end",
    )  # fmt: skip


def variety_lost(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """Entropy a tenth of what it was, and groups begin to lack spread: what comes before advantages of 0."""
    entropy, start = s.now("actor/entropy"), s.start("actor/entropy")
    if facts.sft or not (start > 0.2 and entropy < 0.1 * start):
        return None
    flat, spread = s.now("critic/zero_std_fraction"), s.now("critic/score_std")
    if not (flat > 0.3 or spread < 0.2 * s.start("critic/score_std")):
        return None
    warmer = min(1.2, round((facts.temperature or 0.8) + 0.2, 2))
    return Diagnosis(
        "variety_lost", "the answers lose their variety", "warn", 0.65,
        known([s.evidence("actor/entropy", lambda v: v < 0.1 * start, f"{number(start)} at the start"),
               s.evidence("critic/zero_std_fraction", lambda v: v > 0.3),
               s.evidence("critic/score_std", lambda v: v < 0.2 * s.start("critic/score_std"))]),
        "the policy puts nearly all of its weight on one answer, so a group has little to compare",
        (f"rollout.temperature={warmer}", "actor.entropy_coeff=0.001"),
        "harmless where the answers are right: look at val/rouge_l and gad samples RUN",
    )  # fmt: skip


def sft_loss(s: Signals, facts: RunFacts) -> Diagnosis | None:
    """The SFT loss does not fall, or rises again."""
    steps, values = _finite(s.history.tail("actor/sft_loss", 512))
    if len(values) < 50:
        return None
    now, start = s.now("actor/sft_loss"), s.start("actor/sft_loss")
    lowest = min(median(values[i : i + 15]) for i in range(0, len(values) - 14, 5))
    lr = facts.actor_lr or 5e-6
    if now > 1.3 * lowest + 0.1:
        since = s.since("actor/sft_loss", lambda v: v > 1.15 * lowest + 0.05)
        return Diagnosis(
            "sft_diverges", "the SFT loss rises again", "warn", 0.7,
            (Evidence("actor/sft_loss", now, since, f"{number(lowest)} at its lowest"),),
            "the steps are too large for this model", (f"actor.optim.lr={lr / 3:.0e}", "actor.grad_clip=0.5"),
        )  # fmt: skip
    if start > 1.5 and now > 0.97 * start and s.history.first is not None and s.history.first.step <= 2:
        return Diagnosis(
            "sft_stuck", "the SFT loss does not fall", "warn", 0.65,
            (Evidence("actor/sft_loss", now, steps[0], f"{number(start)} at the start"),),
            "the steps are too small, or few of the weights are trained", (f"actor.optim.lr={4 * lr:.0e}",),
            "see actor/lr (a warm-up may still go on), actor.model.train_layers and actor.model.lora.rank",
        )  # fmt: skip
    return None


SLOW_RULES: tuple[Rule, ...] = (quality_falls, overfits, blind_critic, variety_lost, sft_loss)


def _finite(series: tuple[Sequence[int], Sequence[float]]) -> tuple[list[int], list[float]]:
    kept = [(step, value) for step, value in zip(*series, strict=True) if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def _rise(s: Signals, since: int) -> float:
    """How far the reward rose since `since`, or 0 where that is within its scatter."""
    steps, values = _finite(s.series("critic/student_value_mean"))
    near = sorted(zip(steps, values, strict=True), key=lambda pair: abs(pair[0] - since))[:15]
    then, now = [v for _, v in near], values[-15:]
    if len(values) < 30:
        return 0.0
    scatter = 1.4826 * median([abs(v - median(now)) for v in now])
    rise = median(now) - median(then)
    return rise if rise > 2 * scatter and rise > 0.05 else 0.0
