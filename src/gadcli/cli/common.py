"""Options that several commands share, so that a flag is spelled, explained and mapped to its config key once."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gadcli.config.schema import GadConfig

PresetOption = Annotated[
    str | None, typer.Option("--preset", "-p", metavar="NAME", help="Preset name, or a YAML file in the same format.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="YAML file whose keys override the preset's.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="M", help="Student: hub name, HF folder, .gguf, or global_step_N/actor."),
]
RewardModelOption = Annotated[
    str | None,
    typer.Option("--reward-model", metavar="R", help="Initial discriminator: as --model, or global_step_N/critic."),
]
ExpNameOption = Annotated[
    str | None,
    typer.Option("--exp-name", metavar="E", help="Experiment name: the run's folder in the output directory."),
]
OutputDirOption = Annotated[str | None, typer.Option("--output-dir", metavar="DIR", help="Directory for run folders.")]
NprocOption = Annotated[int | None, typer.Option("--nproc", metavar="N", help="Number of processes on this machine.")]
NnodesOption = Annotated[int | None, typer.Option("--nnodes", metavar="N", help="Number of machines.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and exit; nothing is loaded or written.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Resume from the last committed checkpoint.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Move an existing run aside, or resume with changed settings.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a config key: data.turns=each. May be repeated."),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides by dotted key: actor.optim.lr=3e-6.", show_default=False),
]

FLAG_KEYS = {
    "model": "actor.model.path",
    "reward_model": "critic.model.path",
    "exp_name": "trainer.exp_name",
    "output_dir": "trainer.output_dir",
    "nproc": "trainer.nproc",
    "nnodes": "trainer.nnodes",
}


def stage_flags(**given: Any) -> dict[str, Any]:
    """Flags by parameter name (FLAG_KEYS) to config keys, for `resolve(flags=…)`; those not given (None) drop out."""
    return {FLAG_KEYS[name]: value for name, value in given.items() if value is not None}


def overridden(stage: str, preset: str | None, overrides: Sequence[str]) -> GadConfig:
    """The config of a stage as a preset and KEY=VALUE words have it; the schema's defaults without either."""
    from gadcli.config.resolve import resolve
    from gadcli.config.schema import GadConfig

    return resolve(stage, preset, None, {}, list(overrides)).config if preset or overrides else GadConfig()


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    plain = (sys.stdout.encoding or "utf-8").lower() != "utf-8"
    print(json.dumps(value, indent=2, ensure_ascii=plain))
