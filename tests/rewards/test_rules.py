"""Rewards that are rules: each on answers whose score can be read off by eye."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gadcli.config.rewards import RewardConfig, override, reward_specs
from gadcli.errors import ConfigError
from gadcli.rewards.answer import AnswerText
from gadcli.rewards.rules import length_band, rule


def answer(text: str, tokens: int = 10, teacher_tokens: int = 10) -> AnswerText:
    return AnswerText([{"role": "user", "content": "q"}], text, "t", tokens, teacher_tokens, True)


def scores(texts: list[str], **entry: str) -> list[float]:
    (spec,) = reward_specs([entry])
    return rule(spec)([answer(text) for text in texts])


def test_regex_finds_its_pattern_anywhere_and_across_lines() -> None:
    assert scores(["Answer: 4", "4", "x\nAnswer:\n12"], kind="regex", pattern=r"Answer:\s+\d+") == [1.0, 0.0, 1.0]


def test_json_parses_only_what_the_standard_allows() -> None:
    texts = ['{"a": 1}', "[1, 2", "NaN", '{"a": Infinity}', "", "  ", "[" * 100_000]
    assert scores(texts, kind="parses", language="json") == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_python_parses_and_nothing_of_it_runs(tmp_path: Path) -> None:
    target = tmp_path / "made"
    texts = ["def f(x):\n    return x", "def f(x) return x", f"open({str(target)!r}, 'w')", "(" * 5000, '"\\d"']
    assert scores(texts, kind="parses", language="python") == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert not target.exists()


def test_extract_reads_the_fenced_block_and_no_match_scores_0() -> None:
    fence = r"```(?:python)?\n(.*?)```"
    texts = ["Here:\n```python\nx = 1\n```\nDone.", "x = 1", "```\nx = = 1\n```"]
    assert scores(texts, kind="parses", language="python", extract=fence) == [1.0, 0.0, 0.0]


def test_a_json_schema_is_held_against_the_answer(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    schema = tmp_path / "s.json"
    schema.write_text(json.dumps({"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}))
    texts = ['{"name": "x"}', '{"name": 1}', "{}", "no json"]
    assert scores(texts, kind="json_schema", schema=str(schema)) == [1.0, 0.0, 0.0, 0.0]
    schema.write_text('{"type": "no such type"}')
    with pytest.raises(ConfigError, match="not a JSON schema"):
        scores([], kind="json_schema", schema=str(schema))
    with pytest.raises(ConfigError, match=r"missing\.json"):
        scores([], kind="json_schema", schema=str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (5, 1.0),  # half the teacher's 10
        (15, 1.0),  # one and a half times
        (20, 0.5),  # half a teacher's length above the band
        (25, 0.0),  # a whole one
        (60, 0.0),
        (0, 0.5),  # half a teacher's length below the band
    ],
)
def test_the_length_band_falls_by_one_over_one_length_of_the_teacher(tokens: int, expected: float) -> None:
    assert length_band(answer("x", tokens), 0.5, 1.5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "regexp", "pattern": "x"}, "kind is 'regexp'"),
        ({"pattern": "x"}, "kind is missing"),
        ({"kind": "regex"}, "needs pattern"),
        ({"kind": "regex", "pattern": "("}, "not a regular expression"),
        ({"kind": "regex", "pattern": "x", "timeout_s": 3}, "timeout_s does nothing for kind regex"),
        ({"kind": "regex", "pattern": "x", "patern": "y"}, "unknown key patern"),
        ({"kind": "parses"}, "needs language"),
        ({"kind": "parses", "language": "rust"}, "must be one of json, python"),
        ({"kind": "length", "low": 2, "high": 1}, "above high"),
        ({"kind": "length", "weight": "2"}, "must be a number"),
        ({"kind": "length", "weight": float("nan")}, "weight is nan"),
        ({"kind": "length", "name": "a b"}, "not allowed"),
    ],
)
def test_a_wrong_entry_is_named_with_its_place(entry: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reward_specs([{"kind": "discriminator"}, entry])
    assert message in caught.value.message
    assert "rewards[1]" in caught.value.message
    assert caught.value.hint


def test_names_are_unique_one_discriminator_and_some_weight() -> None:
    for entries, message in [
        ([{"kind": "length"}, {"kind": "length"}], "used twice"),
        ([{"kind": "discriminator"}, {"kind": "discriminator", "name": "d2"}], "listed twice"),
        ([{"kind": "length", "weight": 0}], "every weight is 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            reward_specs(entries)


def test_an_override_changes_the_entry_of_that_name_alone() -> None:
    entries = [{"kind": "discriminator"}, {"name": "fmt", "kind": "regex", "pattern": "x"}]
    changed = override(entries, "fmt", "weight", "0.25")
    assert reward_specs(changed)[1].weight == 0.25
    assert reward_specs(changed)[0].weight == reward_specs(entries)[1].weight == 1.0
    assert reward_specs(override(entries, "discriminator", "weight", "2"))[0].weight == 2.0
    with pytest.raises(ConfigError, match="no reward has that name"):
        override(entries, "fmtt", "weight", "1")
    with pytest.raises(ConfigError, match="must be a number"):
        reward_specs(override(entries, "fmt", "weight", "much"))


def test_defaults_are_the_schemas() -> None:
    (spec,) = reward_specs([{"kind": "discriminator"}])
    assert spec == RewardConfig(name="discriminator", kind="discriminator", weight=1.0, scale="none")
