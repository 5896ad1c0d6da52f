"""`gad arena` from its spec to the report on screen and on disk."""

from __future__ import annotations

import json
import shutil
import sys

from gadcli.arena.page import html_page
from gadcli.arena.report import render
from gadcli.arena.result import make_table
from gadcli.arena.run import ArenaRuns, ArenaSpec, Stopped
from gadcli.errors import ExitCode
from gadcli.files import write_atomic
from gadcli.launch.display import say


def run_arena(spec: ArenaSpec, *, as_json: bool) -> int:
    """Run what is missing, then write results.json and report.html into the arena's folder and show the table."""
    try:
        results = ArenaRuns(spec).run()
    except Stopped as stopped:
        say(sys.stderr, "gad: the same command goes on from here")
        return stopped.code
    table = make_table(spec, results)
    text = json.dumps(table.to_json(), indent=2, ensure_ascii=False) + "\n"
    write_atomic(spec.folder / "results.json", text)
    write_atomic(spec.folder / "report.html", html_page(table))
    if as_json:
        say(sys.stdout, text.rstrip())
    else:
        say(sys.stdout, render(table, max(60, min(120, shutil.get_terminal_size((100, 24)).columns))))
        say(sys.stdout, f"{spec.folder / 'report.html'} has the plots, {spec.folder / 'results.json'} the figures.")
    return int(ExitCode.OK)
