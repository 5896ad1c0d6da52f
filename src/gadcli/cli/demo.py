"""`gad demo`: the three stages, merge and a before/after table on the embedded default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gadcli.cli.common import ForceOption, QuietOption


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Under three minutes: every part runs, too short to learn.")
    ] = False,
    collapse: Annotated[
        str,
        typer.Option(
            "--collapse",
            metavar="LOSS",
            help="Instead train a tiny model set up to collapse, to learn the dashboard: v1.",
        ),
    ] = "",
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", metavar="DIR", help="Default: runs/demo[-quick|-collapse-v1].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted demo (the default).")] = False,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> int:
    """Train all stages on a 135M student and Python's own docstrings; print held-out results.

    Runs on two CPU cores without a GPU or a model hub. Started again it goes on where it stopped, and shows the table
    of a demo that is done. With --collapse v1 it is a real run that goes wrong, in minutes, for `gad why` to name.
    """
    import sys

    from gadcli.demo.collapse import COLLAPSES, CollapseDemo
    from gadcli.demo.run import Demo
    from gadcli.errors import ConfigError
    from gadcli.launch.display import say
    from gadcli.launch.run_folder import move_aside

    if collapse and collapse not in COLLAPSES:
        raise ConfigError(f"--collapse is {collapse}", f"collapses on show: {', '.join(COLLAPSES)}")
    if collapse and quick:
        raise ConfigError("--collapse with --quick", "the collapse takes minutes as it is: leave --quick out")
    folder = output_dir or Path("runs") / (
        f"demo-collapse-{collapse}" if collapse else "demo-quick" if quick else "demo"
    )
    if force and folder.exists():
        say(sys.stderr, f"gad: moved the demo that was there to {move_aside(folder)}")
    if collapse:
        return CollapseDemo(folder, quiet=quiet, collapse=collapse).run()
    return Demo(folder, quick=quick, quiet=quiet).run()
