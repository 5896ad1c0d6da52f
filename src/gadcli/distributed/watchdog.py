"""Ends a worker that makes no progress: after `timeout_s` without a beat it dumps every stack and leaves with code 7.

A beat is a new phase, a micro-batch, a step of the sampler. The parent watches processor time from outside, which a
rank that spins in a collective, or loops, still uses; this watches work done. Knows no torch.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gadcli.errors import ExitCode

# Phases that work without micro-batches, on files: bytes read and written are their progress.
FILE_PHASES = ("save", "load")


class Watchdog:
    """A daemon thread; until `start` it only keeps count. `on_hang(message)` leaves a record; then the process ends.

    Beats cost a clock reading: call `beat` as often as work is done, from any thread.
    """

    def __init__(self) -> None:
        self.phase, self.step = "load", 0
        self._beaten_at = time.monotonic()
        self._io = -1
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def enter(self, phase: str, step: int) -> None:
        """A new phase begins, which is progress."""
        self.phase, self.step = phase, step
        self.beat()

    def beat(self) -> None:
        """Some work was done."""
        self._beaten_at = time.monotonic()

    def start(self, timeout_s: float, on_hang: Callable[[str], None]) -> None:
        self.beat()
        self._thread = threading.Thread(target=self._watch, args=(timeout_s, on_hang), daemon=True, name="watchdog")
        self._thread.start()

    def stop(self) -> None:
        """From now on nothing is watched (closing down has its own time limits)."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, timeout_s: float, on_hang: Callable[[str], None]) -> None:
        interval = min(5.0, timeout_s / 10)
        woke_at = time.monotonic()
        while not self._stopped.wait(interval):
            now = time.monotonic()
            if now - woke_at > interval + timeout_s / 2:  # we ourselves slept (SIGSTOP, a laptop's lid)
                self.beat()
            woke_at = now
            if self.phase in FILE_PHASES and self._files_moved():
                self.beat()
            silent_s = now - self._beaten_at
            if silent_s > timeout_s:
                self._end(f"no progress for {silent_s:.0f} s in step {self.step}, phase {self.phase}", on_hang)

    def _end(self, message: str, on_hang: Callable[[str], None]) -> None:
        print(f"{message}; stacks of all threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        try:
            on_hang(message)
        finally:  # whatever the record met (a full disk): this process must not stay
            os._exit(int(ExitCode.PEERS))

    def _files_moved(self) -> bool:
        io = _bytes_moved()
        moved, self._io = io != self._io, io
        return moved


def _bytes_moved() -> int:
    """Bytes this process has read and written so far; 0 where the kernel does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    counts = {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
    # Not rchar: reading this very file counts there.
    return counts.get("wchar", 0) + counts.get("read_bytes", 0)


WATCHDOG = Watchdog()  # a process has one, as it has one main thread to watch
