"""`gad demo` and `gad arena`: several runs in a row, and a table of what they changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from gadcli.cli.common import ConfigOption, ForceOption, JsonOption, PresetOption, QuietOption

SETTING = re.compile(r"[a-z_]+\.[a-z0-9_.]+=")  # a dotted key; anything else is a file
Number = TypeVar("Number", int, float)


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

    Runs on two CPU cores without a GPU or a model hub. Started again it continues where it stopped, and shows the table
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


def arena(
    words: Annotated[
        list[str], typer.Argument(metavar="FILES... KEY=VALUE...", help="Rows to learn from; settings of every run.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", metavar="M", help="The student's base: as in gad train.")],
    arms: Annotated[
        str, typer.Option("--arms", metavar="A,B", help="Which of seqkd, seqkd+, best-of-n, soda, gad.")
    ] = "seqkd,seqkd+,best-of-n,soda,gad",
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", metavar="NAME:KEY=VALUE", help="An arm of your own: gad (or soda, sft) with settings."),
    ] = None,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0, help="Wall time of each arm, its critic's warmup included. [5]")
    ] = 0.0,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Steps of each arm instead of a wall time.")] = 0,
    start_epochs: Annotated[
        int, typer.Option("--start-epochs", min=1, help="Longest supervised start; it ends at its best point.")
    ] = 10,
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="1,2", help="Seeds; everything is trained once for each.")
    ] = "1",
    temperatures: Annotated[
        str, typer.Option("--temperatures", metavar="T,T", help="Sampling temperatures of the test; 0 is greedy.")
    ] = "0,0.4,0.7,1",
    answers: Annotated[int, typer.Option("--answers", min=1, help="Answers per test prompt and temperature.")] = 1,
    measure: Annotated[
        list[str] | None,
        typer.Option("--measure", metavar="[NAME=]KIND:TEXT", help="python:FILE.py:FN, command:CMD, parses:python …"),
    ] = None,
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="MODEL", help="Local teacher: log-prob of the students' answers.")
    ] = "",
    val: Annotated[
        list[str] | None, typer.Option("--val", metavar="F", help="Rows that choose the start's end.")
    ] = None,
    test: Annotated[list[str] | None, typer.Option("--test", metavar="F", help="Rows that judge the arms.")] = None,
    held_out: Annotated[
        float, typer.Option("--held-out", min=0.01, max=0.9, help="Share split off for --val and --test if not given.")
    ] = 0.3,
    preset: PresetOption = None,
    config: ConfigOption = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", metavar="DIR", help="The arena's folder.")] = Path(
        "runs/arena"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="The default: go on where an arena stopped.")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Train several methods from one start on equal terms, and say which one wins on what, by how much.

    Each arm is an ordinary run whose command is shown. Arms are compared greedy, at the highest temperature, and at
    equal variety: sampling colder raises quality for any model. Rerun to resume.
    """
    import sys

    from gadcli.arena.arms import parse_arms, parse_measure
    from gadcli.arena.run import ArenaSpec
    from gadcli.arena.show import run_arena
    from gadcli.errors import ConfigError
    from gadcli.launch.display import say
    from gadcli.launch.run_folder import move_aside

    if minutes and steps:
        raise ConfigError("--minutes and --steps both say how long an arm trains", "give one of them")
    if bool(val) != bool(test):
        raise ConfigError("--val and --test go together", "give both, or neither: they are split off FILES")
    overrides = [word for word in words if SETTING.match(word)]
    files = [word for word in words if word not in overrides]
    if not files:
        raise ConfigError("no files to learn from", "gad arena FILES --model M")
    spec = ArenaSpec(
        output_dir, tuple(files), model, tuple(parse_arms(arms, arm or [])), numbers(seeds, int, "--seeds"),
        0.0 if steps else 60 * (minutes or 5.0), steps, start_epochs, preset, config, tuple(overrides),
        tuple(val or ()), tuple(test or ()), held_out, tuple(sorted(numbers(temperatures, float, "--temperatures"))),
        answers, tuple(parse_measure(text) for text in measure or []), teacher, quiet or as_json,
    )  # fmt: skip
    if force and output_dir.exists():
        say(sys.stderr, f"gad: moved the arena that was there to {move_aside(output_dir)}")
    return run_arena(spec, as_json=as_json)


def numbers(text: str, kind: Callable[[str], Number], flag: str) -> tuple[Number, ...]:
    """`1,2,3`: different numbers of 0 or more. Raises ConfigError."""
    from gadcli.errors import ConfigError

    try:
        found = tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{flag} {text!r}: not numbers", f"{flag} 0,1") from error
    if len(set(found)) < len(found) or not all(0 <= number < 1e9 for number in found):
        raise ConfigError(f"{flag} {text!r}: each number of 0 or more, once", f"{flag} 0,1")
    return found
