"""A worker's side of living and dying with its parent: the death signal, stack dumps, the log file. Knows no torch.

As a program it starts another module in this process after tying it to the parent:
`python -P -m gadcli.launch.lifetime gadcli.train.worker --run-dir DIR`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

from gadcli.distributed.worker_end import LAUNCHER_STDERR_VARIABLE
from gadcli.launch.outcome import STARTED

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
    """Point stdout and stderr, file descriptors included, at `rank_R.log` (appended).

    The launcher's stderr stays open: a worker that fails says so there too (`worker_end.record_end`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[LAUNCHER_STDERR_VARIABLE] = str(os.dup(2))
    handle = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    os.write(2, f"{STARTED} {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n".encode())


def agent_key() -> str:
    """Who started this process: host, pid and the kernel's start time of the parent, which no other process shares."""
    parent = os.getppid()
    try:
        born = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        born = "?"
    return f"{socket.gethostname()} {parent} {born}"


def _start_note(logs: Path) -> Path:
    """One for each launcher and place in it: two launchers of one machine both have a local rank 0."""
    launcher = hashlib.sha256(agent_key().encode()).hexdigest()[:12]
    return logs / f"started_{launcher}_{os.environ.get('LOCAL_RANK', '0')}"


def started_before(logs: Path) -> bool:
    """Whether the same launcher has started this rank before: a restart, which goes on from the last checkpoint.

    torch's launcher repeats the words of the first start, and its TORCHELASTIC_RESTART_COUNT stays 0 on machines that
    only follow another's restart.
    """
    return _start_note(logs).exists()


def with_resume(words: list[str], logs: Path) -> list[str]:
    """The worker's words, with --resume where this is a restart; notes the start."""
    again = started_before(logs)
    logs.mkdir(parents=True, exist_ok=True)
    _start_note(logs).write_text(agent_key())
    return [*words, "--resume"] if again and "--resume" not in words else words


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
    words = sys.argv[1:]
    if folder := os.environ.get(LOG_DIR_VARIABLE):
        log_to_file(Path(folder), int(os.environ.get("RANK", "0")))
        words = with_resume(words, Path(folder))
    module, sys.argv = words[0], words
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
