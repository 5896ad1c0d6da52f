"""The evaluation report: intervals by prompt, paired differences, and an HTML page that carries everything itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from gadcli.evaluate.answers import AnswerSet, prompt_text
from gadcli.evaluate.html import html_report
from gadcli.evaluate.report import Report, d_acc, differences, model_report, render, short_names
from gadcli.evaluate.text import Sample

ATTACK = "<script>alert('x')</script> & <b>"


def answers(model: str, students: list[str], draws: int = 1) -> AnswerSet:
    """`draws` answers to each prompt, all equal to that prompt's entry; the teacher always says a b c d."""
    samples = [
        Sample(text, "a b c d", len(text.split()) + 1, 5, prompt=f"prompt {row}")
        for row, text in enumerate(students)
        for _ in range(draws)
    ]
    rows = [row for row in range(len(students)) for _ in range(draws)]
    return AnswerSet(model, 0.8, samples, rows, dropped=0, seconds=1.0)


def test_metrics_and_intervals_of_a_half_right_model() -> None:
    # Ten prompts, every other one right: ROUGE-L 1 or 0, exact match 1 or 0, both .5 in the mean.
    report = model_report(answers("m", ["a b c d", "x"] * 5, draws=3), fresh=False)
    assert (report.answers, report.prompts) == (30, 10)
    assert report.metrics["val/rouge_l"] == pytest.approx(0.5)
    assert report.metrics["val/exact_match"] == pytest.approx(0.5)
    low, high = report.intervals["val/rouge_l"]
    # Ten coins: standard error .158, so about .2 to .8; thirty independent ones would give .32 to .68.
    assert 0.1 <= low <= 0.3
    assert 0.7 <= high <= 0.9


def test_a_paired_difference_is_taken_prompt_by_prompt() -> None:
    # The second model is wrong on one prompt of four and otherwise the same: +1/4, never below 0 in any resample.
    one, two = answers("one", ["a b c d"] * 4, draws=2), answers("two", ["a b c d"] * 3 + ["x"])
    rouge, exact = differences(one, two)
    assert rouge.metric == "val/rouge_l"
    assert rouge.difference == pytest.approx(0.25)
    assert rouge.low == 0.0
    assert exact.difference == pytest.approx(0.25)


def test_the_fresh_discriminator_is_left_out_where_prompts_are_too_few() -> None:
    assert "val/fresh_accuracy" not in model_report(answers("m", ["x"] * 9), fresh=True).metrics
    assert model_report(answers("m", ["x y"] * 20), fresh=True).metrics["val/fresh_accuracy"] == 1.0


def test_a_given_discriminators_accuracy_counts_a_tie_one_half() -> None:
    # Teacher higher twice, lower once, equal once: (2 + 1/2) / 4.
    assert d_acc([(0.0, 1.0), (-3.0, -2.0), (1.0, 0.0), (0.5, 0.5)]) == 0.625


def test_plain_lines_name_what_was_left_out_and_what_differs() -> None:
    one, two = answers("runs/a/actor", ["a b c d"] * 6), answers("runs/b/actor", ["x"] * 6)
    report = Report(["f.parquet"], [model_report(one, fresh=False), model_report(two, fresh=False)])
    report.differences = differences(one, two)
    text = "\n".join(render(report))
    assert "a/actor  at temperature 0.8  (6 answers to 6 prompts)" in text
    assert "val/rouge_l +1.000 [+1.000, +1.000] higher" in text
    assert max(map(len, text.splitlines())) <= 80


def test_short_names_keep_what_tells_models_apart() -> None:
    assert short_names(["a/x/actor", "a/y/actor"]) == {"a/x/actor": "x/actor", "a/y/actor": "y/actor"}
    assert short_names(["models/one", "models/one"]) == {"models/one": "one"}


def test_the_html_page_escapes_text_and_loads_nothing() -> None:
    found = answers(ATTACK, [ATTACK] * 12)
    report = Report([ATTACK], [model_report(found, fresh=True)])
    page = html_report(report, [found])
    tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}

    Tags().feed(page)
    assert "script" not in tags
    assert "link" not in tags
    assert "&lt;script&gt;" in page
    assert "http" not in re.sub(r"https?://www\.w3\.org/\S+", "", page)
    assert "<svg" in page


def test_a_conversation_becomes_one_text() -> None:
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "be brief"}
    assert prompt_text([user]) == "hi"
    assert prompt_text([system, user]) == "hi"
    assert prompt_text([system]) == "be brief"
    assert (
        prompt_text([user, {"role": "assistant", "content": "yes?"}, user]) == "user: hi\n\nassistant: yes?\n\nuser: hi"
    )
