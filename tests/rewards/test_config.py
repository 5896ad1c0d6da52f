"""`rewards:` in a preset, in a file and on the command line: read, written beside the run, and read back the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gadcli.config.resolve import load_resolved, resolve
from gadcli.config.rewards import KINDS
from gadcli.config.tree import config_hash
from gadcli.errors import ConfigError

# The mixture of a tool-using fork, as published: clip(.8 D + .1 format + .1 schema, -2, 2).
MIXTURE = """
algorithm: {reward_clip: 2}
rewards:
  - {kind: discriminator, weight: .8}
  - {name: format, kind: regex, weight: 1e-1, pattern: '^<tool>.*</tool>$'}
  - {name: schema, kind: parses, weight: 0.1, language: json, extract: "<tool>(.*)</tool>"}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_a_mixture_in_a_file_is_read_with_its_numbers(tmp_path: Path) -> None:
    config = resolve("gad", config_file=write(tmp_path, MIXTURE)).config
    assert [entry["weight"] for entry in config.rewards] == [0.8, 0.1, 0.1]
    assert config.rewards[1]["pattern"] == "^<tool>.*</tool>$"
    assert config.algorithm.reward_clip == 2.0


def test_the_examples_of_the_page_are_accepted(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    config = resolve("gad", config_file=write(tmp_path, block)).config
    assert [entry["kind"] for entry in config.rewards] == ["discriminator", "regex", "json_schema"]
    assert all(f"`{kind}`" in page for kind in KINDS)


def test_what_is_written_beside_the_run_reads_back_the_same(tmp_path: Path) -> None:
    resolved = resolve("gad", config_file=write(tmp_path, MIXTURE))
    (tmp_path / "config.yaml").write_text(resolved.to_yaml())
    again = load_resolved(tmp_path / "config.yaml")
    assert again == resolved.config
    assert config_hash(again) == config_hash(resolved.config)


def test_another_weight_is_another_experiment(tmp_path: Path) -> None:
    path = write(tmp_path, MIXTURE)
    one = resolve("gad", config_file=path).config
    other = resolve("gad", config_file=path, overrides=["rewards.format.weight=0.3"]).config
    assert [entry["weight"] for entry in other.rewards] == [0.8, 0.3, 0.1]
    assert [entry["weight"] for entry in one.rewards] == [0.8, 0.1, 0.1]
    assert config_hash(one) != config_hash(other)


def test_a_whole_list_on_the_command_line() -> None:
    config = resolve("gad", overrides=["rewards=[{kind: discriminator}, {kind: length, high: 1.2}]"]).config
    assert config.rewards == [{"kind": "discriminator"}, {"kind": "length", "high": 1.2}]
    assert resolve("gad", overrides=["rewards=[]"]).config.rewards == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rewards: {kind: length}", "a section"),
        ("rewards: length", "not a list"),
        ("rewards: [length]", "a list of something else"),
        ("rewards: [{kind: length, low: [1]}]", "more than texts and numbers"),
        ("rewards: [{kind: length, low: '1'}]", "must be a number"),
        ("rewards: [{kind: length, kind: regex}]", "set twice"),
        ("rewards: [{kind: lenght}]", "must be one of"),
        ("rewards: [{kind: command, command: '${oc.env:HOME}/x'}]", "allowed in paths only"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("gad", config_file=write(tmp_path, text))
    assert message in caught.value.message
    assert "c.yaml:1" in caught.value.message


def test_an_override_of_a_reward_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no reward has that name"):
        resolve("gad", overrides=["rewards.format.weight=0.3"])
