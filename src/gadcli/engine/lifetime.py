"""A worker's side of living and dying with its parent: the death signal, stack dumps, the log file. Knows no torch.

As a program it starts another module in this process after tying it to the parent:
`python -P -m gadcli.engine.lifetime gadcli.train.worker --run-dir DIR`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import runpy
import signal
import sys
from pathlib import Path

PARENT_VARIABLE = "GAD_PARENT_PID"
LOG_DIR_VARIABLE = "GAD_LOG_DIR"
PR_SET_PDEATHSIG = 1
STACK_SIGNAL = signal.SIGUSR2


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask the kernel to kill this process when the thread that started it ends (Linux; elsewhere the guard does it).

    `parent_pid` is who the parent should be: if it died before we asked, no signal would ever come, so leave now.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(int(signal.SIGKILL) + 128)


def dump_stacks_on_request() -> None:
    """Write every thread's stack to stderr (the rank's log) on SIGUSR2: the parent asks before it kills a hung rank."""
    faulthandler.register(STACK_SIGNAL, all_threads=True, chain=False)


def log_to_file(folder: Path, rank: int) -> None:
    """Point stdout and stderr, file descriptors included, at `rank_R.log` (appended)."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def main() -> None:
    """Tie this process to its parent, then become the module named on the command line."""
    parent = os.environ.get(PARENT_VARIABLE)
    die_with_parent(int(parent) if parent else None)
    dump_stacks_on_request()
    # Until the worker has its own handlers: an early "save now" must not kill it, and a Ctrl-C needs no traceback.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if folder := os.environ.get(LOG_DIR_VARIABLE):
        log_to_file(Path(folder), int(os.environ.get("RANK", "0")))
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
