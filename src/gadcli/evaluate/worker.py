"""Work that needs torch, in processes of its own for a parent that knows none: started, watched, its errors told."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gadcli.distributed.worker_end import rank, run_worker
from gadcli.errors import ExitCode
from gadcli.launch.environment import engine_variables
from gadcli.launch.outcome import as_error, shown_tail
from gadcli.launch.started_by import refuse_worlds

POLL_S = 0.1
SILENCE_S = 1800.0  # a worker without a sign of life for so long is lost; loading a large model is quiet
MEMORY_HINT = "shorter --max-prompt-length and --max-response-length, or --engine hf, take less"


def run_workers(folder: Path, module: str, nproc: int, watch: Callable[[], None]) -> None:
    """Run `python -m module --run-dir folder` in `nproc` processes; `watch` is called while they work and at the end.

    They end with this process. Raises the workers' own error; `folder` then holds the log that its hint names.
    """
    from gadcli.launch.supervisor import LaunchSpec, Supervisor

    refuse_worlds("this command")
    supervisor = Supervisor(LaunchSpec(folder, nproc=nproc, timeout_s=SILENCE_S, worker_module=module))
    try:
        supervisor.start()
        while supervisor.poll():
            watch()
            time.sleep(POLL_S)
    finally:
        outcome = supervisor.close()
        watch()
    if outcome.code != ExitCode.OK:
        for line in shown_tail(outcome):
            print(line, file=sys.stderr)
        raise as_error(outcome)


def worker_main(module: str, work: Callable[[Path, int], None]) -> None:
    """The main of such a module: `work(folder, rank)`, and its outcome where the parent looks for it."""
    arguments = argparse.ArgumentParser(prog=module)
    arguments.add_argument("--run-dir", type=Path, required=True)
    folder = arguments.parse_args().run_dir

    def whole() -> int:
        work(folder, rank())
        return 0  # no signal ends it early

    run_worker(folder, whole, engine_variables(), memory_hint=MEMORY_HINT)
