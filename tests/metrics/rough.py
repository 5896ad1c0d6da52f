"""Runs as they are in the field: heavy-tailed noise, drift, gaps, late onsets, other losses, sparse headers.

`generated.py` draws smooth runs; these are the hard ones. HEALTHY has shapes that look odd and are not; the collapses
are in `rough_collapses.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from metrics.generated import Metrics, Run, header

Draw = Callable[[int], Run]


class Noise:
    """Draws for one run: slow drift (AR(1)), log-normal scatter with a heavy tail, shares of a small batch."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"rough {seed}")
        self._drift: dict[str, float] = {}

    def drift(self, name: str, size: float, memory: float = 0.9) -> float:
        """A wandering offset whose standard deviation is `size`."""
        old = self._drift.get(name, 0.0)
        new = memory * old + math.sqrt(1 - memory**2) * self.rng.gauss(0, size)
        self._drift[name] = new
        return new

    def around(self, value: float, share: float = 0.2) -> float:
        """`value` times log-normal scatter; one draw in 40 is a spike of up to tenfold."""
        spike = self.rng.uniform(2, 10) if self.rng.random() < 0.025 else 1.0
        return value * self.rng.lognormvariate(0, share) * spike

    def within(self, value: float, size: float) -> float:
        """`value` with normal scatter, kept within [0, 1]."""
        return min(1.0, max(0.0, self.rng.gauss(value, size)))

    def share(self, p: float, pairs: int) -> float:
        """The share of `pairs` draws that succeed, a tenth of them ties that count one half."""
        p = min(1.0, max(0.0, p))
        hits = sum(0.5 if self.rng.random() < 0.1 * min(p, 1 - p) else self.rng.random() < p for _ in range(pairs))
        return hits / pairs


def game(n: Noise, i: int, *, loss: str = "final", pairs: int = 64, gap: float = 0.15, acc: float = 0.68,
         teacher: float = 120.0, start: float = 180.0, limit: float = 256.0, actor: bool = True,
         on_policy: bool = False, level: float = 0.0, per_token: float = 1.0) -> Metrics:  # fmt: skip
    """One healthy adversarial step. `per_token` is raw gap over the loss's gap."""
    learned = 1 - math.exp(-i / 12)
    want = 0.5 + (acc - 0.5) * learned + n.drift("acc", 0.02)
    wide = gap * learned * math.exp(n.drift("gap", 0.2)) + n.rng.gauss(0, 0.15 * gap)
    long = teacher + n.drift("teacher", 0.04 * teacher, 0.3)
    length = long + (start - teacher) * math.exp(-i / 30) + n.drift("length", 0.06 * teacher)
    raw = wide * per_token
    student = level + n.drift("level", 0.3) - raw / 2
    cut = min(1.0, max(0.0, 0.04 + 0.4 * (length / limit) ** 4 + n.rng.gauss(0, 0.02)))
    metrics = {
        "critic/d_loss": n.around(0.9, 0.1), "critic/d_acc": n.share(want, pairs), "critic/score_diff": wide,
        "critic/raw_score_diff": raw, "critic/student_value_mean": student, "critic/teacher_value_mean": student + raw,
        "critic/grad_norm": n.around(0.6, 0.5), "critic/lr": 1e-6, "critic/score_std": n.around(0.3, 0.2),
        "critic/zero_std_fraction": n.share(0.05, pairs), "critic/advantages/mean": n.rng.gauss(0, 1e-8),
        "critic/advantages/max": n.around(2.0, 0.1), "critic/advantages/min": -n.around(2.0, 0.1),
        "response_length/mean": max(1.0, length), "response_length/max": limit if cut > 0 else 0.9 * limit,
        "response_length/min": max(1.0, 0.1 * length), "response_length/clip_ratio": cut,
        "teacher_length/mean": long, "rollout/logp_diff_mean": n.around(0.01, 0.2), "timing_s/step": n.around(30, 0.1),
        "timing_s/rollout": n.around(14, 0.1), "timing_s/critic": n.around(6, 0.1), "perf/tokens_per_s": n.around(4e3),
    }  # fmt: skip
    if loss == "final":
        metrics["critic/ranking_loss"] = math.log1p(math.exp(-wide / 2)) + abs(n.rng.gauss(0, 4e-4))
        metrics["critic/diff_penalty"] = max(0.0, n.rng.gauss(0.0, 0.002))
    if actor:
        metrics |= {
            "actor/pg_loss": 0.0 if on_policy else n.rng.gauss(0, 0.02), "actor/grad_norm": n.around(0.3, 0.5),
            "actor/ppo_kl": 0.0 if on_policy else n.rng.gauss(1e-4, 1e-4), "actor/entropy": n.around(1.0, 0.05),
            "actor/pg_clipfrac": 0.0 if on_policy else min(0.5, n.around(0.15, 0.3)), "actor/lr": 1e-6,
            "actor/kl_loss": n.around(0.01 + 2e-4 * i, 0.2),
        }  # fmt: skip
    return metrics


