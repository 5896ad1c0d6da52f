"""YAML files and KEY=VALUE words to typed values by dotted key, each with the place it came from."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gadcli.config.rewards import reward_specs
from gadcli.config.tree import MAPPING, PATH_KEYS, Leaf, schema_leaves, schema_sections
from gadcli.config.verl_names import RENAMED, instead_of, renamed
from gadcli.errors import ConfigError

COMMAND_LINE = "command line"

INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*\Z")
FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\Z")
ENV = re.compile(r"\$\{oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)\s*(?:,[^${}]*)?\}")
# One item of a list: quoted whole (commas inside are text), or up to the next comma.
ITEM = re.compile(r"""\s*('[^']*'|"[^"]*"|[^,]*?)\s*(?:,|\Z)""")
NULLS = ("null", "~", "Null", "NULL", "None")
BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    """A value for a key and where it was written: `file:line` or `command line`."""

    key: str
    value: Any
    origin: str


def canonical_key(key: str) -> str:
    """A key in our spelling: hydra's leading `+` (add) or `++` (add or change) says no more than the key alone."""
    return renamed(key.lstrip("+"))


def is_section(key: str) -> bool:
    """Whether keys may stand below this one, in our spelling or in verl's."""
    dotted = f"{key}."
    return canonical_key(dotted).rstrip(".") in schema_sections() or any(name.startswith(dotted) for name in RENAMED)


def nearest_key(key: str) -> str | None:
    """The valid key most like a misspelt one: by the whole of it, or by its last word in another section."""
    keys = [*schema_leaves(), *schema_sections()]
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if close:
        return close[0]
    last = key.rpartition(".")[2]
    by_last = {known.rpartition(".")[2]: known for known in reversed(keys)}
    close = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.75)
    return by_last[close[0]] if close else None


def leaf_for(key: str, origin: str) -> Leaf:
    """The schema's leaf of a key; ConfigError names the nearest valid one."""
    known = canonical_key(key)
    leaf = schema_leaves().get(known)
    if leaf is not None:
        return leaf
    if known in schema_sections():
        inside = ", ".join(k for k in schema_leaves() if k.startswith(f"{known}."))
        raise ConfigError(f"{origin}: {key} is a section, not a value", f"set one of {_cut(inside)}")
    hint = instead_of(key)
    if hint is None:
        near = nearest_key(known)
        hint = f"did you mean {near}?" if near else "gad preset show lists every key"
    raise ConfigError(f"{origin}: unknown key {key}", hint)


def _cut(text: str, width: int = 160) -> str:
    return text if len(text) <= width else f"{text[:width]} …"


def _mistyped(leaf: Leaf, shown: str, origin: str, hint: str | None = None) -> ConfigError:
    return ConfigError(
        f"{origin}: {leaf.key} is {_cut(shown)}, but must be {leaf.kind_name}", hint or f"{leaf.key}: {leaf.doc}"
    )


def convert_scalar(leaf: Leaf, text: str, quoted: bool, origin: str) -> Any:
    """One scalar as written. YAML 1.1 guesses (`1:30`, 1e-6 as text) are not used: the schema says the type.

    A whole number may be written as 2.0 or 2e0, and a truth value in any of YAML's and hydra's spellings.
    """
    if leaf.kind is str:
        if not quoted and text in NULLS:
            raise _mistyped(leaf, "null", origin, "write '' for empty text")
        return text
    if quoted:
        raise _mistyped(leaf, f'the text "{text}"', origin, f"write {text} without quotes")
    text = text.strip()
    if leaf.kind is bool and text.lower() in BOOLS:
        return BOOLS[text.lower()]
    if leaf.kind is int and INT.match(text):
        return int(text.replace("_", ""))
    if leaf.kind in (int, float) and (INT.match(text) or FLOAT.match(text)):
        number = float(text.replace("_", ""))
        if leaf.kind is float:
            return number
        if number.is_integer():
            return int(number)
    raise _mistyped(leaf, text or "empty", origin)


