"""The learning benchmark's task of many good answers: the teacher itself answers a prompt differently each time.

A prompt names 5 to 8 of 32 words, each with a comma (which makes it another token than the word alone); the teacher
writes all of them without, nearly in the list's own order: each word's place is shaken by a normal number of its
row's own, so that two answers of the teacher to one prompt share some .72 of their order (ROUGE-L). An answer is in
form if it has the prompt's words, each once, in whatever order. The student is one layer of 64, which cannot hold the
whole rule: supervised text leaves it with a fifth to a quarter of answers that forget, repeat or invent a word. The
critic is another, larger model from nothing.
"""

from __future__ import annotations

import random
from pathlib import Path

import learning_nano
from learning_nano import NanoFiles, has_form

__all__ = ["LIMITS", "has_form", "settings", "write_data", "write_student"]

WORDS = learning_nano.WORDS[:32]
SHORTEST, LONGEST = 5, 8
SPREAD = 4.0  # standard deviation of a word's place in the list
HELD_OUT = {"val": 512, "test": 1024}
TRAIN_ROWS = 4096
NEVER = 1_000_000  # steps: the actor is not released in warm-up
LIMITS = (20, 12)  # tokens of a prompt and of an answer
WHOLE = learning_nano.WHOLE
GAME = ["data.train_batch_size=16", "rollout.n=8", "critic.loss=original", "critic.values=last", "critic.optim.lr=1e-3",
        "actor.optim.lr=1e-4", "algorithm.adv_estimator=grpo_floor", "algorithm.sigma_min=0.5"]  # fmt: skip


def settings(_: Path) -> dict[str, list[str]]:
    """Overrides for each stage; the critic starts from the student's own backbone, as by default."""
    return {
        "seqkd": [*WHOLE, "actor.optim.lr=2e-3", "data.train_batch_size=32"],
        "warmup": [*WHOLE, *GAME, f"trainer.critic_warmup={NEVER}"],
        "gad": [*WHOLE, *GAME],
        "eval": ["--engine=hf"],
    }


def words() -> list[str]:
    return [*(f"{word}," for word in WORDS), *WORDS]


def an_answer(chosen: list[str], rng: random.Random) -> str:
    """The words, nearly in the list's order."""
    return " ".join(sorted(chosen, key=lambda word: WORDS.index(word) + rng.gauss(0.0, SPREAD)))


def write_data(folder: Path, seed: int) -> NanoFiles:
    """Parquet files of distinct prompts: held-out rows alike for every seed, training rows the seed's own."""
    # The test rows were drawn anew after the search had ended: earlier ones had been seen beside a regime given up.
    names = {"val": "held out", "test": "rows for the table alone", "train": f"train {seed}"}
    sources = {name: random.Random(text) for name, text in names.items()}

    def a_row(rng: random.Random) -> tuple[str, str]:
        chosen = rng.sample(WORDS, rng.randint(SHORTEST, LONGEST))
        return f"order these: {', '.join(chosen)},", an_answer(chosen, rng)

    return learning_nano.write_rows(folder, {**HELD_OUT, "train": TRAIN_ROWS}, sources, a_row)


def write_student(folder: Path) -> Path:
    return learning_nano.write_model(folder, words(), layers=1, width=64, seed=0)
