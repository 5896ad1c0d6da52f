"""One stage's configuration: schema < preset < --config FILE < flags < KEY=VALUE, and where each value came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from gadcli.config.presets import is_preset_shaped, load_chain, parse_preset
from gadcli.config.reading import Setting, read_flag, read_override, read_yaml, settings_in
from gadcli.config.rewards import override, reward_specs
from gadcli.config.schema import STAGE_DEFAULTS, STAGES, GadConfig
from gadcli.config.tree import flatten, schema_leaves
from gadcli.errors import ConfigError

DEFAULT = "default"
IDENTITY_KEYS = ("stage", "preset")  # said by the command, never by a file or an override


@dataclass(frozen=True)
class Resolved:
    """A stage's configuration, and for every key `presets/NAME.yaml:14`, `FILE:3`, `command line` or `default`."""

    config: GadConfig
    origins: dict[str, str]

    def to_yaml(self, with_origins: bool = True) -> str:
        """The whole tree as YAML that `load_resolved` reads back; origins stand as comments."""
        return dump_yaml(self.config, self.origins if with_origins else {})


def resolve(
    stage: str,
    preset: str | None = None,
    config_file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Resolved:
    """Resolve one stage.

    `preset` is a shipped name or a path; `config_file` holds plain keys (`actor: …`) or a preset's sections;
    `flags` maps dotted keys to values (None is not given); `overrides` are KEY=VALUE words. The last setting of a
    key wins; within a file, `common` comes before the stage's section, and a preset's whole file goes over what it
    extends. Raises ConfigError with file:line, key and the nearest valid key.
    """
    if stage not in STAGES:
        raise ConfigError(f"no stage named {stage!r}", f"stages are {', '.join(STAGES)}")
    settings: list[Setting] = []
    if preset:
        for file in load_chain(preset):
            settings += file.settings(stage)
    if config_file is not None:
        settings += config_file_settings(config_file, stage)
    settings += [read_flag(key, value) for key, value in (flags or {}).items() if value is not None]
    settings += [read_override(word) for word in overrides]

    origins = dict.fromkeys(schema_leaves(), DEFAULT)
    values: dict[str, Any] = dict(STAGE_DEFAULTS[stage])
    for setting in settings:
        if setting.key in IDENTITY_KEYS:
            raise ConfigError(
                f"{setting.origin}: {setting.key} is not set by hand",
                "the command names the stage, --preset the preset",
            )
        if setting.key.startswith("rewards."):
            _, name, key = setting.key.split(".")
            values["rewards"] = override(values.get("rewards", []), name, key, setting.value)
            reward_specs(values["rewards"])
            continue
        merges = isinstance(setting.value, dict)
        values[setting.key] = {**values.get(setting.key, {}), **setting.value} if merges else setting.value
        origins[setting.key] = setting.origin
    values["stage"] = stage
    values["preset"] = preset or ""
    return Resolved(build(values), origins)


def config_file_settings(path: Path, stage: str) -> list[Setting]:
    """What a --config file says for a stage: plain keys, a preset's sections, or a run's own config.yaml."""
    name = str(path)
    root = read_yaml(path, name)
    if root is None:
        return []
    if is_preset_shaped(root):
        file = parse_preset(root, name)
        parents = load_chain(file.extends, beside=path.parent) if file.extends else []
        return [setting for source in (*parents, file) for setting in source.settings(stage)]
    settings = list(settings_in(root, name))
    for setting in settings:
        if setting.key == "stage" and setting.value != stage:
            raise ConfigError(f"{setting.origin}: this file is of stage {setting.value}, not {stage}")
    return [setting for setting in settings if setting.key not in IDENTITY_KEYS]


def build(values: Mapping[str, Any]) -> GadConfig:
    """The typed tree from values by dotted key, through OmegaConf's structured types; environment names filled in."""
    from omegaconf import OmegaConf  # 0.1 s to import; kept out of `gad -h`

    config = GadConfig()
    for key, value in values.items():
        *sections, name = key.split(".")
        setattr(reduce(getattr, sections, config), name, value)
    checked = OmegaConf.to_object(OmegaConf.structured(config))
    assert isinstance(checked, GadConfig)
    return checked


def dump_yaml(config: GadConfig, origins: Mapping[str, str]) -> str:
    """A config as YAML in the schema's order; `# origin` after each value that is not a default."""
    lines: list[str] = []
    shown: list[str] = []
    for key, value in flatten(config).items():
        *sections, name = key.split(".")
        common = 0
        while common < min(len(sections), len(shown)) and sections[common] == shown[common]:
            common += 1
        lines += [f"{'  ' * i}{sections[i]}:" for i in range(common, len(sections))]
        shown = sections
        line = f"{'  ' * len(sections)}{name}: {_scalar(value)}"
        origin = origins.get(key, DEFAULT)
        lines.append(line if origin == DEFAULT else f"{line}  # {origin}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=2**31)
    return text.removesuffix("...\n").rstrip("\n")


def load_resolved(path: Path) -> GadConfig:
    """Read back a run's config.yaml. Raises ConfigError when it is unreadable or not of this version's schema."""
    root = read_yaml(path, str(path))
    if root is None:
        raise ConfigError(f"{path}: empty", "the run's folder is damaged; start a new run")
    return build({setting.key: setting.value for setting in settings_in(root, str(path))})
