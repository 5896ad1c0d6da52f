"""The configuration as a flat table of dotted keys: what each may hold, and two configs compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from gadcli.config.schema import GadConfig

# The only keys whose value may name an environment variable (`${oc.env:…}`): where things lie, nothing that is logged.
PATH_KEYS = ("actor.model.path", "critic.model.path", "data.train_files", "data.val_files", "trainer.output_dir")

# Keys that may change on resume without making another experiment of it.
NEUTRAL_SECTIONS = ("trainer.tensorboard.",)
NEUTRAL_KEYS = (
    "preset",
    "trainer.exp_name",
    "trainer.output_dir",
    "trainer.total_epochs",
    "trainer.total_steps",
    "trainer.max_time_s",
    "trainer.save_freq",
    "trainer.async_save",
    "trainer.keep_last",
    "trainer.keep_best",
    "trainer.nproc",
    "trainer.nnodes",
    "trainer.logger",
    "fsdp.timeout_s",
    "health.on_bad",
)
MAPPING = dict[str, Any]  # the kind of a key that holds entries of the user's own; settings of it are merged


@dataclass(frozen=True)
class Leaf:
    """One key of the schema; bounds are inclusive. `kind` is str, int, float, bool, list[str], list[Any] or MAPPING."""

    key: str
    kind: Any
    default: Any
    doc: str
    min: float | None
    max: float | None
    choices: tuple[str, ...] | None

    @property
    def kind_name(self) -> str:
        names: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        names |= {list[str]: "a list of texts", MAPPING: "{key: value, …}"}
        return names.get(self.kind, "a list of {key: value} entries")


def _walk(node: Any, prefix: str) -> dict[str, Leaf]:
    hints = typing.get_type_hints(type(node))
    leaves: dict[str, Leaf] = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            leaves |= _walk(value, f"{key}.")
            continue
        meta = field.metadata
        leaves[key] = Leaf(
            key, hints[field.name], value, meta["doc"], meta.get("min"), meta.get("max"), meta.get("choices")
        )
    return leaves


@cache
def schema_leaves() -> dict[str, Leaf]:
    """Every key of the schema, in its order."""
    return _walk(GadConfig(), "")


@cache
def schema_sections() -> frozenset[str]:
    """Every dotted prefix that is a section, not a value: `actor`, `actor.optim`, …"""
    sections = set()
    for key in schema_leaves():
        parts = key.split(".")
        sections |= {".".join(parts[:i]) for i in range(1, len(parts))}
    return frozenset(sections)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key: of a config, or of nested mappings such as a config file's (empty ones are values)."""
    values: dict[str, Any] = {}
    if isinstance(tree, Mapping):
        pairs = [(key, value, isinstance(value, Mapping) and bool(value)) for key, value in tree.items()]
    else:  # a mapping inside a config is one value
        fields = [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
        pairs = [(name, value, dataclasses.is_dataclass(value)) for name, value in fields]
    for name, value, is_section in pairs:
        values |= flatten(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return values


def differences(old: GadConfig, new: GadConfig) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) where two configs differ, in the schema's order."""
    old_values, new_values = flatten(old), flatten(new)
    return [(key, old_values[key], new_values[key]) for key in old_values if old_values[key] != new_values[key]]


def is_neutral(key: str) -> bool:
    """Whether a key may differ between a run and its resumption (length, saving, showing, placing)."""
    return key in NEUTRAL_KEYS or key.startswith(NEUTRAL_SECTIONS)


def config_hash(config: GadConfig) -> str:
    """Short sha256 over all keys but the neutral ones: equal hashes are the same experiment."""
    values = {key: value for key, value in flatten(config).items() if not is_neutral(key)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
