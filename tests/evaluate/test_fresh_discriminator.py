"""The fresh discriminator finds what gives a student away, on prompts it has not seen, and nothing else."""

from __future__ import annotations

import random
import time

import pytest

from gadcli.evaluate.fresh_discriminator import fresh_discriminator
from gadcli.evaluate.text import Sample

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]


def sample(prompt: str, student: str, teacher: str) -> Sample:
    return Sample(student, teacher, len(student.split()), len(teacher.split()), prompt=prompt)


def sentence(rng: random.Random, words: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def test_the_same_text_on_both_sides_is_exactly_one_half() -> None:
    rng = random.Random(0)
    result = fresh_discriminator([sample(sentence(rng), text := sentence(rng), text) for _ in range(60)])
    assert result.accuracy == 0.5
    assert result.pair_accuracy == 0.5
    assert result.prompts == 60


def test_text_of_one_distribution_stays_near_one_half_on_held_out_prompts() -> None:
    # 200 texts a side, random words: the standard error of an accuracy of .5 is .5 / sqrt(400) = .025. On its own
    # training rows the same regression separates them perfectly (8,000 weights), so this fails without folds.
    rng = random.Random(1)
    result = fresh_discriminator([sample(sentence(rng), sentence(rng), sentence(rng)) for _ in range(200)])
    assert result.accuracy == pytest.approx(0.5, abs=0.1)


def test_an_opening_phrase_gives_the_student_away() -> None:
    rng = random.Random(2)
    rows = [sample(sentence(rng), "Sure! " + sentence(rng), "Does: " + sentence(rng)) for _ in range(60)]
    result = fresh_discriminator(rows)
    assert result.accuracy > 0.98
    assert result.pair_accuracy > 0.98


def test_length_alone_gives_the_student_away() -> None:
    rng = random.Random(3)
    rows = [sample(sentence(rng), sentence(rng, 6), sentence(rng, 24)) for _ in range(80)]
    assert fresh_discriminator(rows).accuracy > 0.95


def test_unfaithful_copying_gives_the_student_away() -> None:
    rng = random.Random(4)
    rows = [sample(prompt := sentence(rng), sentence(rng), prompt) for _ in range(80)]
    assert fresh_discriminator(rows).accuracy > 0.95


def test_half_the_answers_given_away_is_about_three_quarters() -> None:
    # Half the students open with "Sure!": those are certain; of the rest a student cannot be told from a teacher,
    # and calling all of them "teacher" is right for every teacher: accuracy (1/2 + 1) / 2 = .75.
    rng = random.Random(5)
    rows = []
    for i in range(200):
        text = sentence(rng)
        rows.append(sample(sentence(rng), ("Sure! " if i % 2 else "") + text, text))
    assert fresh_discriminator(rows).accuracy == pytest.approx(0.75, abs=0.06)


def test_a_seed_gives_the_same_figures_whatever_the_order_of_rows() -> None:
    rng = random.Random(6)
    rows = [sample(sentence(rng), sentence(rng, rng.randint(5, 12)), sentence(rng)) for _ in range(60)]
    once, twice = fresh_discriminator(rows, seed=3), fresh_discriminator(rows[::-1], seed=3)
    assert once.accuracy == pytest.approx(twice.accuracy, abs=1e-9)
    assert once.accuracy != fresh_discriminator(rows, seed=4).accuracy


def test_250_prompts_take_seconds() -> None:
    rng = random.Random(7)
    rows = [sample(sentence(rng, 30), sentence(rng, 25), sentence(rng, 25)) for _ in range(250)]
    start = time.process_time()
    fresh_discriminator(rows)
    assert time.process_time() - start < 15.0


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        fresh_discriminator([sample("p", "a", "b")] * 50)
