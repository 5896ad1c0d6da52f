"""Presets: YAML files with a `common` section and one a stage, where each may extend another."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import yaml

import gadcli
from gadcli.config.reading import Setting, items, read_yaml, settings_in
from gadcli.config.schema import STAGES
from gadcli.errors import ConfigError

SECTIONS = ("common", *STAGES)
TOP_KEYS = ("extends", "description", *SECTIONS)


@dataclass(frozen=True)
class PresetFile:
    """One parsed file of presets/ (or like one). `name` is how messages and origins call it."""

    name: str
    extends: str | None
    description: str
    sections: dict[str, yaml.MappingNode]

    def settings(self, stage: str) -> list[Setting]:
        """What this file alone says for a stage: `common`, then the stage's section. All sections are checked."""
        found = {section: list(settings_in(node, self.name)) for section, node in self.sections.items()}
        return found.get("common", []) + found.get(stage, [])


def presets_dir() -> Path:
    """Where the shipped presets are: inside an installed wheel's package, else at the repository's top."""
    package = Path(gadcli.__file__).parent
    inside = package / "presets"
    return inside if inside.is_dir() else package.parent.parent / "presets"


def preset_names() -> list[str]:
    """The shipped presets by name."""
    return sorted(path.stem for path in presets_dir().glob("*.yaml"))


def preset_path(name: str, beside: Path | None = None) -> tuple[Path, str]:
    """(file, how messages call it) of a shipped name, or of a path: what has a `/` or a YAML ending, from `beside`."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if beside is not None and not path.is_absolute():
            path = beside / path
        if not path.is_file():
            raise ConfigError(f"preset {name}: no such file", f"shipped presets: {', '.join(preset_names())}")
        return path, name
    path = presets_dir() / f"{name}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(name, preset_names(), n=1)
        near = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"no preset named {name!r}", f"{near}shipped presets: {', '.join(preset_names())}")
    return path, f"presets/{name}.yaml"


def is_preset_shaped(root: yaml.MappingNode) -> bool:
    """Whether a YAML file has a preset's sections, and not the plain keys of one config."""
    return any(isinstance(k, yaml.ScalarNode) and k.value in TOP_KEYS for k, _ in root.value)


def parse_preset(root: yaml.MappingNode | None, name: str) -> PresetFile:
    """The sections of a preset file; ConfigError for a top-level key that is none."""
    extends: str | None = None
    description = ""
    sections: dict[str, yaml.MappingNode] = {}
    for key, node, origin in items(root, name) if root else ():
        if key in SECTIONS:
            if isinstance(node, yaml.MappingNode):
                sections[key] = node
            elif node.value:
                raise ConfigError(f"{origin}: {key} must hold keys", f"{key}: then `actor:` … on indented lines")
        elif key in ("extends", "description"):
            if not isinstance(node, yaml.ScalarNode):
                raise ConfigError(f"{origin}: {key} must be one text")
            extends, description = (node.value, description) if key == "extends" else (extends, node.value)
        else:
            close = difflib.get_close_matches(key, TOP_KEYS, n=1)
            near = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"{origin}: unknown key {key}", f"{near}a preset holds {', '.join(TOP_KEYS)}")
    return PresetFile(name, extends, description.strip(), sections)


def load_chain(name: str, beside: Path | None = None) -> list[PresetFile]:
    """A preset and all that it extends, the farthest ancestor first: later files go over earlier ones."""
    chain: list[PresetFile] = []
    visited: list[Path] = []
    wanted: str | None = name
    while wanted:
        path, shown = preset_path(wanted, beside)
        if path.resolve() in visited:
            raise ConfigError(f"{shown}: extends itself through {', '.join(p.name for p in visited)}")
        visited.append(path.resolve())
        chain.append(parse_preset(read_yaml(path, shown), shown))
        wanted, beside = chain[-1].extends, path.parent
    return chain[::-1]
