"""Each known collapse from its own figures, in several of the forms a real run gives it: late, noisy, half logged.

COLLAPSES is keyed by the diagnosis that must come first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metrics.generated import Metrics, Run
from metrics.rough import Draw, Noise, eight_pairs, game, lora_without_kl, many, paper


def turn(run: Run, change: Callable[[Noise, float], Metrics], *, onset: float, over: float = 0.3, seed: int = 0,
         drop: tuple[str, ...] = (), **info: Any) -> Run:  # fmt: skip
    """From the share `onset` of the run on, metrics become change(noise, 0..1 within `over`); `drop` removes keys."""
    n = Noise(1000 + seed)
    first = int(onset * len(run[1]))
    span = max(1, int(over * len(run[1])))
    steps = [m if i < first else m | change(n, min(1.0, (i - first) / span)) for i, m in enumerate(run[1])]
    kept = [{k: v for k, v in m.items() if not k.startswith(drop)} if drop else m for m in steps]
    return {k: v for k, v in (run[0] | info).items() if v != "unknown"}, kept


def to(begin: float, end: float, p: float) -> float:
    """Geometric between two numbers of one sign."""
    return begin * (end / begin) ** p


def _original(seed: int, steps: int = 200, **more: Any) -> Run:
    return many(steps, {"critic_loss": "original", "critic_values": "all", **more},
                lambda n, i: game(n, i, loss="original", gap=0.8), seed)  # fmt: skip


def _hinge(loss: str, seed: int, steps: int = 200, **more: Any) -> Run:
    def draw(n: Noise, i: int) -> Metrics:
        step = game(n, i, loss=loss, gap=1.5, acc=0.75, limit=512, per_token=6)
        lower = "critic/hinge_loss" if loss == "v1" else "critic/hinge_loss_lower"
        return step | {lower: max(0.0, 1 - step["critic/score_diff"])}

    return many(steps, {"critic_loss": loss, "max_response_length": 512, **more}, draw, seed)  # fmt: skip


def _saturate(n: Noise, p: float) -> Metrics:
    student, teacher = n.around(2.57, 0.1) * p, n.around(18.1, 0.03) * p
    return {"critic/d_loss": n.around(to(0.4, 1e-6, p), 0.8), "critic/d_acc": 1.0 - 0.3 * (1 - p),
            "critic/grad_norm": n.around(to(0.4, 2.5e-4, p), 0.6), "critic/student_value_mean": student,
            "critic/teacher_value_mean": teacher, "critic/score_diff": teacher - student,
            "critic/raw_score_diff": teacher - student}  # fmt: skip


def saturated_late(seed: int) -> Run:
    return turn(_original(seed), _saturate, onset=0.75, over=0.1, seed=seed)


def saturated_means_only(seed: int) -> Run:
    """An older trainer's log: no gaps, no header; the loss, the accuracy and both means tell."""
    return turn(_original(seed), _saturate, onset=0.4, seed=seed, critic_loss="unknown", critic_values="unknown",
                drop=("critic/score_diff", "critic/raw_score_diff", "critic/grad_norm", "rollout/"))  # fmt: skip


def saturated_from_a_resume(seed: int) -> Run:
    """All of the log lies after the collapse, with an occasional tie."""

    def change(n: Noise, p: float) -> Metrics:
        return _saturate(n, 1.0) | {"critic/d_acc": 1.0 if n.rng.random() < 0.8 else 0.998}

    return turn(_original(seed, steps=40), change, onset=0.0, seed=seed)  # fmt: skip


def _run_off(n: Noise, p: float, gap: float = 117.0) -> Metrics:
    wide = n.around(to(1.8, gap, p), 0.12)
    length = max(1.0, n.around(to(118, 1.0, min(1.0, 1.15 * p)), 0.1))
    return {"critic/score_diff": wide, "critic/raw_score_diff": wide * length, "critic/d_acc": min(1.0, 0.9 + 0.2 * p),
            "critic/student_value_mean": 1.25 - wide, "critic/teacher_value_mean": n.around(1.25, 0.1),
            "critic/d_loss": n.around(to(0.5, 0.003, p), 0.4), "response_length/mean": length,
            "response_length/clip_ratio": 0.0, "critic/hinge_loss": 0.0}  # fmt: skip


def runaway_at_141(seed: int) -> Run:
    return turn(_hinge("v1", seed, 141), _run_off, onset=0.05, over=0.9, seed=seed)


def runaway_late(seed: int) -> Run:
    return turn(_hinge("v1", seed, 400), _run_off, onset=0.8, over=0.15, seed=seed)


