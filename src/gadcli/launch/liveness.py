"""Tells a frozen worker from one that is merely busy: signs of life are processor time and the run's own files."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from gadcli.launch.guard import process_state
from gadcli.launch.outcome import LostRank
from gadcli.metrics.runlog import METRICS_FILE, STATUS_FILE, read_status

CHECK_EVERY_S = 0.5
# What rank 0 writes as it works: the heartbeat and the records.
PULSE_FILES = (STATUS_FILE, METRICS_FILE)


@dataclass
class Pulse:
    """A rank's last sign of life."""

    ticks: int = -1
    seen_at: float = field(default_factory=time.monotonic)


class Liveness:
    """Watches ranks; one is lost after `timeout_s` without a sign of life.

    A rank that waits for its peers uses no processor time either, but then the peers' work shows in the run's files,
    or the process group's own timeout ends the wait. A rank that is stopped (SIGSTOP, a debugger) shows nothing by
    itself: the others' heartbeat does not count for it.
    """

    def __init__(self, run_dir: Path, timeout_s: float) -> None:
        self.run_dir = run_dir
        self.timeout_s = timeout_s
        self._pulses: dict[int, Pulse] = {}
        self._files: tuple[float, ...] = ()
        self._checked_at = 0.0

    def check(self, pids: dict[int, int]) -> LostRank | None:
        """None while all is well, else the lost rank, with where it stands and since when."""
        now = time.monotonic()
        if now - self._checked_at < CHECK_EVERY_S:
            return None
        if now - self._checked_at > 20 * CHECK_EVERY_S:  # we ourselves slept (Ctrl-Z, a laptop's lid): start afresh
            self._pulses.clear()
        self._checked_at = now
        files_moved = self._files_moved()
        for rank, pid in pids.items():
            pulse = self._pulses.setdefault(rank, Pulse())
            stopped = process_state(pid) in ("T", "t")
            ticks = processor_ticks(pid)
            if (ticks != pulse.ticks or files_moved) and not stopped:
                pulse.seen_at = now
            pulse.ticks = ticks
            silent_s = now - pulse.seen_at
            if silent_s > self.timeout_s:
                what = "is stopped (SIGSTOP or a debugger)" if stopped else "shows no sign of life"
                return LostRank(rank, f"rank {rank} {what} for {silent_s:.0f} s{self._where()}; the run was ended")
        return None

    def _files_moved(self) -> bool:
        times = tuple(_mtime(self.run_dir / name) for name in PULSE_FILES)
        moved = times != self._files
        self._files = times
        return moved

    def _where(self) -> str:
        status = read_status(self.run_dir)
        return f" in step {status.step}, {status.phase}" if status is not None else ""


def processor_ticks(pid: int) -> int:
    """User and system time a process has used, in clock ticks; -1 where the kernel does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return int(fields[11]) + int(fields[12])


def _mtime(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0
