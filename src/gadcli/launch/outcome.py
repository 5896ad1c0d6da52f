"""How a run ended: the exit codes, records and logs of its workers made into one code and one message. No torch."""

from __future__ import annotations

import functools
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gadcli.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExitCode,
    GadError,
    PeerError,
    ResourceError,
    UnhealthyError,
)

RESUME_HINT = "--resume goes on from the last checkpoint"
STARTED = "--- started"  # a log's line for each start
FATAL = "Fatal Python error"  # of faulthandler, when native code crashes
LINE_CHARS = 300
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
TAIL_LINES = 8
TAIL_BYTES = 32_768
# Where the kernel counts the processes it killed for want of memory: machine-wide, then cgroup v2 and v1.
OOM_COUNTERS = (
    "/proc/vmstat",
    "/sys/fs/cgroup/memory.events",
    "/sys/fs/cgroup/memory/memory.oom_control",
)
KINDS: dict[int, type[GadError]] = {
    kind.exit_code: kind for kind in (ConfigError, DataError, CheckpointError, UnhealthyError, ResourceError, PeerError)
}


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
        # A success or a stop that nobody has recorded is none: something else ended the process.
        recorded_only = (ExitCode.OK, ExitCode.INTERRUPTED, ExitCode.TERMINATED)
        return self.status if self.status in set(ExitCode) - set(recorded_only) else int(ExitCode.BUG)

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
class LostRank:
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


def last_words(path: Path, lines: int = TAIL_LINES) -> list[str]:
    """What a log says of its process's end: the last lines since its last start, without the empty ones.

    After a crash in native code these are the lines around Python's "Fatal Python error", whose own list of all threads
    and extension modules would hide them. Only the log's end is read; control characters are left out.
    """
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    text = text[text.rfind(STARTED) + 1 :].partition("\n")[2] if STARTED in text else text
    printable = ("".join(c for c in line if c.isprintable() or c == "\t") for line in text.splitlines())
    found = [line.rstrip()[:LINE_CHARS] for line in printable if line.strip()]
    fatal = next((i for i, line in enumerate(found) if line.startswith(FATAL)), None)
    if fatal is None:
        return found[-lines:]
    thread = next((i for i in range(fatal, len(found)) if found[i].startswith("Current thread")), fatal + 1)
    before = found[max(0, fatal - 3) : fatal + 1]
    return before + found[thread : thread + lines - len(before)]


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
    ends: Sequence[RankEnd], logs: Path, stop: StopRequest, lost: LostRank | None = None, oom: bool = False
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
        return Outcome(ExitCode.PEERS, lost.message, hint, lost.rank, log, last_words(log))
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
    tail = last_words(log)
    if end.record is not None:
        said = _from_record(end, logs)
        hint = said.hint
        if end.code == ExitCode.BUG and not hint:
            hint = f"this is a bug of gad; the traceback is in {log}"
        if end.code not in (ExitCode.BUG, ExitCode.PEERS):  # the message says it all
            tail = []
        return Outcome(end.code, said.message or f"rank {end.rank} failed", hint, end.rank, log, tail)
    told = functools.partial(Outcome, rank=end.rank, log=log, tail=tail or ["(the log is empty)"])
    if end.status < 0:
        if -end.status == signal.SIGKILL and oom:
            message = f"rank {end.rank} was killed by the kernel: the machine ran out of memory"
            less = "rollout.max_num_seqs, rollout.kv_cache_gb, actor.micro_batch_tokens or LoRA take less"
            return told(ExitCode.RESOURCES, message, f"{less}; then --resume")
        name = signal_name(-end.status)
        what = f"crashed in native code ({name})" if -end.status in CRASHES else f"was killed by {name}"
        hint = RESUME_HINT
        if -end.status == signal.SIGBUS:
            hint = f"often a full disk or /dev/shm (df {logs} /dev/shm); then {RESUME_HINT}"
        return told(ExitCode.PEERS, f"rank {end.rank} {what}; the others were stopped", hint)
    if end.status == ExitCode.RESOURCES:
        message = f"rank {end.rank} ran out of disk or memory, and had no room left to say which"
        return told(end.code, message, f"df {logs}; then {RESUME_HINT}")
    message = f"rank {end.rank} exited with code {end.status} without an error record"
    return told(end.code, message, f"something ended it from inside (os._exit, a library); its log is {log}")


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def as_error(outcome: Outcome) -> GadError:
    """The error that a failed outcome is for whoever called."""
    return KINDS.get(outcome.code, GadError)(outcome.message, outcome.hint or None)


def shown_tail(outcome: Outcome) -> list[str]:
    """The failing rank's last lines, for people."""
    head = [f"--- {outcome.log}"] if outcome.tail else []
    return head + [f"    {line}" for line in outcome.tail]