def sft(n: Noise, i: int, steps: int, start: float = 3.0, end: float = 0.6) -> Metrics:
    loss = n.around(end + (start - end) * math.exp(-6 * i / steps), 0.08)
    return {"actor/sft_loss": loss, "actor/teacher_pg_loss": loss, "actor/lr": 5e-6,
            "actor/grad_norm": n.around(1.5 + 20 * math.exp(-i), 0.4), "teacher_length/mean": n.around(120, 0.1),
            "timing_s/step": n.around(4, 0.1), "perf/tokens_per_s": n.around(9e3, 0.1)}  # fmt: skip


def many(steps: int, info: dict[str, Any], draw: Callable[[Noise, int], Metrics], seed: int) -> Run:
    n = Noise(seed)
    return {**header(total_steps=steps), **info}, [draw(n, i) for i in range(steps)]


_SEQKD = {"stage": "seqkd", "objective": "sft", "critic_warmup": -1, "critic_loss": None}
_PAPER = {"critic_loss": "original", "ppo_epochs": 1, "max_response_length": 1536, "preset": "gad-paper",
          "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "loss_mode": "ppo", "temperature": 0.8}  # fmt: skip


def seqkd_short(seed: int) -> Run:
    return many(12, _SEQKD, lambda n, i: sft(n, i, 12), seed)


def seqkd_already_good(seed: int) -> Run:
    """A student that knows the task: small losses, small gradients."""
    return many(300, _SEQKD, lambda n, i: {**sft(n, i, 300, 0.09, 0.02), "actor/grad_norm": n.around(0.03)}, seed)


def seqkd_that_watches_its_samples(seed: int) -> Run:
    """A base model that rambles to the limit for most of its SFT, its answers logged for monitoring."""

    def draw(n: Noise, i: int) -> Metrics:
        length = 120 + 390 / (1 + math.exp((i - 55) / 6))
        answers = {"response_length/mean": n.around(length, 0.02), "teacher_length/mean": n.around(118, 0.05)}
        cut = {"response_length/clip_ratio": n.within(length / 520, 0.02)}
        return sft(n, i, 80) | answers | cut | {"val/length_auc": n.within(0.5 + length / 1050, 0.02)}

    return many(80, {**_SEQKD, "max_response_length": 512}, draw, seed)


def seqkd_with_a_critics_keys(seed: int) -> Run:
    """The config of a seqkd stage still names a critic loss."""
    return many(100, {**_SEQKD, "critic_loss": "final"}, lambda n, i: sft(n, i, 100), seed)


def first_steps(seed: int) -> Run:
    """Six steps of a critic that knows nothing yet."""
    return many(6, {}, lambda n, i: {**game(n, i), "critic/d_acc": n.share(0.45, 16)}, seed)


def fresh_critic(seed: int) -> Run:
    """Warmup: the wrong way round for ten steps, then learning; the actor silent until step 11."""

    def draw(n: Noise, i: int) -> Metrics:
        step = game(n, max(0, i - 8), loss="original", gap=1.0, actor=i >= 10)
        return step | {"critic/score_diff": -0.2 + 0.02 * i, "critic/d_acc": n.share(0.42, 64)} if i < 10 else step

    return many(28, {"stage": "warmup", "critic_loss": "original", "critic_warmup": 10}, draw, seed)  # fmt: skip


def paper(seed: int) -> Run:
    return many(150, _PAPER, lambda n, i: game(n, i, loss="original", gap=1.1, acc=0.74, teacher=520, start=700,
                                               limit=1536, on_policy=True, pairs=256), seed)  # fmt: skip


def paper_warmup(seed: int) -> Run:
    """The paper's own warmup: the actor by SFT meanwhile."""

    def draw(n: Noise, i: int) -> Metrics:
        both = game(n, i, loss="original", gap=0.9, actor=False, teacher=500, start=600, limit=1536)
        return sft(n, i, 60) | both

    return many(60, {**_PAPER, "stage": "warmup", "critic_warmup": 10, "objective": "sft"}, draw, seed)  # fmt: skip


def eight_pairs(seed: int) -> Run:
    """Two prompts of four answers: d_acc jumps between .25 and 1."""
    return many(240, {"critic_loss": "original", "rollout_n": 4, "ppo_epochs": 1},
                lambda n, i: game(n, i, loss="original", gap=0.7, pairs=8, on_policy=True), seed)  # fmt: skip


def even_match(seed: int) -> Run:
    """The student has caught up: d_acc near one half, small gaps."""
    return many(400, {"critic_loss": "original"},
                lambda n, i: game(n, i, loss="original", gap=0.12, acc=0.54), seed)  # fmt: skip


def strong_critic_within_bounds(seed: int) -> Run:
    return many(200, {"critic_loss": "v2"}, lambda n, i: game(n, i, loss="v2", gap=2.2, acc=0.84, per_token=8), seed)


def long_texts(seed: int) -> Run:
    """Values on all tokens of long answers: raw scores of tens."""
    return many(200, {"critic_values": "all", "max_response_length": 2048},
                lambda n, i: game(n, i, gap=0.05, teacher=700, start=900, limit=2048, per_token=500), seed)  # fmt: skip


def short_answers(seed: int) -> Run:
    """A task whose answers have three tokens."""
    return many(150, {"max_response_length": 16},
                lambda n, i: game(n, i, teacher=3.2, start=5, limit=16), seed)  # fmt: skip


def growing_to_the_teacher(seed: int) -> Run:
    return many(200, {}, lambda n, i: game(n, i, teacher=150, start=40), seed)


def shrinking_to_the_teacher(seed: int) -> Run:
    """From a talkative base to a terse teacher: 230 → 24 tokens is what was asked for."""
    return many(200, {}, lambda n, i: game(n, i, teacher=24, start=180), seed)


def spiky_gradients(seed: int) -> Run:
    def draw(n: Noise, i: int) -> Metrics:
        spike = {"actor/grad_norm": n.around(400), "critic/grad_norm": n.around(900)}
        return game(n, i) | (spike if n.rng.random() < 0.06 else {})

    return many(300, {}, draw, seed)  # fmt: skip


def big_model_small_gradients(seed: int) -> Run:
    """Bias corrections of a big model: gradients of a few thousandths."""
    small = {"actor/grad_norm": 0.004, "critic/grad_norm": 0.02}
    return many(200, {}, lambda n, i: game(n, i) | {k: n.around(v, 0.4) for k, v in small.items()}, seed)


def sparse(seed: int) -> Run:
    """A logger that lost a third of its keys each step, and nulls."""

    def draw(n: Noise, i: int) -> Metrics:
        kept = {k: v for k, v in game(n, i).items() if n.rng.random() < 0.67}
        return kept | ({"perf/gpu_gb": math.nan, "val/rouge_l": math.nan} if i % 7 == 0 else {})

    return many(200, {}, draw, seed)  # fmt: skip


def bare_header(seed: int) -> Run:
    """A copied log whose header says nothing."""
    return {"type": "run", "start_step": 0}, many(120, {}, lambda n, i: game(n, i), seed)[1]


def critic_only_to_the_end(seed: int) -> Run:
    return many(40, {"stage": "warmup", "critic_warmup": 40},
                lambda n, i: game(n, i, actor=False), seed)  # fmt: skip


def tis_and_dapo(seed: int) -> Run:
    """Two epochs of token-level clipping with advantages that are not divided by their spread."""
    small = {"critic/advantages/max": 0.02, "critic/score_std": 0.006, "critic/advantages/min": -0.02}

    def draw(n: Noise, i: int) -> Metrics:
        return game(n, i, loss="original", gap=0.4) | {k: n.around(v) for k, v in small.items()}

    return many(200, {"loss_mode": "dapo", "critic_loss": "original"}, draw, seed)


def lora_without_kl(seed: int) -> Run:
    def draw(n: Noise, i: int) -> Metrics:
        return {k: v for k, v in game(n, i, on_policy=True).items() if k not in ("actor/kl_loss", "actor/entropy")}

    return many(160, {"ppo_epochs": 1}, draw, seed)  # fmt: skip


def near_identical_twins(seed: int) -> Run:
    """A good student at a low temperature: a third of the groups has no spread."""
    return many(200, {}, lambda n, i: game(n, i, acc=0.58, gap=0.06)
                | {"critic/zero_std_fraction": n.share(0.33, 16)}, seed)  # fmt: skip


def slow_kl(seed: int) -> Run:
    return many(600, {}, lambda n, i: game(n, i) | {"actor/kl_loss": n.around(0.002 + 0.001 * i, 0.15)}, seed)


def v1_at_its_margin(seed: int) -> Run:
    return many(200, {"critic_loss": "v1"}, lambda n, i: game(n, i, loss="v1", gap=1.05, acc=0.78), seed)


def thousand_steps(seed: int) -> Run:
    return many(1000, {}, lambda n, i: game(n, i, pairs=32), seed)


HEALTHY: dict[str, Draw] = {
    f.__name__: f for f in (
        seqkd_short, seqkd_already_good, seqkd_with_a_critics_keys,
        seqkd_that_watches_its_samples, first_steps, fresh_critic, paper, paper_warmup,
        eight_pairs, even_match, strong_critic_within_bounds, long_texts, short_answers, growing_to_the_teacher,
        shrinking_to_the_teacher, spiky_gradients, big_model_small_gradients, sparse, bare_header,
        critic_only_to_the_end, tis_and_dapo, lora_without_kl, near_identical_twins, slow_kl, v1_at_its_margin,
        thousand_steps,
    )
}  # fmt: skip
