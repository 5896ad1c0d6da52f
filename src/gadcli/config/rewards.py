"""The `rewards:` list: what each kind of reward may hold, read and checked before anything is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gadcli.config.schema import opt
from gadcli.errors import ConfigError

# What each kind needs (True) and may hold besides name, kind, weight and scale.
KINDS: dict[str, dict[str, bool]] = {
    "discriminator": {},
    "python": {"function": True, "timeout_s": False},
    "command": {"command": True, "timeout_s": False},
    "regex": {"pattern": True},
    "json_schema": {"schema": True, "extract": False},
    "parses": {"language": True, "extract": False},
    "length": {"low": False, "high": False},
    "judge": {"endpoint": True, "model": True, "timeout_s": False},
}
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*\Z")


@dataclass
class RewardConfig:
    """One entry of `rewards:`."""

    name: str = opt("", "letters, digits, - and _; reward/NAME/mean is logged")
    kind: str = opt("", "what computes it", choices=tuple(KINDS))
    weight: float = opt(1.0, "factor in the sum; negative for a penalty", min=-1000, max=1000)
    scale: str = opt("none", "divide by the spread within a prompt's group (group), or not", choices=("none", "group"))
    function: str = opt("", "python: module:function or file.py:function, called with (prompts, answers, rows)")
    command: str = opt("", "command: shell command; one JSON row per line in, one number per line out")
    timeout_s: float = opt(60.0, "python, command: seconds per batch; judge: per request", min=0.1)
    pattern: str = opt("", "regex: 1 where the answer matches somewhere, else 0")
    schema: str = opt("", "json_schema: file that holds the JSON schema")
    language: str = opt("", "parses: 1 where the answer is valid", choices=("", "json", "python"))
    endpoint: str = opt("", "judge: address of an OpenAI-compatible API, such as https://host/v1")
    model: str = opt("", "judge: model that grades; its key is read from GAD_JUDGE_API_KEY")
    extract: str = opt("", "regex whose first group (or whole match) is read instead of the answer; no match scores 0")
    low: float = opt(0.5, "length: shortest full score, as a multiple of the teacher's tokens", min=0)
    high: float = opt(1.5, "length: longest full score, likewise", min=0)


FIELDS = {field.name: field for field in dataclasses.fields(RewardConfig)}


def reward_specs(entries: Iterable[Mapping[str, Any]], origin: str = "rewards") -> list[RewardConfig]:
    """The entries of `rewards:`, checked. ConfigError names the entry, what is wrong and what is allowed."""
    specs = [_spec(entry, f"{origin}[{number}]") for number, entry in enumerate(entries)]
    names = [spec.name for spec in specs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{origin}: the name {repeated[0]} is used twice", "each reward has a name of its own")
    if sum(spec.kind == "discriminator" for spec in specs) > 1:
        raise ConfigError(f"{origin}: the discriminator is listed twice", "keep one entry, and set its weight")
    if specs and not any(spec.weight for spec in specs):
        raise ConfigError(f"{origin}: every weight is 0, so nothing would be learned", "give one of them a weight")
    return specs


def _spec(entry: Mapping[str, Any], origin: str) -> RewardConfig:
    if unknown := [key for key in entry if key not in FIELDS]:
        raise ConfigError(f"{origin}: unknown key {unknown[0]}", f"a reward has {', '.join(FIELDS)}")
    spec = RewardConfig(**{key: _typed(key, value, origin) for key, value in entry.items()})
    if spec.kind not in KINDS:
        raise ConfigError(f"{origin}: kind is {spec.kind or 'missing'}", f"kind is one of {', '.join(KINDS)}")
    spec.name = spec.name or spec.kind
    if not NAME.match(spec.name):
        raise ConfigError(f"{origin}: the name {spec.name!r} is not allowed", FIELDS["name"].metadata["doc"])
    allowed = KINDS[spec.kind]
    if extra := [key for key in entry if key not in ("name", "kind", "weight", "scale", *allowed)]:
        raise ConfigError(
            f"{origin} ({spec.name}): {extra[0]} does nothing for kind {spec.kind}",
            f"{spec.kind} takes {', '.join(allowed) or 'name, weight and scale only'}",
        )
    if missing := [key for key, needed in allowed.items() if needed and not getattr(spec, key)]:
        raise ConfigError(
            f"{origin} ({spec.name}): kind {spec.kind} needs {missing[0]}", FIELDS[missing[0]].metadata["doc"]
        )
    _check_texts(spec, origin)
    return spec


def _typed(key: str, value: Any, origin: str) -> Any:
    """A value in its field's type, within its bounds and choices."""
    field, meta = FIELDS[key], FIELDS[key].metadata
    wanted: type = {"str": str, "float": float}[str(field.type)]
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted):
        kind = "a number" if wanted is float else "text"
        raise ConfigError(f"{origin}: {key} is {value!r}, but must be {kind}", meta["doc"])
    if meta["choices"] and value not in meta["choices"]:
        choices = ", ".join(choice for choice in meta["choices"] if choice)
        raise ConfigError(f"{origin}: {key} is {value!r}, but must be one of {choices}", meta["doc"])
    low, high = meta["min"], meta["max"]
    if wanted is float and not ((low is None or value >= low) and (high is None or value <= high)):
        bounds = " and ".join([f"at least {low:g}"] * (low is not None) + [f"at most {high:g}"] * (high is not None))
        raise ConfigError(f"{origin}: {key} is {value:g}, but must be {bounds or 'finite'}", meta["doc"])
    return value


def _check_texts(spec: RewardConfig, origin: str) -> None:
    """Regular expressions compile; a length band is not empty."""
    for key in ("pattern", "extract"):
        try:
            re.compile(getattr(spec, key))
        except re.error as error:
            raise ConfigError(
                f"{origin} ({spec.name}): {key} is not a regular expression: {error}", "Python's `re` syntax"
            ) from error
    if spec.low > spec.high:
        raise ConfigError(
            f"{origin} ({spec.name}): low is {spec.low:g}, above high ({spec.high:g})", "low=0.5 high=1.5"
        )


def override(entries: list[dict[str, Any]], name: str, key: str, value: str) -> list[dict[str, Any]]:
    """`rewards.NAME.KEY=VALUE` applied to the list. ConfigError where no entry has that name."""
    names = [entry.get("name") or entry.get("kind") for entry in entries]
    if name not in names:
        known = f"rewards are named {', '.join(map(str, names))}" if names else "no rewards are configured"
        raise ConfigError(f"rewards.{name}.{key}: no reward has that name", known)
    if key not in FIELDS:
        raise ConfigError(f"rewards.{name}.{key}: unknown key {key}", f"a reward has {', '.join(FIELDS)}")
    given: Any = value
    if str(FIELDS[key].type) == "float":
        with contextlib.suppress(ValueError):  # refused with the others
            given = float(value)
    at = names.index(name)
    return [*entries[:at], {**entries[at], key: given}, *entries[at + 1 :]]