def runaway_scores_alone(seed: int) -> Run:
    """Half way there, and the lengths were not logged."""
    return turn(_hinge("v1", seed), lambda n, p: _run_off(n, p, 60), onset=0.3, over=0.6, seed=seed,
                drop=("response_length/", "teacher_length/"))  # fmt: skip


def runaway_without_a_name(seed: int) -> Run:
    return turn(_hinge("v1", seed), _run_off, onset=0.4, over=0.5, seed=seed, critic_loss="unknown",
                drop=("critic/hinge", "critic/raw_score_diff"))  # fmt: skip


def runaway_under_original(seed: int) -> Run:
    return turn(_original(seed), _run_off, onset=0.3, over=0.6, seed=seed)


def _flat(n: Noise, p: float) -> Metrics:
    tiny = n.rng.uniform(-1, 1) * 1e-8
    return {"actor/pg_loss": tiny, "actor/ppo_kl": 0.0, "critic/advantages/max": abs(tiny), "actor/pg_clipfrac": 0.0,
            "critic/advantages/min": -abs(tiny), "critic/advantages/mean": 0.0, "critic/zero_std_fraction": 1.0,
            "critic/score_std": 0.0, "actor/grad_norm": n.around(3.6e-7, 0.7),
            "response_length/mean": max(1.0, n.around(to(130, 7, p), 0.08))}  # fmt: skip


def spreadless_late(seed: int) -> Run:
    return turn(many(300, {"rollout_n": 4, "temperature": 0.2}, game, seed), _flat, onset=0.7,
                over=0.2, seed=seed)  # fmt: skip


def spreadless_old_names(seed: int) -> Run:
    """Only what the older trainer logged: pg_loss, ppo_kl, advantages, grad_norm, length."""
    run = many(120, {"temperature": "unknown", "rollout_n": "unknown"}, game, seed)
    return turn(
        run, _flat, onset=0.2, seed=seed, drop=("critic/zero", "critic/score_std", "teacher_length/", "rollout/")
    )


def spreadless_under_a_kl_loss(seed: int) -> Run:
    """The KL loss keeps a gradient alive, and now and then one group differs."""

    def change(n: Noise, p: float) -> Metrics:
        some = n.rng.random() < 0.25
        lone = {"critic/advantages/max": 2.47, "critic/advantages/min": -0.35, "critic/zero_std_fraction": 0.97}
        return _flat(n, p) | {"actor/grad_norm": n.around(3e-3, 0.5)} | (lone if some else {})

    return turn(many(200, {"ppo_epochs": 1}, game, seed), change, onset=0.5, seed=seed)  # fmt: skip


def _hinged(n: Noise, p: float) -> Metrics:
    return {"critic/d_acc": max(0.97, n.within(0.998, 0.004)),
            "critic/score_diff": n.around(0.038, 0.15), "critic/raw_score_diff": n.around(16, 0.1),
            "critic/hinge_loss_lower": n.rng.gauss(0.962, 0.004), "critic/hinge_loss": n.rng.gauss(0.962, 0.004),
            "response_length/clip_ratio": 1.0, "response_length/mean": 512.0,
            "response_length/max": 512.0, "response_length/min": 512.0}  # fmt: skip


def hinged_late(seed: int) -> Run:
    return turn(_hinge("v2", seed), _hinged, onset=0.8, over=0.05, seed=seed)


def hinged_v1_short_answers(seed: int) -> Run:
    """The same under v1, with answers that end."""

    def change(n: Noise, p: float) -> Metrics:
        return {k: v for k, v in _hinged(n, p).items() if k.startswith("critic/")}

    return turn(_hinge("v1", seed), change, onset=0.4, seed=seed)  # fmt: skip


def hinged_few_keys(seed: int) -> Run:
    """d_acc and score_diff from 32 pairs, loss unnamed, no hinge logged."""

    def change(n: Noise, p: float) -> Metrics:
        return _hinged(n, p) | {"critic/d_acc": n.share(0.998, 32)}

    return turn(_hinge("v2", seed), change, onset=0.5, seed=seed, critic_loss="unknown",
                drop=("critic/hinge", "critic/raw", "critic/grad"))  # fmt: skip


def _grow(n: Noise, p: float) -> Metrics:
    return {"response_length/mean": min(512.0, n.around(to(170, 477.6, p), 0.03)), "response_length/max": 512.0,
            "response_length/clip_ratio": n.within(0.05 + 0.811 * p, 0.02),
            "teacher_length/mean": n.around(118, 0.05), "critic/d_acc": n.share(0.93, 64),
            "val/length_auc": 0.5 + 0.47 * p}  # fmt: skip


