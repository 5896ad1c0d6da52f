"""Generated runs: healthy ones of every loss and stage, and the known collapses drawn from their own figures."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Metrics = dict[str, float]
Run = tuple[dict[str, Any], list[Metrics]]

LOSSES = ("original", "v1", "v2", "v2_raw", "final")
GAP = {"original": 0.8, "v1": 1.0, "v2": 1.6, "v2_raw": 1.4, "final": 0.12}


def header(**more: Any) -> dict[str, Any]:
    base = {"type": "run", "time": 1_700_000_000.0, "stage": "gad", "exp_name": "generated", "preset": "chengla-8b",
            "total_steps": 200, "start_step": 0, "critic_loss": "final", "critic_values": "last", "critic_warmup": 0,
            "ppo_epochs": 2, "mini_batches": 1, "max_response_length": 256, "objective": "policy", "rollout_n": 8,
            "temperature": 0.8, "world_size": 1, "resumed": False}  # fmt: skip
    return {**base, **more}


def healthy(seed: int, loss: str = "final", stage: str = "gad", steps: int = 200, **more: Any) -> Run:
    """A run with nothing wrong: learning curves, noise of a small batch, on-policy zeros where they belong."""
    rng = random.Random(seed)
    info = header(stage=stage, critic_loss=loss, total_steps=steps, **more)
    if stage == "seqkd":
        return {**info, "objective": "sft", "critic_warmup": -1, "critic_loss": None}, [
            _sft_step(rng, i / steps) for i in range(steps)
        ]
    warmup = 10 if stage == "warmup" else 0
    info["critic_warmup"] = warmup
    on_policy = info["ppo_epochs"] == 1 and info["mini_batches"] == 1
    return info, [_gad_step(rng, loss, i, steps, i >= warmup, on_policy) for i in range(steps)]


def _sft_step(rng: random.Random, progress: float) -> Metrics:
    loss = 1.2 + 1.5 * math.exp(-6 * progress) + rng.gauss(0, 0.05)
    return {"actor/sft_loss": loss, "actor/teacher_pg_loss": loss, "actor/grad_norm": abs(rng.gauss(1.0, 0.2)),
            "actor/lr": 5e-6, "teacher_length/mean": rng.gauss(110, 6), "timing_s/step": abs(rng.gauss(3, 0.2)),
            "perf/tokens_per_s": abs(rng.gauss(9000, 300))}  # fmt: skip


def _gad_step(rng: random.Random, loss: str, i: int, steps: int, actor: bool, on_policy: bool) -> Metrics:
    learned = 1 - math.exp(-i / 15)
    wide = GAP[loss] * learned * rng.lognormvariate(0, 0.15)
    d_acc = min(0.97, 0.5 + 0.17 * learned + rng.gauss(0, 0.04))
    tokens = rng.gauss(110, 5)
    start = rng.gauss(190, 8)
    length = tokens + (start - tokens) * math.exp(-i / 25) + rng.gauss(0, 4)
    raw = wide if loss == "original" else wide * 6
    student = rng.gauss(-0.3, 0.15) - raw / 2
    metrics = {
        "critic/d_loss": abs(rng.gauss(1.0, 0.05)), "critic/d_acc": d_acc, "critic/score_diff": wide,
        "critic/raw_score_diff": raw, "critic/student_value_mean": student,
        "critic/teacher_value_mean": student + raw, "critic/grad_norm": rng.lognormvariate(-1, 0.5),
        "critic/lr": 1e-6, "critic/score_std": abs(rng.gauss(0.4, 0.05)),
        "critic/ranking_loss": math.log1p(math.exp(-wide / 2)) + abs(rng.gauss(0, 0.0005)),
        "critic/zero_std_fraction": max(0.0, rng.gauss(0.03, 0.02)), "critic/advantages/mean": rng.gauss(0, 1e-8),
        "critic/advantages/max": abs(rng.gauss(2.2, 0.1)), "critic/advantages/min": -abs(rng.gauss(2.2, 0.1)),
        "response_length/mean": length, "response_length/max": 256.0, "response_length/min": 12.0,
        "response_length/clip_ratio": min(1.0, abs(rng.gauss(0.05 + 0.5 * math.exp(-i / 12), 0.02))),
        "teacher_length/mean": tokens, "rollout/logp_diff_mean": abs(rng.gauss(0.012, 0.003)),
        "timing_s/step": abs(rng.gauss(40, 2)), "timing_s/rollout": abs(rng.gauss(18, 1)),
        "timing_s/critic": abs(rng.gauss(9, 0.5)), "timing_s/actor": abs(rng.gauss(11, 0.5)),
        "timing_s/sync": abs(rng.gauss(1, 0.1)), "timing_s/score": 1.0, "rollout/tokens_per_s": rng.gauss(8000, 200),
        "perf/tokens_per_s": rng.gauss(3500, 100), "perf/rss_gb": 21.0,
    }  # fmt: skip
    if loss in ("v2", "v2_raw"):
        metrics["critic/hinge_loss_lower"] = max(0.0, 1 - wide)
        metrics["critic/hinge_loss_upper"] = 0.0
    if loss == "final":
        metrics["critic/diff_penalty"] = 0.0
    if actor:
        metrics |= {
            "actor/pg_loss": 0.0 if on_policy else rng.gauss(0, 0.02),
            "actor/ppo_kl": 0.0 if on_policy else rng.gauss(2e-4, 1e-4),
            "actor/pg_clipfrac": 0.0 if on_policy else min(0.45, abs(rng.gauss(0.2, 0.05))),
            "actor/grad_norm": rng.lognormvariate(-1, 0.4), "actor/kl_loss": 0.02 * (1 + i / 50),
            "actor/entropy": rng.gauss(1.1, 0.05), "actor/lr": 3e-6,
        }  # fmt: skip
    return metrics


def bend(run: Run, change: Callable[[float, random.Random], Metrics], begin: float = 0.3, **info: Any) -> Run:
    """From the share `begin` of the run on, overwrite metrics by `change(progress 0..1, rng)`."""
    rng = random.Random(99)
    first = int(begin * len(run[1]))
    rest = max(1, len(run[1]) - 1 - first)
    steps = [m if i < first else {**m, **change((i - first) / rest, rng)} for i, m in enumerate(run[1])]
    return {**run[0], **info}, steps


def _fall(start: float, end: float, at: float) -> float:
    """Geometric from `start` to `end`, reaching it at 60 % of the way and staying."""
    return start * (end / start) ** min(1.0, at / 0.6)


def saturated(seed: int) -> Run:
    """d_loss ~1e-6, d_acc 1.0, grad_norm 2.5e-4, means 2.57 against 18.1 under `original` with values on all."""
    return bend(healthy(seed, "original"), lambda p, r: {
        "critic/d_loss": _fall(0.4, 1e-6, p), "critic/d_acc": min(1.0, 0.7 + p),
        "critic/grad_norm": _fall(0.4, 2.5e-4, p),
        "critic/student_value_mean": 2.57 * min(1, 2 * p), "critic/teacher_value_mean": 18.1 * min(1, 2 * p),
        "critic/score_diff": 15.5 * min(1, 2 * p), "critic/raw_score_diff": 15.5 * min(1, 2 * p),
    }, critic_values="all")  # fmt: skip


def runaway(seed: int) -> Run:
    """v1: score_diff 1.8 → 117, student -115.75, response length 1.0 at step 141."""
    return bend(healthy(seed, "v1", steps=141), lambda p, r: {
        "critic/score_diff": 1.8 * (117 / 1.8) ** p, "critic/raw_score_diff": 1.8 * (117 / 1.8) ** p,
        "critic/student_value_mean": 1.25 - 1.8 * (117 / 1.8) ** p, "critic/teacher_value_mean": 1.25,
        "critic/d_acc": 1.0, "response_length/mean": max(1.0, 110 * (1 / 110) ** (p * 1.1)),
        "response_length/clip_ratio": 0.0,
    }, begin=0.05)  # fmt: skip


def spreadless(seed: int) -> Run:
    """pg_loss, ppo_kl, advantages all 0, grad_norm 3.6e-7, length 130 → 7."""
    return bend(healthy(seed), lambda p, r: {
        "actor/pg_loss": 0.0, "actor/ppo_kl": 0.0, "critic/advantages/max": 0.0, "critic/advantages/min": 0.0,
        "critic/advantages/mean": 0.0, "critic/zero_std_fraction": 1.0, "critic/score_std": 0.0,
        "actor/grad_norm": 3.6e-7, "response_length/mean": _fall(130, 7, p), "actor/pg_clipfrac": 0.0,
    }, rollout_n=4, temperature=0.2)  # fmt: skip


def hinged(seed: int) -> Run:
    """v2: d_acc .998 with score_diff .038, clip_ratio 1.0."""
    return bend(healthy(seed, "v2", max_response_length=512), lambda p, r: {
        "critic/d_acc": 0.998 + r.gauss(0, 5e-4), "critic/score_diff": 0.038 + r.gauss(0, 0.002),
        "critic/hinge_loss_lower": 0.962, "response_length/clip_ratio": 1.0, "response_length/mean": 512.0,
    })  # fmt: skip


def long_answers(seed: int) -> Run:
    """Length mean 477.6 and clip_ratio 86.1 % under a limit of 512, teacher P99 174."""
    return bend(healthy(seed, "v2", max_response_length=512), lambda p, r: {
        "response_length/mean": min(477.6, 190 + 700 * p) + r.gauss(0, 3), "critic/d_acc": 0.93 + r.gauss(0, 0.01),
        "response_length/clip_ratio": min(0.861, 0.2 + 2 * p), "response_length/max": 512.0,
    })  # fmt: skip


def clipped(seed: int) -> Run:
    """63 % of the tokens clipped at 3e-4/4e-4."""
    return bend(healthy(seed), lambda p, r: {"actor/pg_clipfrac": 0.63 + r.gauss(0, 0.02)}, begin=0.0,
                clip_ratio_low=3e-4, clip_ratio_high=4e-4, loss_mode="gspo")  # fmt: skip


def zeros_on_policy(seed: int) -> Run:
    """One epoch, one mini-batch: pg_loss and ppo_kl exactly 0, which is no fault."""
    return healthy(seed, ppo_epochs=1)


def drifting(seed: int) -> Run:
    """Means ±167, raw gap 335, while the gap per token stays bounded."""
    return bend(healthy(seed, "v2"), lambda p, r: {
        "critic/student_value_mean": -167 * min(1, 1.5 * p), "critic/teacher_value_mean": 167 * min(1, 1.5 * p),
        "critic/raw_score_diff": 335 * min(1, 1.5 * p), "critic/d_acc": 1.0,
    })  # fmt: skip


def given_away(seed: int) -> Run:
    """d_acc exactly 1.0 from step 1."""
    return bend(healthy(seed), lambda p, r: {"critic/d_acc": 1.0}, begin=0.0)


def resting(seed: int) -> Run:
    """`final` on last-token values at its resting point: gap .0026, ranking_loss .6926, d_acc .59."""
    return bend(healthy(seed), lambda p, r: {
        "critic/score_diff": 0.0026 + r.gauss(0, 2e-4), "critic/ranking_loss": 0.6926,
        "critic/d_acc": 0.59 + r.gauss(0, 0.01),
    })  # fmt: skip


SYMPTOMS: dict[str, Callable[[int], Run]] = {
    "saturated_ranking": saturated, "runaway_gap": runaway, "no_spread": spreadless, "lower_hinge": hinged,
    "length_giveaway": long_answers, "clip_fraction": clipped, "on_policy": zeros_on_policy, "raw_drift": drifting,
    "giveaway": given_away, "resting_point": resting,
}  # fmt: skip


def write(run_dir: Path, run: Run, *, ended: bool = True) -> Path:
    """The run as a folder that every reader takes."""
    run_dir.mkdir(parents=True, exist_ok=True)
    info, steps = run
    now = info["time"]
    with (run_dir / "metrics.jsonl").open("w") as file:
        file.write(json.dumps(info) + "\n")
        for i, metrics in enumerate(steps, start=1):
            when = now + i * metrics.get("timing_s/step", 1.0)
            record = {"type": "step", "time": when, "step": i, "epoch": i // 50, "metrics": metrics}
            file.write(json.dumps(record) + "\n")
            if i % 50 == 0 and "critic/d_acc" in metrics:
                held = {"val/rouge_l": 0.2 + i / 2000, "val/d_acc": metrics["critic/d_acc"], "val/length_auc": 0.55}
                file.write(json.dumps({"type": "eval", "time": when, "step": i, "metrics": held}) + "\n")
                file.write(json.dumps({"type": "event", "time": when, "step": i, "kind": "save", "level": "info",
                                       "message": f"saved global_step_{i}"}) + "\n")  # fmt: skip
        if ended:
            end = {"type": "end", "time": when, "step": len(steps), "code": 0, "message": "done"}
            file.write(json.dumps(end) + "\n")
    rows = [
        {"step": 50 * k, "kind": "val", "prompt": f"Question {j} of step {50 * k}: why is the sky blue?",
         "student": "Because of Rayleigh scattering, which 散射 blue light more.", "teacher": "Rayleigh scattering.",
         "student_score": -0.1 * j, "teacher_score": 0.3 + 0.1 * j}
        for k in range(1, len(steps) // 50 + 1) for j in range(3)
    ]  # fmt: skip
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return run_dir
