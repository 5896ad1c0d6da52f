"""Write limits into a preset file: edits the numbers in place (comments stay), or makes a new file (torch-free)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from gadcli.config.presets import preset_names
from gadcli.config.resolve import resolve
from gadcli.config.schema import STAGES
from gadcli.errors import ConfigError


def write_limits(name: str, limits: Mapping[str, int], base: str | None = None) -> Path:
    """Set limits (`data.max_prompt_length` …) in the preset file `name` (`.yaml` is added), which is made if it is not
    there.

    A new file extends `base`. The result is resolved for every stage before it takes the old one's place; raises
    ConfigError, with the old file untouched, if it does not resolve or if `name` is a shipped preset.
    """
    if name in preset_names():
        raise ConfigError(f"{name} is a shipped preset, which is not edited", f"--write my-{name}.yaml extends it")
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = path.with_name(path.name + ".yaml")
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else _new_text(base)
        for key, value in limits.items():
            section, _, name_in_section = key.partition(".")
            text = _set(text, section, name_in_section, value, str(path))
        fresh = path.with_name(f".{path.stem}.{os.getpid()}.yaml")
        fresh.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "choose another --write") from None
    try:
        for stage in STAGES:
            resolve(stage, str(fresh.absolute()), None, {}, [])
    except ConfigError:
        fresh.unlink()
        raise
    os.replace(fresh, path)
    return path


def _new_text(base: str | None) -> str:
    head = "# Limits written by `gad data analyze-tokens`: P99 of the data, rounded up to a multiple of 16.\n"
    return head + (f"extends: {base}\n" if base else "")


def _set(text: str, section: str, key: str, value: int, name: str) -> str:
    """One limit: wherever the file sets it already, and in `common` if it is nowhere."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {str(error).splitlines()[0]}", "fix the file first") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}: not a preset file", "name a preset, or a file that does not exist yet")
    spans = []
    for part in ("common", *STAGES):
        found = _child(_child(_child(root, part), section), key)
        if found is not None:
            spans.append((found.start_mark.index, found.end_mark.index))
    if spans:
        for start, end in sorted(spans, reverse=True):
            text = text[:start] + str(value) + text[end:]
        return text
    common = _child(root, "common")
    inner = _child(common, section)
    if isinstance(inner, yaml.MappingNode) and inner.value:
        return _insert(text, inner, f"{key}: {value}")
    if isinstance(common, yaml.MappingNode) and common.value:
        return _insert(text, common, f"{section}:\n  {key}: {value}")
    return text.rstrip("\n") + f"\n\ncommon:\n  {section}:\n    {key}: {value}\n"


def _child(node: yaml.Node | None, key: str) -> yaml.Node | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((v for k, v in node.value if isinstance(k, yaml.ScalarNode) and k.value == key), None)


def _insert(text: str, mapping: yaml.MappingNode, lines: str) -> str:
    """Put lines before a block mapping's first key, indented like it."""
    mark = mapping.value[0][0].start_mark
    line_start = text.rfind("\n", 0, mark.index) + 1
    if mapping.flow_style or text[line_start : mark.index].strip():
        raise ConfigError("a `{…}` section cannot be edited in place", "write it on indented lines first")
    indent = " " * mark.column
    added = "".join(f"{indent}{line}\n" for line in lines.split("\n"))
    return text[:line_start] + added + text[line_start:]
