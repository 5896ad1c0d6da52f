"""The arms of an arena: which stage each one runs, with which settings, and the measures that judge their answers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from gadcli.config.reading import read_override
from gadcli.config.rewards import KINDS, RewardConfig, reward_specs
from gadcli.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")
START = "seqkd"  # the start itself: supervised to its best held-out point


@dataclass(frozen=True)
class Arm:
    """One method. `stage` is empty for the start itself; `own_critic` where a setting of the critic asks for a warmup
    of its own."""

    name: str
    stage: str
    overrides: tuple[str, ...] = ()

    @property
    def needs_critic(self) -> bool:
        return self.stage == "gad"

    @property
    def own_critic(self) -> tuple[str, ...]:
        """The settings that the warmup of this arm's critic has to share."""
        return tuple(word for word in self.overrides if read_override(word).key.startswith("critic."))

    @property
    def warmup(self) -> str:
        """The folder of the warmup that this arm's critic comes from."""
        return f"warmup-{self.name}" if self.own_critic else "warmup"


STANDARD = {
    arm.name: arm
    for arm in (
        Arm(START, ""),
        Arm("seqkd+", "seqkd"),
        Arm("best-of-n", "gad", ("actor.objective=best_of_n",)),
        Arm("soda", "seqkd", ("actor.objective=soda",)),
        Arm("gad", "gad"),
    )
}


def parse_arms(names: str, more: Sequence[str]) -> list[Arm]:
    """Standard arms by name (comma-separated) and the user's own, `NAME:KEY=VALUE KEY=VALUE …`.

    A user's arm is the gad stage with those settings, or seqkd where actor.objective is sft or soda. The start is
    always among them, first. Raises ConfigError.
    """
    arms = [STANDARD[START]]
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in STANDARD:
            raise ConfigError(
                f"no arm named {name}", f"arms: {', '.join(STANDARD)}; your own: --arm 'NAME:KEY=VALUE …'"
            )
        arms += [STANDARD[name]] if name != START else []
    for text in more:
        name, colon, settings = text.partition(":")
        words = tuple(shlex.split(settings))
        if not colon or not words or not NAME.fullmatch(name):
            raise ConfigError(f"--arm {text!r}: not NAME:KEY=VALUE", "--arm 'hot:rollout.temperature=1.2'")
        values = {setting.key: setting.value for setting in map(read_override, words)}
        supervised = values.get("actor.objective") in ("sft", "soda")
        arms.append(Arm(name, "seqkd" if supervised else "gad", words))
    if repeated := {arm.name for arm in arms if sum(other.name == arm.name for other in arms) > 1}:
        raise ConfigError(f"arm {sorted(repeated)[0]} is there twice", "each arm has a name of its own")
    if len(arms) < 2:
        raise ConfigError("an arena compares arms, and there is none but the start", "--arms seqkd+,gad")
    return arms


def parse_measure(text: str) -> RewardConfig:
    """An entry like those of `rewards:`, as `{kind: …, …}` or short: `[NAME=]KIND:TEXT`, python:score.py:fn."""
    if text.startswith("{"):
        try:
            entry = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--measure {text!r}: not YAML", "--measure '{kind: parses, language: python}'"
            ) from error
        return reward_specs([entry], "--measure")[0]
    given, equals, rest = text.partition("=")
    name, spec = (given, rest) if equals and NAME.fullmatch(given) else ("", text)
    kind, _, value = spec.partition(":")
    needed = [key for key, must in KINDS.get(kind, {}).items() if must]
    if kind not in KINDS or kind == "discriminator" or len(needed) != bool(value):
        kinds = ", ".join(kind for kind in KINDS if kind != "discriminator")
        raise ConfigError(f"--measure {text!r}: not KIND:TEXT of the kinds {kinds}", "--measure parses:python")
    entry = {"kind": kind, **({"name": name} if name else {}), **dict.fromkeys(needed, value)}
    return reward_specs([entry], "--measure")[0]
