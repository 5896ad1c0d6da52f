"""Which arms there are, which stage and settings each means, and the measures of the command line."""

from __future__ import annotations

import pytest

from gadcli.arena.arms import parse_arms, parse_measure
from gadcli.arena.run import merged
from gadcli.cli.demo import SETTING, numbers
from gadcli.errors import ConfigError


def test_the_start_is_always_an_arm_and_first() -> None:
    arms = parse_arms("gad,soda,best-of-n,seqkd+", [])
    assert [arm.name for arm in arms] == ["seqkd", "gad", "soda", "best-of-n", "seqkd+"]
    assert [(arm.stage, arm.needs_critic) for arm in arms] == [
        ("", False), ("gad", True), ("seqkd", False), ("gad", True), ("seqkd", False)]  # fmt: skip


def test_an_arm_of_the_users_is_the_gad_stage_with_settings_unless_it_is_supervised() -> None:
    _, hot, soda, final = parse_arms(
        "", ["hot:rollout.temperature=1.2 actor.optim.lr=1e-5", "strong:actor.objective=soda actor.soda.beta=1",
             "final:critic.loss=final"])  # fmt: skip
    assert hot.stage == "gad" and hot.overrides == ("rollout.temperature=1.2", "actor.optim.lr=1e-5")
    assert soda.stage == "seqkd" and not soda.needs_critic
    assert hot.warmup == "warmup" and final.warmup == "warmup-final"  # a critic of another loss warms up by itself
    assert final.own_critic == ("critic.loss=final",)


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        ("gda", [], "no arm named gda"),
        ("seqkd", [], "none but the start"),
        ("gad,gad", [], "gad is there twice"),
        ("gad", ["gad:rollout.n=4"], "gad is there twice"),
        ("", ["hot"], "not NAME:KEY=VALUE"),
        ("", ["a/b:rollout.n=4"], "not NAME:KEY=VALUE"),
        ("", ["hot:rollout.temprature=1"], "unknown key"),
    ],
)
def test_arms_that_cannot_be_are_refused(names: str, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arms(names, more)


def test_measures_are_rewards_in_short() -> None:
    assert (parse_measure("parses:python").name, parse_measure("parses:python").language) == ("parses", "python")
    own = parse_measure("good=python:score.py:fn")
    assert (own.name, own.kind, own.function) == ("good", "python", "score.py:fn")
    assert parse_measure("command:wc -c | cut -d= -f1").command == "wc -c | cut -d= -f1"
    assert parse_measure("{kind: regex, name: ends, pattern: '=$'}").pattern == "=$"
    for text in ("parses", "discriminator:", "length:3", "beauty:x", "{kind: [}"):
        with pytest.raises(ConfigError):
            parse_measure(text)


def test_a_later_layer_of_settings_wins_and_each_key_stands_once() -> None:
    assert merged(["rollout.n=4", "actor.optim.lr=1"], ["rollout.n=8"]) == ["rollout.n=8", "actor.optim.lr=1"]


def test_words_of_the_command_line_are_settings_or_files() -> None:
    assert SETTING.match("rollout.n=4") and SETTING.match("rewards.format.weight=1")
    assert not SETTING.match("data/a=b.parquet") and not SETTING.match("train.parquet")
    assert numbers("0,0.4,1", float, "--temperatures") == (0.0, 0.4, 1.0)
    for text in ("", "1,1", "-1", "a"):
        with pytest.raises(ConfigError):
            numbers(text, int, "--seeds")
