"""Work that needs torch, in processes of its own for a parent that knows none: started, watched, its errors told."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gadcli.errors import ExitCode, GadError
from gadcli.files import write_atomic
from gadcli.launch.environment import ENGINE_VARIABLES

POLL_S = 0.1
SILENCE_S = 1800.0  # a worker without a sign of life for so long is lost; loading a large model is quiet


def run_workers(folder: Path, module: str, nproc: int, watch: Callable[[], None]) -> None:
    """Run `python -m module --run-dir folder` in `nproc` processes; `watch` is called while they work and at the end.

    They end with this process. Raises the workers' own error; `folder` then holds the log that its hint names.
    """
    from gadcli.launch.supervisor import LaunchSpec, Supervisor

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
        kinds = {int(kind.exit_code): kind for kind in GadError.__subclasses__() if kind.exit_code != ExitCode.BUG}
        raise kinds.get(outcome.code, GadError)(outcome.message, outcome.hint or None)


def worker_main(module: str, work: Callable[[Path, int], None]) -> None:
    """The main of such a module: `work(folder, rank)`, and its outcome where the parent looks for it."""
    arguments = argparse.ArgumentParser(prog=module)
    arguments.add_argument("--run-dir", type=Path, required=True)
    folder = arguments.parse_args().run_dir
    for name, value in ENGINE_VARIABLES.items():  # before torch and vllm are imported
        os.environ.setdefault(name, value)
    rank = int(os.environ.get("RANK", "0"))
    record: dict[str, Any] = {"code": 0, "kind": "Done", "message": "done", "hint": None}
    try:
        work(folder, rank)
    except GadError as error:
        kind, code = type(error).__name__, int(error.exit_code)
        record = {"code": code, "kind": kind, "message": error.message, "hint": error.hint}
        print(f"error: {error.message}", file=sys.stderr)
    path = folder / "logs" / f"rank_{rank}.exit.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(record))
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written; native libraries sometimes abort in their own teardown after that.
    os._exit(record["code"])
