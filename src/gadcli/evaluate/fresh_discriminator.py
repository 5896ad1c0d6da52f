"""A discriminator that the student never trained against: how well can a newcomer tell its text from the teacher's?

The critic of a run has been fooled by this very student, so its accuracy says little about the text. This one is
small, made anew for each evaluation, the same for every model compared, and judged on prompts it has not seen.

Legend: B texts (students' and teachers'), F features.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch

from gadcli.evaluate.text import Sample

HASHED = 1 << 13
DENSE = 5  # bias, log length, share of words and of word pairs that stand in the prompt, ended by EOS
L2 = 1e-3
FOLDS = 5
MAX_PROMPTS = 2000
MIN_PROMPTS = 10
_PIECE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")


@dataclass(frozen=True)
class FreshResult:
    """Held-out figures; .5 is "cannot tell", 1 "always".

    accuracy: share of texts put on the right side, students' and teachers' weighing alike (the same text on both
    sides counts one half). accuracy_std: its spread over the folds. pair_accuracy: share of prompts' pairs in
    which the teacher's text scores higher (a tie counts one half), as the run's d_acc is defined.
    """

    accuracy: float
    accuracy_std: float
    pair_accuracy: float
    prompts: int
    folds: int

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def fresh_discriminator(samples: Sequence[Sample], seed: int = 0, folds: int = FOLDS) -> FreshResult:
    """Cross-validate a logistic regression that tells student text from teacher text.

    Features: hashed words, word pairs and the first and last words (punctuation and case kept), length, overlap
    with the prompt, and whether the text was ended; so form, wording, length and unfaithful copying can all give a
    student away. Folds are drawn by prompt: a prompt's answers are all in training or all held out. At most
    MAX_PROMPTS prompts are used (drawn by the seed). About 1 s for 250 prompts. Deterministic for a seed.

    Raises ValueError for fewer than MIN_PROMPTS prompts.
    """
    prompts = sorted({sample.prompt for sample in samples})
    if len(prompts) < MIN_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts are too few for a held-out accuracy: {MIN_PROMPTS} or more")
    random.Random(seed).shuffle(prompts)
    fold_of = {prompt: i % folds for i, prompt in enumerate(prompts[:MAX_PROMPTS])}
    used = sorted((s for s in samples if s.prompt in fold_of), key=lambda s: (s.prompt, s.student))  # order-free sums
    fold_B = torch.tensor([fold_of[sample.prompt] for sample in used])
    student_BF, teacher_BF = _features(used, teacher=False), _features(used, teacher=True)

    accuracies, pairs = [], []
    for fold in range(folds):
        out = fold_B == fold
        weight_F, scale_F = _fit(student_BF[~out], teacher_BF[~out])
        student = (student_BF[out] * scale_F) @ weight_F
        teacher = (teacher_BF[out] * scale_F) @ weight_F
        accuracies.append((_share_above(teacher) + _share_above(-student)) / 2)
        pairs += [_share_above(teacher - student)] * int(out.sum())
    spread = torch.tensor(accuracies, dtype=torch.float64)
    return FreshResult(
        accuracy=float(spread.mean()),
        accuracy_std=float(spread.std()),
        pair_accuracy=math.fsum(pairs) / len(pairs),
        prompts=len(fold_of),
        folds=folds,
    )


def _share_above(margin_B: torch.Tensor) -> float:
    """Share of positive margins; those within rounding of 0 count one half."""
    positive, tie = margin_B > 1e-6, margin_B.abs() <= 1e-6
    return float((positive.double() + tie.double() / 2).mean())


def _fit(student_BF: torch.Tensor, teacher_BF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [F] of an L2-regularised logistic regression (teacher positive), and the scale [F] of its inputs."""
    inputs_BF = torch.cat([teacher_BF, student_BF])
    scale_F = torch.ones(inputs_BF.shape[1])
    # The dense features differ in size; the hashed ones are unit vectors a text already.
    scale_F[-DENSE + 1 :] = 1.0 / inputs_BF[:, -DENSE + 1 :].std(0).clamp_min(1e-3)
    inputs_BF = inputs_BF * scale_F
    sign_B = torch.cat([torch.ones(len(teacher_BF)), -torch.ones(len(student_BF))])
    weight_F = torch.zeros(inputs_BF.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weight_F], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.softplus(-sign_B * (inputs_BF @ weight_F)).mean() + L2 / 2 * weight_F.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return weight_F.detach(), scale_F


def _features(samples: Sequence[Sample], teacher: bool) -> torch.Tensor:
    """Features [B, F] of one side's texts."""
    features_BF = torch.zeros(len(samples), HASHED + DENSE)
    for row, sample in zip(features_BF, samples, strict=True):
        text, length = (sample.teacher, sample.teacher_length) if teacher else (sample.student, sample.student_length)
        words, prompt = _PIECE.findall(text), _PIECE.findall(sample.prompt)
        slots = torch.tensor([_slot(feature) for feature in _hashed(words)])
        row.index_add_(0, slots, torch.ones(len(slots)))
        row[:HASHED] /= row[:HASHED].norm().clamp_min(1.0)
        row[HASHED:] = torch.tensor(
            [
                1.0,
                math.log1p(length),
                _share_in(words, prompt),
                _share_in(list(pairwise(words)), list(pairwise(prompt))),
                float(teacher or sample.finished),
            ]
        )
    return features_BF


def _hashed(words: list[str]) -> Iterator[str]:
    yield "<any>"
    yield from words
    yield from (f"{a} {b}" for a, b in pairwise(words))
    yield from (f"first{i} {word}" for i, word in enumerate(words[:3]))
    yield from (f"last{i} {word}" for i, word in enumerate(words[:-3:-1]))


def _slot(feature: str) -> int:
    return zlib.crc32(feature.encode()) % HASHED  # hash() differs between processes


def _share_in(items: Sequence[object], pool: Sequence[object]) -> float:
    known = set(pool)
    return sum(item in known for item in items) / len(items) if items else 0.0