def split_items(text: str) -> list[str] | None:
    """The texts of `a, 'b,c', "d"`: quotes taken off, a comma at the end allowed. None where a quote or an item is
    missing."""
    items = []
    at, text = 0, text.strip()
    while at < len(text):
        match = ITEM.match(text, at)
        assert match is not None  # each part of ITEM may be empty
        item, at = match[1], match.end()
        unquoted, quoted = _unquote(item)
        if not item or (not quoted and item[0] in "'\""):
            return None
        items.append(unquoted)
    return items


def check_value(leaf: Leaf, value: Any, origin: str) -> None:
    """Bounds, choices and interpolations of one value; ConfigError says which was broken."""
    hint = f"{leaf.key}: {leaf.doc}"
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{origin}: {leaf.key} is {value}, but must be finite", hint)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if leaf.min is not None and value < leaf.min:
            raise ConfigError(f"{origin}: {leaf.key} is {value:g}, but must be at least {leaf.min:g}", hint)
        if leaf.max is not None and value > leaf.max:
            raise ConfigError(f"{origin}: {leaf.key} is {value:g}, but must be at most {leaf.max:g}", hint)
    if leaf.choices and value not in leaf.choices:
        # A choice of another key (gspo is a policy loss, not an advantage) is likelier meant than one spelt like it.
        elsewhere = [other.key for other in schema_leaves().values() if value in (other.choices or ())]
        close = difflib.get_close_matches(str(value), leaf.choices, n=1)
        near = f"{elsewhere[0]}={value}" if elsewhere else f"{leaf.key}={close[0]}" if close else ""
        hint = f"did you mean {near}?" if near else hint
        raise ConfigError(f"{origin}: {leaf.key} is {value!r}, but must be one of {', '.join(leaf.choices)}", hint)
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            check_interpolation(leaf.key, text, origin)


def check_interpolation(key: str, text: str, origin: str) -> None:
    """`${oc.env:NAME}` in paths only, of variables that exist and do not look like secrets; nothing else."""
    if text == "???":
        raise ConfigError(f"{origin}: {key} has no value (???)")
    if "${" not in text:
        return
    if key not in PATH_KEYS:
        raise ConfigError(
            f"{origin}: {key} holds ${{…}}, which is allowed in paths only (values are logged)",
            f"paths are {', '.join(PATH_KEYS)}",
        )
    if "${" in ENV.sub("", text):
        raise ConfigError(f"{origin}: {key} is {text!r}: only ${{oc.env:NAME}} is understood there")
    for match in ENV.finditer(text):
        name = match[1]
        if SECRET_NAME.search(name):
            raise ConfigError(
                f"{origin}: {key} names ${name}, which looks like a secret; the config is written beside the run",
                "use a variable that holds a path",
            )
        if name not in os.environ and "," not in match[0]:
            raise ConfigError(f"{origin}: {key} names ${name}, which is not set", f"export {name}=…")


# ---------------------------------------------------------------------------------------------- YAML


def compose(text: str, name: str) -> yaml.MappingNode | None:
    """Parse YAML text into nodes (None when empty); ConfigError with file:line when it does not parse."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    if root is None or isinstance(root, yaml.MappingNode):
        return root
    raise ConfigError(f"{name}:1: a config file holds `key: value` lines, this one a single value")


def read_yaml(path: Path, name: str) -> yaml.MappingNode | None:
    """Read and parse a file; `name` is how messages call it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 text (byte {error.start})") from error
    return compose(text, name)


def items(node: yaml.MappingNode, name: str, prefix: str = "") -> Iterator[tuple[str, yaml.Node, str]]:
    """(key, value node, file:line) of one mapping; a key written twice is an error, as are `<<` merges."""
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
            raise ConfigError(f"{name}:{line}: keys must be plain words")
        key = f"{prefix}{key_node.value}"
        if key in seen:
            raise ConfigError(f"{name}:{line}: {key} is set twice (first in line {seen[key]})", "keep one of them")
        seen[key] = line
        yield key, value_node, f"{name}:{line}"


