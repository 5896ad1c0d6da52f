"""How close a student's text is to the teacher's, and what gives it away: pure functions over strings and lengths."""

from __future__ import annotations

import random
import re
import statistics
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Scripts written without spaces, one token a character: CJK ideographs (with extensions and the compatibility
# block), kana and bopomofo. Hangul is written with spaces and stays in words.
_SPACELESS = (
    "\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_TOKEN = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")


@dataclass(frozen=True)
class Sample:
    """One answer beside the teacher's. Lengths are in model tokens, EOS included; `finished` is ended by EOS.

    The text metrics need no prompt; a fresh discriminator does.
    """

    student: str
    teacher: str
    student_length: int
    teacher_length: int
    finished: bool = True
    prompt: str = ""


def tokens(text: str) -> list[str]:
    """Words of a text, for overlap measures: lower case, no punctuation, one a character in Chinese and Japanese.

    On ASCII this is the tokenizer of the `rouge-score` package without stemming.
    """
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel (Hyyrö 2004): one big-integer operation a token of `b`, so 200 x 500 tokens take well under a
    millisecond.
    """
    positions: dict[str, int] = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    every = (1 << len(a)) - 1
    row = every
    for token in b:
        matches = row & positions.get(token, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(a) - row.bit_count()


def rouge_l(hypothesis: str, reference: str) -> float:
    """ROUGE-L F1 in [0, 1] over `tokens` (Lin 2004, with precision and recall weighted alike).

    Texts without a single word (only punctuation, or empty) score 1 if they are the same and else 0.
    """
    hyp, ref = tokens(hypothesis), tokens(reference)
    if not hyp and not ref:
        return float(hypothesis.strip() == reference.strip())
    return 2.0 * lcs_length(hyp, ref) / (len(hyp) + len(ref))  # 2PR/(P+R) with P = L/|hyp|, R = L/|ref|


def exact_match(hypothesis: str, reference: str) -> float:
    """1 if the texts are the same but for outer white space, else 0."""
    return float(hypothesis.strip() == reference.strip())


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of the texts together, in [0, 1] (Li et al. 2016); 0 without any.

    It falls as the number of texts grows: compare only sets of equal size.
    """
    grams = [gram for text in texts for gram in _ngrams(tokens(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def length_ratio(student_lengths: Sequence[int], teacher_lengths: Sequence[int]) -> float:
    """Mean student length over mean teacher length (a ratio of means: short teacher rows do not dominate)."""
    return statistics.fmean(student_lengths) / max(statistics.fmean(teacher_lengths), 1e-9)


def length_auc(student_lengths: Sequence[int], teacher_lengths: Sequence[int]) -> float:
    """How well length alone tells student from teacher, in [.5, 1]: .5 means not at all, 1 a perfect one.

    The Mann-Whitney AUC P(student longer) + P(equal) / 2 over all pairs, folded at one half, since a
    discriminator profits from "too short" as much as from "too long". With few rows it is above .5 by chance
    alone: about .5 + .23 / sqrt(n) for n rows a side.
    """
    ordered = sorted(teacher_lengths)
    below = sum(bisect_left(ordered, length) for length in student_lengths)
    up_to = sum(bisect_right(ordered, length) for length in student_lengths)
    auc = (below + up_to) / (2.0 * len(student_lengths) * len(teacher_lengths))
    return max(auc, 1.0 - auc)


def summary(samples: Sequence[Sample], has_form: Callable[[str], bool] | None = None) -> dict[str, float]:
    """The text metrics of one evaluation, by their names in the log. Empty for no samples.

    val/rouge_l, val/exact_match, val/length_ratio, val/length_auc, val/distinct_1, val/distinct_2, val/finished
    (share ended by EOS), val/length_mean (tokens); with `has_form` also val/form, the share that passes it.
    """
    if not samples:
        return {}
    texts = [sample.student for sample in samples]
    student_lengths = [sample.student_length for sample in samples]
    teacher_lengths = [sample.teacher_length for sample in samples]
    values = {
        "val/rouge_l": statistics.fmean(rouge_l(sample.student, sample.teacher) for sample in samples),
        "val/exact_match": statistics.fmean(exact_match(sample.student, sample.teacher) for sample in samples),
        "val/length_ratio": length_ratio(student_lengths, teacher_lengths),
        "val/length_auc": length_auc(student_lengths, teacher_lengths),
        "val/distinct_1": distinct_n(texts, 1),
        "val/distinct_2": distinct_n(texts, 2),
        "val/finished": statistics.fmean(float(sample.finished) for sample in samples),
        "val/length_mean": statistics.fmean(student_lengths),
    }
    if has_form is not None:
        values["val/form"] = statistics.fmean(float(has_form(text)) for text in texts)
    return values


def bootstrap_interval(
    values: Sequence[float],
    clusters: Sequence[int] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    `clusters` names each value's prompt: several answers to one prompt are not independent, so whole prompts
    are drawn. To compare two models pass the per-row differences; 0 outside the interval is a difference.
    """
    groups: dict[int, list[float]] = {}
    for i, value in enumerate(values):
        groups.setdefault(i if clusters is None else clusters[i], []).append(value)
    totals = [(sum(group), len(group)) for group in groups.values()]
    rng = random.Random(seed)
    means = []
    for _ in range(draws):
        drawn = rng.choices(totals, k=len(totals))
        means.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    means.sort()
    tail = (1.0 - level) / 2.0
    return means[int(tail * (draws - 1))], means[int((1.0 - tail) * (draws - 1) + 0.5)]


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