def grows_late(seed: int) -> Run:
    return turn(_hinge("v2", seed), _grow, onset=0.7, over=0.15, seed=seed)


def grows_teacher_unlogged(seed: int) -> Run:
    return turn(_hinge("v2", seed), _grow, onset=0.3, seed=seed, drop=("teacher_length/", "val/"))


def grows_under_original(seed: int) -> Run:
    return turn(_original(seed, max_response_length=512), _grow, onset=0.5, seed=seed)


def clips_from_the_start(seed: int) -> Run:
    run = many(60, {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}, game, seed)
    return turn(run, lambda n, p: {"actor/pg_clipfrac": n.within(0.63, 0.09)}, onset=0, seed=seed)


def clips_unnamed(seed: int) -> Run:
    """Rising from .2 to .63; the header does not tell the clip."""
    run = many(200, {}, game, seed)
    return turn(run, lambda n, p: {"actor/pg_clipfrac": n.within(0.2 + 0.43 * p, 0.08)}, onset=0.5, seed=seed)


def _drift(n: Noise, p: float) -> Metrics:
    half = to(3.0, 167.0, p)
    teacher, student = n.around(half, 0.05), -n.around(half, 0.05)
    return {"critic/teacher_value_mean": teacher, "critic/student_value_mean": student,
            "critic/raw_score_diff": teacher - student, "critic/d_acc": min(1.0, 0.85 + 0.2 * p),
            "critic/score_diff": n.around(2.6, 0.1)}  # fmt: skip


def drifts_late(seed: int) -> Run:
    return turn(_hinge("v2", seed), _drift, onset=0.7, over=0.2, seed=seed)


def drifts_means_only(seed: int) -> Run:
    return turn(_hinge("v2", seed), _drift, onset=0.3, over=0.6, seed=seed, critic_loss="unknown",
                drop=("critic/raw_score_diff", "critic/hinge", "critic/score_diff"))  # fmt: skip


def drifts_on_one_side(seed: int) -> Run:
    """The student's scores alone fall; the teacher's stay."""

    def change(n: Noise, p: float) -> Metrics:
        fall = n.around(to(3.0, 330.0, p), 0.04)
        return {
            "critic/student_value_mean": 2 - fall,
            "critic/teacher_value_mean": n.around(2.0, 0.2),
            "critic/raw_score_diff": fall,
            "critic/score_diff": n.around(1.9, 0.1),
        }

    return turn(_hinge("v2", seed), change, onset=0.4, over=0.4, seed=seed)  # fmt: skip


def given_away_from_step_one(seed: int) -> Run:
    run = many(80, {"critic_loss": "original"}, lambda n, i: game(n, i, loss="original", gap=0.9), seed)
    told = {"critic/d_acc": 1.0}
    return turn(run, lambda n, p: told | {"critic/score_diff": n.around(2.5, 0.2)}, onset=0, seed=seed)


def given_away_by_cut_answers(seed: int) -> Run:
    run = many(60, {"stage": "warmup", "critic_warmup": 60}, lambda n, i: game(n, i, actor=False), seed)
    told = {"critic/d_acc": 1.0}
    return turn(run, lambda n, p: told | {"response_length/clip_ratio": n.share(0.8, 64)}, onset=0, seed=seed)


def rests(seed: int) -> Run:
    return turn(many(200, {}, lambda n, i: game(n, i, acc=0.59), seed), lambda n, p: {
        "critic/score_diff": n.around(0.0026, 0.15), "critic/ranking_loss": n.rng.gauss(0.6926, 1e-4)},
        onset=0.3, over=0.01, seed=seed)  # fmt: skip


COLLAPSES: dict[str, tuple[Draw, ...]] = {
    "saturated_ranking": (saturated_late, saturated_means_only, saturated_from_a_resume),
    "runaway_gap": (runaway_at_141, runaway_late, runaway_scores_alone, runaway_without_a_name, runaway_under_original),
    "no_spread": (spreadless_late, spreadless_old_names, spreadless_under_a_kl_loss),
    "lower_hinge": (hinged_late, hinged_v1_short_answers, hinged_few_keys),
    "length_giveaway": (grows_late, grows_teacher_unlogged, grows_under_original),
    "clip_fraction": (clips_from_the_start, clips_unnamed),
    "raw_drift": (drifts_late, drifts_means_only, drifts_on_one_side),
    "giveaway": (given_away_from_step_one, given_away_by_cut_answers),
    "on_policy": (paper, lora_without_kl, eight_pairs),
    "resting_point": (rests,),
}
