"""How a run ended: the exit codes, records and logs of its workers made into one code and one message. No torch."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gadcli.errors import ExitCode

RESUME_HINT = "--resume goes on from the last checkpoint"
TAIL_LINES = 12
TAIL_BYTES = 32_768
# Where the kernel counts the processes it killed for want of memory: machine-wide, then cgroup v2 and v1.
OOM_COUNTERS = (
    "/proc/vmstat",
    "/sys/fs/cgroup/memory.events",
    "/sys/fs/cgroup/memory/memory.oom_control",
)


@dataclass(frozen=True)
class RankEnd:
    """One worker's end. `status` is the process's: >= 0 an exit code, < 0 the signal that killed it.

    `when` is a monotonic time; `ours` is true where the parent itself had killed it; `record` is its exit.json.
    """

    rank: int
    status: int
    when: float
    ours: bool = False
    record: dict[str, Any] | None = None

    @property
    def code(self) -> int:
        """The documented exit code. What a worker recorded counts more than how its process then went:
        native libraries sometimes abort at exit, after the work is done."""
        if self.record is not None:
            return int(self.record["code"])
        if self.status < 0:
            return int(ExitCode.PEERS)
        return self.status if self.status in set(ExitCode) else int(ExitCode.BUG)

    @property
    def failed(self) -> bool:
        return self.code not in (ExitCode.OK, ExitCode.INTERRUPTED, ExitCode.TERMINATED)


@dataclass(frozen=True)
class Outcome:
    """A run's end: exit code, what to say, what to do next, and the failing rank's last log lines."""

    code: int
    message: str = ""
    hint: str = ""
    rank: int | None = None
    log: Path | None = None
    tail: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Lost:
    """A rank the parent gave up on, and why."""

    rank: int
    message: str


@dataclass(frozen=True)
class StopRequest:
    """What the user asked for: the signal that was passed on, and whether a second one cut it short."""

    number: int = 0
    forced: bool = False

    @property
    def code(self) -> int:
        return int(ExitCode.INTERRUPTED if self.number == signal.SIGINT else ExitCode.TERMINATED)


def read_record(path: Path) -> dict[str, Any] | None:
    """A worker's exit.json, or None where it left none (or a torn one)."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("code"), int) else None


def oom_kills(counters: Sequence[str] = OOM_COUNTERS) -> int:
    """How many processes the kernel has killed for memory so far, summed over the counters that can be read."""
    total = 0
    for path in counters:
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return total


def log_tail(path: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log, without the empty ones; reads its end only."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def culprit(ends: Sequence[RankEnd]) -> RankEnd | None:
    """The rank that failed first for a reason of its own: one whose peers vanished (7) is a consequence, as is one
    that we killed."""
    failed = [end for end in ends if end.failed]
    return min(
        failed,
        key=lambda end: (end.ours, end.code == ExitCode.PEERS and end.record is not None, end.when),
        default=None,
    )


def judge(
    ends: Sequence[RankEnd], logs: Path, stop: StopRequest, lost: Lost | None = None, oom: bool = False
) -> Outcome:
    """One outcome from all workers' ends.

    `lost` is the rank the parent gave up on (frozen); `oom` whether the kernel killed for memory meanwhile.
    """
    if stop.forced:
        return Outcome(stop.code, "stopped at once, nothing more was saved", RESUME_HINT)
    first = culprit(ends)
    if lost is not None and (first is None or first.ours or first.code == ExitCode.PEERS):
        log = logs / f"rank_{lost.rank}.log"
        hint = f"{RESUME_HINT}; the stacks are in {log}"
        return Outcome(ExitCode.PEERS, lost.message, hint, lost.rank, log, log_tail(log))
    if first is None:
        interrupted = [end for end in ends if end.code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED)]
        if interrupted:
            return _from_record(interrupted[0], logs)
        return Outcome(ExitCode.OK)
    if stop.number and first.record is None and -first.status in (stop.number, signal.SIGINT, signal.SIGTERM):
        return Outcome(stop.code, "stopped before training began, nothing to save")
    return _failure(first, logs, oom)


def _from_record(end: RankEnd, logs: Path) -> Outcome:
    record = end.record or {}
    return Outcome(
        end.code, str(record.get("message", "")), str(record.get("hint") or ""), end.rank, logs / f"rank_{end.rank}.log"
    )


def _failure(end: RankEnd, logs: Path, oom: bool) -> Outcome:
    """The outcome of a rank that failed: its own words where it left some, else what its process's status says."""
    log = logs / f"rank_{end.rank}.log"
    tail = log_tail(log)
    if end.record is not None:
        said = _from_record(end, logs)
        hint = said.hint
        if end.code == ExitCode.BUG and not hint:
            hint = f"this is a bug of gad; the traceback is in {log}"
        return Outcome(end.code, said.message or f"rank {end.rank} failed", hint, end.rank, log, tail)
    if end.status < 0:
        name = signal.Signals(-end.status).name
        if -end.status == signal.SIGKILL and oom:
            return Outcome(
                ExitCode.RESOURCES,
                f"rank {end.rank} was killed by the kernel: the machine ran out of memory",
                "rollout.max_num_seqs, rollout.kv_cache_gb, actor.micro_batch_tokens or LoRA take less; then --resume",
                end.rank,
                log,
                tail,
            )
        return Outcome(
            ExitCode.PEERS,
            f"rank {end.rank} was killed by {name}; the others were stopped",
            RESUME_HINT,
            end.rank,
            log,
            tail,
        )
    if end.status == ExitCode.RESOURCES:
        message = f"rank {end.rank} ran out of disk or memory, and had no room left to say which"
        return Outcome(end.code, message, f"df {logs}; then {RESUME_HINT}", end.rank, log, tail)
    return Outcome(
        end.code,
        f"rank {end.rank} ended with code {end.status} and left no word",
        f"this is a bug of gad; its log is {log}",
        end.rank,
        log,
        tail,
    )
