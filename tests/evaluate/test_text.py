"""Text metrics against values derived by hand, and ROUGE-L against the rouge-score package."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from gadcli.evaluate import text
from gadcli.evaluate.text import Sample

CLOSE = 1e-12


def test_tokens_are_words_in_english_and_characters_in_chinese() -> None:
    assert text.tokens("Don't use_it: GPT-4!") == ["don", "t", "use", "it", "gpt", "4"]
    assert text.tokens("用Python3写代码。") == ["用", "python3", "写", "代", "码"]
    assert text.tokens("ＡＢＣ　ひらがな") == ["abc", "ひ", "ら", "が", "な"]  # full-width Latin is Latin
    assert text.tokens("한국어 문장") == ["한국어", "문장"]  # Hangul has spaces


def test_rouge_l_of_a_hand_worked_pair() -> None:
    # LCS(the cat sat on the mat; the cat lay on a mat) = the cat on mat = 4; P = 4/6, R = 4/6, F1 = 2/3.
    assert text.rouge_l("the cat sat on the mat", "The cat lay on a mat.") == pytest.approx(2 / 3, abs=CLOSE)
    # LCS(a b c; c b a d) = 1; P = 1/3, R = 1/4, F1 = 2/7: order matters.
    assert text.rouge_l("a b c", "c b a d") == pytest.approx(2 / 7, abs=CLOSE)


def test_rouge_l_of_chinese_counts_characters() -> None:
    # 我喜欢猫 / 我不喜欢狗: LCS 我喜欢 = 3; P = 3/4, R = 3/5, F1 = 6/9.
    assert text.rouge_l("我喜欢猫", "我不喜欢狗") == pytest.approx(6 / 9, abs=CLOSE)


def test_rouge_l_at_its_ends() -> None:
    assert text.rouge_l("same words here", "Same words, here!") == 1.0
    assert text.rouge_l("", "something") == 0.0
    assert text.rouge_l("", "") == 1.0
    assert text.rouge_l("...", "!!!") == 0.0


def test_lcs_equals_the_textbook_table_on_random_sequences() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a = [rng.choice("abcde") for _ in range(rng.randrange(0, 90))]
        b = [rng.choice("abcde") for _ in range(rng.randrange(0, 90))]
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert text.lcs_length(a, b) == table[-1][-1]


def test_rouge_l_of_200_by_500_tokens_takes_less_than_5_milliseconds() -> None:
    rng = random.Random(0)
    a = " ".join(str(rng.randrange(50)) for _ in range(200))
    b = " ".join(str(rng.randrange(50)) for _ in range(500))
    best = min(_seconds(a, b) for _ in range(5))  # the best of five: the machine may be busy
    assert best < 5e-3  # the quadratic table in Python takes 20 ms or more


def _seconds(a: str, b: str) -> float:
    start = time.perf_counter()
    text.rouge_l(a, b)
    return time.perf_counter() - start


def _without_order(a: str, b: str) -> float:
    """A wrong ROUGE-L: words shared in any order."""
    hyp, ref = text.tokens(a), text.tokens(b)
    return 2 * sum(min(hyp.count(word), ref.count(word)) for word in set(hyp)) / (len(hyp) + len(ref))


def _keeps_case(a: str, b: str) -> float:
    """A wrong ROUGE-L: words split at white space, as they stand."""
    hyp, ref = a.split(), b.split()
    return 2 * text.lcs_length(hyp, ref) / (len(hyp) + len(ref))


@pytest.mark.parametrize(
    ("measure", "agrees"),
    [(text.rouge_l, True), (_without_order, False), (_keeps_case, False)],
    ids=["ours", "mutant without order", "mutant with case"],
)
def test_rouge_l_equals_the_rouge_score_package_on_english(measure: Callable[[str, str], float], agrees: bool) -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="pip install rouge-score")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    rng = random.Random(1)
    words = ["the", "a", "cat's", "dog_food", "runs,", "runs.", "UPPER", "x-ray", "3.14", "(and)", "or;", '"quoted"']
    worst = 0.0
    for _ in range(200):
        a, b = (" ".join(rng.choices(words, k=rng.randrange(1, 40))) for _ in range(2))
        worst = max(worst, abs(measure(a, b) - scorer.score(b, a)["rougeL"].fmeasure))
    assert (worst <= CLOSE) is agrees


def test_exact_match_forgives_outer_white_space_only() -> None:
    assert text.exact_match(" Yes.\n", "Yes.") == 1.0
    assert text.exact_match("yes.", "Yes.") == 0.0


def test_distinct_n_counts_over_all_texts_together() -> None:
    # a b a | a b: unigrams a b a a b -> 2 of 5; bigrams ab ba ab -> 2 of 3; no trigram but aba -> 1 of 1.
    texts = ["a b a", "a b"]
    assert text.distinct_n(texts, 1) == pytest.approx(2 / 5, abs=CLOSE)
    assert text.distinct_n(texts, 2) == pytest.approx(2 / 3, abs=CLOSE)
    assert text.distinct_n(texts, 3) == 1.0
    assert text.distinct_n(["a"], 2) == 0.0


def test_length_auc_of_hand_counted_pairs() -> None:
    # student 1 3 3, teacher 2 3: pairs won 1>2 no, 1>3 no; 3>2 yes, 3=3 half (twice) -> (1 + .5) * 2 = 3 of 6.
    assert text.length_auc([1, 3, 3], [2, 3]) == pytest.approx(0.5, abs=CLOSE)
    # student 5 6, teacher 1 6: 5>1, 5<6, 6>1, 6=6 -> 2.5 of 4.
    assert text.length_auc([5, 6], [1, 6]) == pytest.approx(0.625, abs=CLOSE)


def test_length_auc_flags_too_short_as_much_as_too_long() -> None:
    assert text.length_auc([1, 2], [3, 4]) == 1.0
    assert text.length_auc([3, 4], [1, 2]) == 1.0
    assert text.length_auc([7] * 5, [7] * 9) == 0.5


def test_summary_of_two_samples() -> None:
    samples = [
        Sample("a b", "a b", student_length=3, teacher_length=3),
        Sample("a b", "c d e f", student_length=3, teacher_length=9, finished=False),
    ]
    values = text.summary(samples, has_form=lambda answer: answer == "a b")
    assert values["val/rouge_l"] == 0.5  # 1 and 0
    assert values["val/exact_match"] == 0.5
    assert values["val/length_ratio"] == pytest.approx(0.5, abs=CLOSE)  # mean 3 over mean 6; mean of ratios is 2/3
    assert values["val/length_auc"] == pytest.approx(0.75, abs=CLOSE)  # 3 against 3, 9: two ties, two lost -> .25
    assert values["val/distinct_1"] == 0.5  # a b a b
    assert values["val/finished"] == 0.5
    assert values["val/length_mean"] == 3.0
    assert values["val/form"] == 1.0
    assert text.summary([]) == {}


def test_bootstrap_interval_is_about_two_standard_errors_wide() -> None:
    # 400 fair coins: standard error .5 / 20 = .025, so the 95 % interval is .5 -+ .049.
    low, high = text.bootstrap_interval([0.0, 1.0] * 200)
    assert low == pytest.approx(0.451, abs=0.008)
    assert high == pytest.approx(0.549, abs=0.008)


def test_bootstrap_by_prompt_is_wider_when_answers_to_a_prompt_agree() -> None:
    # 40 prompts of 10 equal answers carry 40 facts, not 400: the interval grows by sqrt(10).
    values = [float(prompt % 2) for prompt in range(40) for _ in range(10)]
    clusters = [prompt for prompt in range(40) for _ in range(10)]
    low, high = text.bootstrap_interval(values, clusters)
    naive_low, naive_high = text.bootstrap_interval(values)
    assert (high - low) / (naive_high - naive_low) == pytest.approx(10**0.5, rel=0.15)


def test_bootstrap_of_one_value_is_that_value() -> None:
    assert text.bootstrap_interval([0.3]) == (0.3, 0.3)
