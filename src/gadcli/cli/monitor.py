"""`gad monitor`, `why`, `samples` and `compare`: everything that looks at runs and changes none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gadcli.cli.find_run import find_run
from gadcli.errors import ConfigError

if TYPE_CHECKING:
    from gadcli.dashboard import RunView

RunsArgument = Annotated[list[str], typer.Argument(metavar="RUN", help="Run folders, or names in runs/.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or its name in runs/.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


class SampleOrder(StrEnum):
    """How samples are sorted."""

    newest = "newest"
    gap = "gap"
    student = "student"
    teacher = "teacher"


def monitor(
    runs: RunsArgument,
    once: Annotated[bool, typer.Option("--once", help="Print the dashboard once and exit.")] = False,
    as_json: JsonOption = False,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report (.html) or the plots (.svg) and exit.")
    ] = None,
) -> int:
    """Live dashboard of runs. Keys: q quit (the run continues), n next sample, g next group, p pause."""
    import time

    from gadcli.dashboard import RunView

    folders = [find_run(name) for name in runs]
    if export is not None:
        return _export(folders, export)
    views = [RunView(folder) for folder in folders]
    for view in views:
        view.poll()
    if as_json:
        from gadcli.cli.common import print_json
        from gadcli.dashboard.words import run_json

        found = [run_json(view, time.time()) for view in views]
        print_json(found[0] if len(found) == 1 else found)
        return 0
    return _show(views, once)


def _show(views: Sequence[RunView], once: bool) -> int:
    """On a terminal the live picture; elsewhere one picture, or one line per step while a run is alive."""
    import time

    from rich.console import Console

    from gadcli.dashboard.screen import render_runs

    console = Console(highlight=False)
    going = views[0].log.state(time.time()).kind in ("running", "starting")
    if console.is_terminal and not once:
        return _live(views)
    if once or not going or len(views) > 1:
        height = max(20, console.height - 1) if console.is_terminal else 40 * max(1, len(views) // 2)
        picture = render_runs(views, console.width, height, time.time())
        for line in picture.renderables:
            if getattr(line, "plain", "x").strip():
                console.print(line, no_wrap=True, overflow="crop", soft_wrap=False)
        return 0
    return _follow(views[0])


def _follow(view: RunView) -> int:
    """One plain line per step until the run ends."""
    import sys
    import time

    from gadcli.dashboard import plain_line

    last = -1
    while True:
        for record in view.log.history.after(last):
            print(plain_line(record, view.log.run.get("total_steps")), flush=True)
            last = record.step
        state = view.log.state(time.time())
        if state.kind not in ("running", "starting"):
            print(f"{state.kind}: {state.text}", file=sys.stderr)
            return 0
        time.sleep(1.0)
        view.log.poll()


def _live(views: Sequence[RunView]) -> int:
    """The live picture; the terminal is restored on signals too, and none of them touches the run."""
    import errno
    import signal
    import sys
    import time

    from gadcli.dashboard import watch

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    keyboard = sys.stdin is not None and sys.stdin.isatty()

    def over() -> bool:
        # Without a keyboard nobody can press q: leave when every run has ended.
        return not keyboard and all(view.log.state(time.time()).ended for view in views)

    handled = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, leave) for number in handled]
    try:
        watch(views, over)
    except KeyboardInterrupt:
        pass  # the viewer's usual way out: nothing was interrupted but the picture
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise
        return 128 + signal.SIGHUP  # the terminal itself is gone
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)
    going = [str(v.run_dir) for v in views if v.log.state(time.time()).kind in ("running", "starting")]
    if going:
        print(f"still training: {', '.join(going)}", file=sys.stderr)
    return 0


def _export(folders: Sequence[Path], target: Path) -> int:
    import os
    import sys
    import time

    from gadcli.dashboard import RunView
    from gadcli.dashboard.plots import export_svg
    from gadcli.dashboard.report import export_html

    if len(folders) != 1 or target.suffix not in (".html", ".svg"):
        raise ConfigError("--export writes one run to a .html or .svg file", "gad monitor RUN --export report.html")
    view = RunView(folders[0])
    view.poll()
    text = export_svg(view) if target.suffix == ".svg" else export_html(view, time.time())
    try:
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}", "choose another place for --export") from error
    print(f"wrote {target} ({len(text) / 1e3:.0f} kB)", file=sys.stderr)
    return 0


def why(run: RunArgument, as_json: JsonOption = False) -> int:
    """Diagnose a run: symptoms, evidence, cause, and the override that fixes it; most certain first."""
    import time

    from gadcli.dashboard import RunView
    from gadcli.dashboard.words import run_json, why_lines

    view = RunView(find_run(run))
    view.poll()
    if as_json:
        from gadcli.cli.common import print_json

        keys = ("run", "state", "step", "groups", "diagnoses", "verdicts")
        report = run_json(view, time.time())
        print_json({key: report[key] for key in keys})
    else:
        print("\n".join(why_lines(view, time.time())))
    return 0


def samples(
    run: RunArgument,
    step: Annotated[int | None, typer.Option(metavar="N", help="Only samples of this step.")] = None,
    sort: Annotated[
        SampleOrder, typer.Option(help="Newest first, or by score: gap (teacher - student), student, teacher.")
    ] = SampleOrder.newest,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Number of samples.")] = 10,
    as_json: JsonOption = False,
) -> int:
    """Print stored samples. Reward hacking shows first in --sort student: the highest-scored answers."""
    import heapq
    import math
    from collections import deque

    from gadcli.metrics.samples import Sample, iter_samples

    folder = find_run(run)
    rows = (row for row in iter_samples(folder) if step is None or row.step == step)
    keys: dict[SampleOrder, Callable[[Sample], float | None]] = {
        SampleOrder.gap: lambda row: row.gap,
        SampleOrder.student: lambda row: row.student_score,
        SampleOrder.teacher: lambda row: row.teacher_score,
    }
    if sort is SampleOrder.newest:
        found = list(deque(rows, maxlen=limit))[::-1]
    else:

        def size(row: Sample) -> float:
            value = keys[sort](row)
            return -math.inf if value is None or math.isnan(value) else value

        found = heapq.nlargest(limit, rows, key=size)
    if not found:
        at = f" at step {step}" if step is not None else ""
        raise ConfigError(f"{folder} has no samples{at}", "they are written at each eval: trainer.test_freq=50")
    if as_json:
        from dataclasses import asdict

        from gadcli.cli.common import print_json

        print_json([{**asdict(row), "gap": row.gap} for row in found])
    else:
        from rich.console import Console

        from gadcli.dashboard.tables import samples_table

        Console(highlight=False).print(samples_table(found))
    return 0


def compare(
    runs: RunsArgument,
    every: Annotated[bool, typer.Option("--all", help="Also show what is equal.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Compare runs: the settings and recent metrics that differ."""
    import math
    import time

    from gadcli.dashboard import RunView
    from gadcli.metrics.compare import compare_metrics, config_differences, settings
    from gadcli.metrics.facts import read_config

    folders = [find_run(name) for name in runs]
    if len(folders) < 2:
        raise ConfigError("compare needs two runs or more", "gad compare RUN1 RUN2")
    views = [RunView(folder) for folder in folders]
    for view in views:
        view.poll()
    logs = [view.log for view in views]
    now = time.time()
    ails = [[d.name for d in view.judge.diagnoses if d.level != "info"] for view in views]
    rows = [("state", [log.state(now).kind for log in logs]),
            ("step", [str(log.history.last.step) if log.history.last else "–" for log in logs]),
            ("unhealthy", [", ".join(names[:3]) or "nothing" for names in ails])]  # fmt: skip
    # A run without a config.yaml (copied logs) still says its main settings in its header.
    config = config_differences([read_config(log.run_dir) or settings(log.run) for log in logs])
    metrics = [row for row in compare_metrics(logs) if row.differs or every]
    if as_json:
        from gadcli.cli.common import print_json

        values = {row.name: [None if math.isnan(v) else v for v in row.values] for row in metrics}
        print_json(
            {
                "runs": [str(f) for f in folders],
                "unhealthy": ails,
                "config": {k: list(v) for k, v in config},
                "metrics": values,
            }
        )
    else:
        from rich.console import Console

        from gadcli.dashboard.tables import compare_tables

        console = Console(highlight=False)
        names = [folder.name for folder in folders]
        names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
        for table in compare_tables(names, rows, config, metrics):
            console.print(table)
    return 0
