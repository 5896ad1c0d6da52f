"""`gad losslab`: stored scores of a run, or a synthetic grid, through every discriminator loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gadcli.cli.find_run import find_run

from .common import ConfigOption, JsonOption, OverridesArgument, PresetOption

app = typer.Typer(add_completion=False)

SYNTHETIC = "synthetic"


@app.command()
def losslab(
    source: Annotated[
        str, typer.Argument(metavar="RUN|synthetic", help="Run folder or its name in runs/, or the word synthetic.")
    ],
    overrides: OverridesArgument = None,
    teacher_length: Annotated[
        float | None,
        typer.Option("--teacher-length", metavar="X", min=1, help="Teacher's mean tokens; default: the run's, or 150."),
    ] = None,
    student_length: Annotated[
        float | None,
        typer.Option("--student-length", metavar="X", min=1, help="Student's mean tokens; default: the run's, or 250."),
    ] = None,
    loss: Annotated[
        list[str] | None, typer.Option("--loss", metavar="LOSS", help="Only this loss; repeatable.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="Step whose scores to use; default: the last.")
    ] = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Also write the curves as a PNG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the discriminator losses: value, gradient size, and where each settles.

    Hyperparameters are the run's (or the preset's, or the defaults); override them as critic.final.score_reg=0.01.
    """
    from gadcli.cli.losslab_examine import critic_config, examine, read_scores
    from gadcli.cli.losslab_show import show, write_png

    run = None if source == SYNTHETIC else find_run(source)
    critic = critic_config(run, preset, config, overrides or [])
    scores = None if run is None else read_scores(run, step)
    lab = examine(critic, scores, loss or [], teacher_length, student_length)
    if png is not None:
        write_png(lab, png)
    if as_json:
        from .common import print_json

        print_json(lab.to_json())
    else:
        show(lab)
    if png is not None:
        typer.echo(f"curves: {png}", err=True)