def settings_in(node: yaml.MappingNode, name: str, prefix: str = "") -> Iterator[Setting]:
    """All values under a mapping, typed by the schema. Nested and dotted spellings may be mixed, but not repeated."""
    seen: dict[str, str] = {}
    for setting in _settings_in(node, name, prefix):
        if setting.key in seen:
            raise ConfigError(
                f"{setting.origin}: {setting.key} is set twice (first at {seen[setting.key]})", "keep one of them"
            )
        seen[setting.key] = setting.origin
        yield setting


def _settings_in(node: yaml.MappingNode, name: str, prefix: str) -> Iterator[Setting]:
    for key, value_node, origin in items(node, name, prefix):
        if isinstance(value_node, yaml.MappingNode):
            if (leaf := schema_leaves().get(canonical_key(key))) is not None and leaf.kind == MAPPING:
                yield typed(leaf, value_node, origin)
                continue
            if not is_section(key):
                raise _mistyped(leaf_for(key, origin), "a section", origin)  # leaf_for raises for what is unknown
            yield from _settings_in(value_node, name, f"{key}.")
            continue
        if isinstance(value_node, yaml.ScalarNode) and key in schema_sections() and value_node.value == "":
            continue  # `actor:` with nothing under it
        yield typed(leaf_for(key, origin), value_node, origin)


def typed(leaf: Leaf, node: yaml.Node, origin: str) -> Setting:
    """One YAML value in the type that the schema asks for."""
    value: Any
    if leaf.kind == list[Any]:
        value = _entries(leaf, node, origin)
    elif leaf.kind == MAPPING:
        value = _mapping(leaf, node, origin)
    elif isinstance(node, yaml.SequenceNode):
        if leaf.kind != list[str]:
            raise _mistyped(leaf, "a list", origin)
        value = []
        for item in node.value:
            if not isinstance(item, yaml.ScalarNode):
                raise _mistyped(leaf, "a list that holds more than texts", origin)
            value.append(item.value)
    elif isinstance(node, yaml.ScalarNode):
        if leaf.kind == list[str]:  # one text stands for a list of one
            plain = node.style not in ("'", '"')
            value = [] if not node.value or (plain and node.value in NULLS) else [node.value]
        else:
            value = convert_scalar(leaf, node.value, node.style in ("'", '"'), origin)
    else:
        raise _mistyped(leaf, "a section", origin)
    check_value(leaf, value, origin)
    return Setting(leaf.key, value, origin)


def _entries(leaf: Leaf, node: yaml.Node, origin: str) -> list[dict[str, Any]]:
    """The entries of `rewards`, checked: numbers are what is written like one without quotes, all else is text."""
    if not isinstance(node, yaml.SequenceNode):
        raise _mistyped(leaf, "not a list", origin)
    entries = []
    for item in node.value:
        if not isinstance(item, yaml.MappingNode):
            raise _mistyped(leaf, "a list of something else", origin)
        entries.append({key: _number_or_text(leaf, value, where) for key, value, where in items(item, origin)})
    reward_specs(entries, f"{origin}: {leaf.key}")
    return entries


def _mapping(leaf: Leaf, node: yaml.Node | None, origin: str) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _mistyped(leaf, "something else", origin, f"{leaf.key}={{enable_thinking: false}}")
    return {key: _guessed(leaf, value, where) for key, value, where in items(node, origin)}


def _guessed(leaf: Leaf, node: yaml.Node, origin: str) -> Any:
    """A value that no schema types: true, false, null and numbers as what they look like, all else as text."""
    if isinstance(node, yaml.MappingNode):
        return _mapping(leaf, node, origin)
    if isinstance(node, yaml.SequenceNode):
        return [_guessed(leaf, item, origin) for item in node.value]
    text = node.value
    check_interpolation(leaf.key, text, origin)
    if node.style in ("'", '"'):
        return text
    if text in NULLS:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if INT.match(text) else float(text) if FLOAT.match(text) else text


