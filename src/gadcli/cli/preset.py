"""`gad preset`: list the shipped presets, show one resolved with origins, compare two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gadcli.cli.common import ConfigOption, JsonOption, print_json

app = typer.Typer(help="List, show and diff presets.")

StageOption = Annotated[
    str | None, typer.Option("--stage", "-s", metavar="STAGE", help="seqkd, warmup or gad; default: all three.")
]


@app.command("list")
def list_presets(as_json: JsonOption = False) -> None:
    """List the shipped presets and what each is for."""
    from gadcli.config.presets import load_chain, preset_names

    found = {name: load_chain(name)[-1].description for name in preset_names()}
    if as_json:
        print_json([{"name": name, "description": text} for name, text in found.items()])
        return
    width = max(map(len, found), default=0)
    for name, text in found.items():
        print(f"{name:<{width}}  {text}")


@app.command("show")
def show(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Preset name or file; default: the schema.")
    ] = None,
    stage: StageOption = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print resolved values and where each came from; without NAME, every key with its meaning."""
    if name is not None and "=" in name:  # `gad preset show actor.optim.lr=1e-5`: no preset
        overrides, name = [name, *(overrides or [])], None
    if name is None and stage is None and not overrides and config is None:
        show_schema(as_json)
    elif stage is not None:
        show_stage(stage, name, config, overrides or [], as_json)
    else:
        show_stages(name, config, overrides or [], as_json)


def show_schema(as_json: bool) -> None:
    """Every key: default, bounds, meaning."""
    from gadcli.config.tree import schema_leaves

    if as_json:
        leaves = schema_leaves().values()
        print_json([{**vars(leaf), "kind": leaf.kind_name} for leaf in leaves])
        return
    for leaf in schema_leaves().values():
        bounds = " | ".join(leaf.choices) if leaf.choices else ""
        if not bounds and (leaf.min is not None or leaf.max is not None):
            bounds = f"{_short(leaf.min)}..{_short(leaf.max)}"
        print(f"{leaf.key}={_text(leaf.default)}  # {leaf.doc}" + (f" [{bounds}]" if bounds else ""))


def show_stage(stage: str, name: str | None, config: Path | None, overrides: list[str], as_json: bool) -> None:
    """One stage as the YAML that a run's config.yaml would hold."""
    from gadcli.config.resolve import resolve
    from gadcli.config.tree import flatten

    resolved = resolve(stage, name, config, overrides=overrides)
    if as_json:
        values = flatten(resolved.config)
        print_json({key: {"value": values[key], "origin": origin} for key, origin in resolved.origins.items()})
        return
    print(resolved.to_yaml(), end="")


def show_stages(name: str | None, config: Path | None, overrides: list[str], as_json: bool) -> None:
    """What was set, side by side for the three stages."""
    from gadcli.config.resolve import DEFAULT, resolve
    from gadcli.config.schema import STAGES
    from gadcli.config.tree import flatten

    resolved = {stage: resolve(stage, name, config, overrides=overrides) for stage in STAGES}
    values = {stage: flatten(r.config) for stage, r in resolved.items()}
    keys = [k for k in values["gad"] if any(r.origins[k] != DEFAULT for r in resolved.values())]
    if as_json:
        print_json({stage: {key: values[stage][key] for key in keys} for stage in STAGES})
        return
    print_table([("key", *STAGES)] + [(key, *(_text(values[stage][key]) for stage in STAGES)) for key in keys])


@app.command("diff")
def diff(
    one: Annotated[str, typer.Argument(metavar="A", help="Preset name or file.")],
    other: Annotated[str, typer.Argument(metavar="B", help="Preset name or file.")],
    stage: StageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the keys that differ between two presets, by stage."""
    from gadcli.config.resolve import resolve
    from gadcli.config.schema import STAGES
    from gadcli.config.tree import differences

    found: dict[str, list[tuple[str, Any, Any]]] = {}
    for name in (stage,) if stage else STAGES:
        pairs = differences(resolve(name, one).config, resolve(name, other).config)
        found[name] = [pair for pair in pairs if pair[0] != "preset"]
    if as_json:
        print_json({name: {key: [a, b] for key, a, b in pairs} for name, pairs in found.items()})
        return
    rows = [(name, key, _text(a), _text(b)) for name, pairs in found.items() for key, a, b in pairs]
    print_table([("stage", "key", one, other), *rows])


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Left-aligned columns, no wider than what they hold."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return f"{value:g}" if isinstance(value, float) else (str(value) if value != "" else "''")


def _short(bound: float | None) -> str:
    return "" if bound is None else f"{bound:g}"
