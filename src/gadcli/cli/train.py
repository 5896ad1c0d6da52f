"""`gad train seqkd|warmup|gad` and `gad run`: flags into a request, the request to the torch-free parent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from gadcli.cli.common import (
    ConfigOption,
    DryRunOption,
    ExpNameOption,
    ForceOption,
    JsonOption,
    ModelOption,
    NnodesOption,
    NprocOption,
    OutputDirOption,
    OverridesArgument,
    PresetOption,
    QuietOption,
    ResumeOption,
    RewardModelOption,
    stage_flags,
)

NodeRankOption = Annotated[int | None, typer.Option("--node-rank", metavar="R", help="Index of this machine, from 0.")]
RdzvOption = Annotated[
    str | None, typer.Option("--rdzv-endpoint", metavar="HOST:PORT", help="Rendezvous address: the first machine's.")
]
RestartsOption = Annotated[
    int,
    typer.Option("--max-restarts", metavar="K", min=0, help="Restarts from the last checkpoint after a lost process."),
]
KeepBoardOption = Annotated[bool, typer.Option("--keep-tensorboard", help="Leave TensorBoard running after the run.")]
SbatchOption = Annotated[
    Path | None, typer.Option("--sbatch", metavar="FILE", help="Write a SLURM job script for this command and exit.")
]
StagesOption = Annotated[str, typer.Option("--stages", metavar="A,B", help="Stages to run, in order.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run one stage.")


STAGE_HELP = {
    "seqkd": "Stage 1: the student learns the teacher's text by supervised fine-tuning.",
    "warmup": "Stage 2: the discriminator learns to tell teacher from student, first alone, then against it.",
    "gad": "Stage 3: student and discriminator play against each other from the first step.",
}


def stage_command(stage: str) -> Callable[..., int]:
    """The command of one stage; the three differ in nothing but their name."""

    def command(
        overrides: OverridesArgument = None,
        preset: PresetOption = None,
        config: ConfigOption = None,
        model: ModelOption = None,
        reward_model: RewardModelOption = None,
        exp_name: ExpNameOption = None,
        output_dir: OutputDirOption = None,
        nproc: NprocOption = None,
        nnodes: NnodesOption = None,
        node_rank: NodeRankOption = None,
        rdzv_endpoint: RdzvOption = None,
        max_restarts: RestartsOption = 0,
        keep_tensorboard: KeepBoardOption = False,
        sbatch: SbatchOption = None,
        dry_run: DryRunOption = False,
        resume: ResumeOption = False,
        force: ForceOption = False,
        as_json: JsonOption = False,
        quiet: QuietOption = False,
    ) -> int:
        from gadcli.launch.cluster import start_stage
        from gadcli.launch.stage import StageRequest

        request = StageRequest(
            stage=stage, preset=preset, config_file=config, overrides=tuple(overrides or ()),
            flags=stage_flags(model=model, reward_model=reward_model, exp_name=exp_name, output_dir=output_dir,
                              nproc=nproc, nnodes=nnodes),
            dry_run=dry_run, resume=resume, force=force, as_json=as_json, quiet=quiet,
            keep_tensorboard=keep_tensorboard, node_rank=node_rank, rdzv_endpoint=rdzv_endpoint or "",
            max_restarts=max_restarts,
        )  # fmt: skip
        return start_stage(request, sbatch)

    command.__doc__ = STAGE_HELP[stage]
    return command


for name in STAGE_HELP:
    app.command(name)(stage_command(name))


def run(
    overrides: OverridesArgument = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    model: ModelOption = None,
    reward_model: RewardModelOption = None,
    exp_name: ExpNameOption = None,
    output_dir: OutputDirOption = None,
    nproc: NprocOption = None,
    stages: StagesOption = "seqkd,warmup,gad",
    max_restarts: RestartsOption = 0,
    keep_tensorboard: KeepBoardOption = False,
    dry_run: DryRunOption = False,
    resume: ResumeOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Run all stages in order, each from the previous one's result; --resume continues an interrupted run."""
    from gadcli.launch.pipeline import run_stages
    from gadcli.launch.stage import StageRequest

    request = StageRequest(
        stage="", preset=preset, config_file=config, overrides=tuple(overrides or ()),
        flags=stage_flags(model=model, reward_model=reward_model, exp_name=exp_name, output_dir=output_dir,
                          nproc=nproc),
        dry_run=dry_run, resume=resume, force=force, as_json=as_json, quiet=quiet, keep_tensorboard=keep_tensorboard,
        max_restarts=max_restarts,
    )  # fmt: skip
    return run_stages(request, [name.strip() for name in stages.split(",") if name.strip()])
