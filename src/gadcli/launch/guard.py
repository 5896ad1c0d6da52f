"""Finds and kills every process of a run; as a script, waits beside the parent and does so when the parent is gone.

Standard library only and no import of ours: it runs as `python -I -S guard.py MARK` in a few megabytes. Its standard
input is a pipe whose other end only the parent holds, so that end of file means that the parent is gone, however
it went (SIGKILL included). A frozen worker cannot act on a death signal's handler; a guard from outside can kill it.

A process belongs to a run when its initial environment holds `GAD_RUN_MARK=<mark>`: children inherit it, also
those that left the session or whose parent died first.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable

MARK_VARIABLE = "GAD_RUN_MARK"
RELEASE = b"done"  # the parent's word that nothing is left to do


def marked_processes(mark: str, proc: str = "/proc") -> list[int]:
    """Pids of living processes (no zombies) that carry the mark; empty where there is no /proc."""
    if not os.path.isdir(proc):
        return []
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    found = []
    for name in os.listdir(proc):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"{proc}/{name}/environ", "rb") as file:
                variables = file.read().split(b"\0")
        except OSError:  # it ended meanwhile, or is another user's
            continue
        if wanted in variables and not is_zombie(int(name), proc):
            found.append(int(name))
    return found


def is_zombie(pid: int, proc: str = "/proc") -> bool:
    """Whether a process has ended and only waits to be reaped (or is gone altogether)."""
    return process_state(pid, proc) in ("Z", "X", "")


def process_state(pid: int, proc: str = "/proc") -> str:
    """The kernel's letter for a process: R, S, D, T (stopped), Z (ended); "" where it is gone."""
    try:
        with open(f"{proc}/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def kill_all(pids: Iterable[int], number: int = signal.SIGKILL) -> None:
    """Send a signal to processes that may be gone already."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def sweep(mark: str, wait_s: float = 5.0) -> list[int]:
    """Kill what carries the mark until nothing does (or `wait_s` is over); returns the pids that were killed."""
    killed: list[int] = []
    deadline = time.monotonic() + wait_s
    while alive := marked_processes(mark):
        kill_all(alive)
        killed.extend(pid for pid in alive if pid not in killed)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return killed


def main() -> None:
    mark = sys.argv[1]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    said = b""
    while piece := os.read(0, 64):
        said += piece
    if RELEASE not in said:
        sweep(mark)


if __name__ == "__main__":
    main()