def _number_or_text(leaf: Leaf, node: yaml.Node, origin: str) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise _mistyped(leaf, "an entry with more than texts and numbers", origin)
    check_interpolation(leaf.key, node.value, origin)
    return float(node.value) if node.style not in ("'", '"') and FLOAT.match(node.value) else node.value


# ---------------------------------------------------------------------------------- the command line


def read_override(word: str) -> Setting:
    """One KEY=VALUE word of the command line."""
    key, equals, text = word.partition("=")
    if word.startswith("~"):
        known = schema_leaves().get(canonical_key(key[1:].strip()))
        default = f"{known.key}={known.default}" if known else "KEY=its default"
        raise ConfigError(f"{COMMAND_LINE}: {word}: a key cannot be removed", f"set it instead: {default}")
    if not equals or not key:
        raise ConfigError(
            f"{COMMAND_LINE}: {word!r} is not KEY=VALUE", "overrides look like actor.optim.lr=3e-6; flags start with --"
        )
    if key.startswith("rewards.") and key.count(".") == 2:  # rewards.NAME.KEY, applied to the list once it is known
        return Setting(key, _unquote(text)[0], COMMAND_LINE)
    owner, _, entry = key.strip().rpartition(".")
    if (known := schema_leaves().get(canonical_key(owner))) is not None and known.kind == MAPPING:  # KEY.ENTRY=VALUE
        return Setting(known.key, convert_word(known, f"{{{entry}: {text}}}"), COMMAND_LINE)
    leaf = leaf_for(key.strip(), f"{COMMAND_LINE}: {word}")
    return Setting(leaf.key, convert_word(leaf, text), COMMAND_LINE)


def convert_word(leaf: Leaf, text: str) -> Any:
    """The VALUE of a word: a list as `[a, 'b,c']` or one text, in quotes to be taken as it is; `rewards` and
    mappings as YAML."""
    value: Any
    if leaf.kind in (list[Any], MAPPING):
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise _mistyped(leaf, text, COMMAND_LINE) from error
        return _entries(leaf, node, COMMAND_LINE) if leaf.kind == list[Any] else _mapping(leaf, node, COMMAND_LINE)
    if leaf.kind == list[str]:
        value = _list_of(leaf, text.strip())
    else:
        value = convert_scalar(leaf, *_unquote(text), COMMAND_LINE)
    check_value(leaf, value, COMMAND_LINE)
    return value


def _list_of(leaf: Leaf, text: str) -> list[str]:
    if not text.startswith("["):
        return [] if not text or text in NULLS else [_unquote(text)[0]]
    items = split_items(text[1:-1]) if text.endswith("]") else None
    if items is None:
        what = "a list lacks a bracket, a quote or an item"
        hint = f"{leaf.key}=[a,'b,c'] is a list; a name that begins with [ goes in quotes, inside the shell's own"
        raise ConfigError(f"{COMMAND_LINE}: {leaf.key} is {_cut(text)}: {what}", hint)
    return items


def _unquote(text: str) -> tuple[str, bool]:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1], True
    return text, False


def read_flag(key: str, value: Any) -> Setting:
    """A flag's value (already parsed by the command line's parser) for a config key."""
    leaf = leaf_for(key, COMMAND_LINE)
    if isinstance(value, str):
        return Setting(leaf.key, convert_word(leaf, value), COMMAND_LINE)
    if leaf.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    kind = list if leaf.kind == list[str] else leaf.kind
    if type(value) is not kind:
        raise _mistyped(leaf, repr(value), COMMAND_LINE)
    check_value(leaf, value, COMMAND_LINE)
    return Setting(leaf.key, value, COMMAND_LINE)
