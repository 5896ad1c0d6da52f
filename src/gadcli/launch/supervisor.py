"""Starts a run's workers, passes signals on, notices dead and frozen ones, and leaves no process behind. No torch.

The parent calls `start`, then `poll` about ten times a second until it is false, then `close` for the outcome.
Workers live in sessions of their own, so that a Ctrl-C reaches them through the parent only.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from gadcli.distributed.worker_end import read_record
from gadcli.errors import ExitCode
from gadcli.launch import environment, guard, lifetime
from gadcli.launch.liveness import Liveness
from gadcli.launch.outcome import RESUME_HINT, STARTED, LostRank, Outcome, RankEnd, StopRequest, judge, oom_kills
from gadcli.launch.started_by import RANK_NAMES

PEER_GRACE_S = 4.0  # for the others to leave by themselves after one was killed: 7 must be out within 10 s
RECORD_GRACE_S = 10.0  # the same after one that could still write its record
STACK_DUMP_S = 0.5
WORKER_MODULE = "gadcli.train.worker"


@dataclass(frozen=True)
class LaunchSpec:
    """What to start: `nproc` workers on each of `nnodes` machines; `timeout_s` without a sign of life is lost."""

    run_dir: Path
    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str = ""
    resume: bool = False
    timeout_s: float = 600.0
    max_restarts: int = 0
    worker_module: str = WORKER_MODULE
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        return self.run_dir / "logs"

    @property
    def worker_args(self) -> list[str]:
        return ["--run-dir", str(self.run_dir), *(["--resume"] if self.resume else [])]


@dataclass
class Worker:
    """A started process and, once it has ended, how."""

    rank: int
    process: subprocess.Popen[bytes]
    ours: bool = False  # the parent killed it
    end: RankEnd | None = None


class Supervisor:
    """One launch of a run's workers on this machine."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.spec = spec
        self.mark = uuid.uuid4().hex
        self.workers: list[Worker] = []
        self.stop = StopRequest()
        self.lost: LostRank | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._oom_before = oom_kills()
        self._liveness = Liveness(spec.run_dir, spec.timeout_s)
        self._kill_at: float | None = None
        self._dumped = False
        self._store = Path(tempfile.gettempdir()) / f"gad-store-{self.mark}"
        self._nodes = NodeBoard(spec) if spec.nnodes > 1 else None
        self._other_node: int | None = None  # another machine that gave up first

    @property
    def tie(self) -> dict[str, str]:
        """Variables that make a process one of this launch: it dies with us, and the guard finds it."""
        return {guard.MARK_VARIABLE: self.mark, lifetime.PARENT_VARIABLE: str(os.getpid())}

    # -- starting ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the guard and the workers. Call it from the main thread: workers die with the thread that made them."""
        self.spec.logs.mkdir(parents=True, exist_ok=True)
        for stale in self.spec.logs.glob("rank_*.exit.json"):
            stale.unlink()
        self._start_guard()
        env = environment.base_env(self.spec.nproc, one_node=self.spec.nnodes == 1)
        env |= {**self.spec.env, **self.tie}
        if self._nodes is not None:
            self._nodes.begin()
            del env[lifetime.PARENT_VARIABLE]  # the workers' parent will be torch's launcher
            self.workers.append(Worker(self.spec.node_rank * self.spec.nproc, self._start_agent(env)))
            return
        env[environment.STORE_VARIABLE] = str(self._store)
        env |= {"MASTER_ADDR": environment.LOOPBACK, "MASTER_PORT": str(environment.free_port())}
        for rank in range(self.spec.nproc):
            own = environment.rank_env(env, rank, self.spec.nproc, rank, self.spec.nproc)
            words = ["-m", "gadcli.launch.lifetime", self.spec.worker_module, *self.spec.worker_args]
            self.workers.append(Worker(rank, self._spawn(words, own, self.spec.logs / f"rank_{rank}.log")))

    def _start_guard(self) -> None:
        env = {name: value for name, value in os.environ.items() if name != guard.MARK_VARIABLE}
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, self.mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=env,
        )

    def _start_agent(self, env: dict[str, str]) -> subprocess.Popen[bytes]:
        """torch's own elastic launcher, for a world of several machines; each rank opens its own log file."""
        spec = self.spec
        env = {name: value for name, value in env.items() if name not in RANK_NAMES}
        env[lifetime.LOG_DIR_VARIABLE] = str(spec.logs)
        # Not left to torch, which asks the machine's own name: that is 127.0.0.1 wherever /etc/hosts says so.
        address = environment.address_towards(spec.rdzv_endpoint)
        wait_s = max(1, round(spec.timeout_s))  # for the other machines to come
        env = environment.reached_at(address) | env
        words = [
            "-m", "torch.distributed.run", f"--nnodes={spec.nnodes}", f"--nproc-per-node={spec.nproc}",
            f"--node-rank={spec.node_rank}", "--rdzv-backend=c10d", f"--rdzv-endpoint={spec.rdzv_endpoint}",
            f"--rdzv-conf=is_host={str(spec.node_rank == 0).lower()},join_timeout={wait_s},read_timeout={wait_s}",
            *([f"--local-addr={address}"] if address else []),
            f"--rdzv-id={spec.run_dir.name}", f"--max-restarts={spec.max_restarts}",
            "-m", "gadcli.launch.lifetime", spec.worker_module, *spec.worker_args,
        ]  # fmt: skip
        return self._spawn(words, env, spec.logs / f"node_{spec.node_rank}.log")

    def _spawn(self, words: list[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        file: IO[bytes]
        with log.open("ab") as file:
            file.write(f"{STARTED} {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n".encode())
            file.flush()
            # -P: the folder the user stands in must not shadow our modules.
            return subprocess.Popen(
                [sys.executable, "-P", *words],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    # -- watching ------------------------------------------------------------------------------------------------

    def poll(self) -> bool:
        """Look after the workers once; false when all have ended."""
        for worker in self.workers:
            if worker.end is None and worker.process.poll() is not None:
                worker.end = self._end_of(worker)
                self._plan_kill(worker.end)
        alive = [worker for worker in self.workers if worker.end is None]
        if alive and self._kill_at is None:
            self._check_frozen(alive)
        if alive and self._kill_at is None and self._nodes is not None:
            self._other_node = self._nodes.failed_elsewhere()
            self._kill_at = time.monotonic() + PEER_GRACE_S if self._other_node is not None else None
        if alive and self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill(alive)
        return bool(alive)

    def _end_of(self, worker: Worker) -> RankEnd:
        record = read_record(self.spec.logs / f"rank_{worker.rank}.exit.json")
        return RankEnd(worker.rank, worker.process.returncode, time.monotonic(), worker.ours, record)

    def _plan_kill(self, end: RankEnd) -> None:
        """After one rank failed the others can only wait for it: give them a moment, then end them."""
        if not end.failed or self._kill_at is not None:
            return
        grace = RECORD_GRACE_S if end.record is not None and end.code != ExitCode.PEERS else PEER_GRACE_S
        self._kill_at = time.monotonic() + grace

    def _check_frozen(self, alive: list[Worker]) -> None:
        pids = {worker.rank: worker.process.pid for worker in alive}
        if self._nodes is not None:
            pids = {rank_of(pid): pid for pid in children_of(alive[0].process.pid)}
        self.lost = self._liveness.check(pids)
        if self.lost is not None:
            self._kill_at = time.monotonic()

    def _kill(self, alive: list[Worker]) -> None:
        """SIGKILL what is left; first ask for stacks, so that the log says where each rank stood."""
        if not self._dumped:
            self._dumped = True
            stopped = [worker.rank for worker in alive if guard.process_state(worker.process.pid) in ("T", "t")]
            if stopped and self.lost is None:  # its peers ran into their time limit before we did
                self.lost = LostRank(
                    stopped[0], f"rank {stopped[0]} is stopped (SIGSTOP or a debugger), its peers gave up"
                )
            for worker in alive:
                self._send(worker, lifetime.STACK_SIGNAL)
            self._kill_at = time.monotonic() + STACK_DUMP_S
            return
        for worker in alive:
            worker.ours = True
            self._send(worker, signal.SIGKILL, group=True)

    # -- signals -------------------------------------------------------------------------------------------------

    def request_stop(self, number: int) -> None:
        """First: pass the signal on, workers finish their step and save. Again: kill them now."""
        if self.stop.number:
            self.stop = StopRequest(self.stop.number, forced=True)
            for worker in self.workers:
                worker.ours = True
                self._send(worker, signal.SIGKILL, group=True)
            return
        self.stop = StopRequest(number)
        passed_on = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        for worker in self.workers:
            self._send(worker, passed_on)

    def request_save(self) -> None:
        """SIGUSR1: save after this step and go on."""
        for worker in self.workers:
            self._send(worker, signal.SIGUSR1)

    def _send(self, worker: Worker, number: int, group: bool = False) -> None:
        """To the rank itself (behind torch's launcher: to its children), or to its whole process group."""
        if worker.process.poll() is not None:
            return
        if group:
            os.killpg(worker.process.pid, number)
        elif self.spec.nnodes > 1:
            guard.kill_all(children_of(worker.process.pid), number)
        else:
            worker.process.send_signal(number)

    # -- ending --------------------------------------------------------------------------------------------------

    def close(self) -> Outcome:
        """Kill whatever is left, wait until nothing of this launch lives, and say how it ended. May be called twice."""
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.ours = True
                self._send(worker, signal.SIGKILL, group=True)
            worker.process.wait()
            if worker.end is None:
                worker.end = self._end_of(worker)
        guard.sweep(self.mark)
        self._store.unlink(missing_ok=True)
        self._release_guard()
        if self.spec.nnodes > 1:
            ends = self._ends_behind_agent()
        else:
            ends = [worker.end for worker in self.workers if worker.end is not None]
        outcome = judge(ends, self.spec.logs, self.stop, self.lost, oom_kills() > self._oom_before)
        if self._nodes is not None:
            self._nodes.end(outcome.code)
        return outcome

    def _ends_behind_agent(self) -> list[RankEnd]:
        """Behind torch's launcher the workers' records tell the ends. One that died without a record is in the
        launcher's log; where that names none, another machine's did, or the machines never met."""
        ends = []
        for path in sorted(self.spec.logs.glob("rank_*.exit.json")):
            record = read_record(path)
            if record is not None:
                rank = int(path.name.removeprefix("rank_").removesuffix(".exit.json"))
                ends.append(RankEnd(rank, record["code"], path.stat().st_mtime, record=record))
        agent = self.workers[0].end
        stopped = any(end.code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED) for end in ends)
        if agent is None or not agent.failed or stopped or any(end.failed for end in ends):
            return ends
        node, log = self.spec.node_rank, self.spec.logs / f"node_{self.spec.node_rank}.log"
        if lost := lost_rank(log):
            return [*ends, RankEnd(lost[0], lost[1], agent.when)]
        where = f"machine {self._other_node} lost" if self._other_node is not None else f"machine {node} has lost"
        message = f"{where} a process; the others were stopped"
        hint = f"{RESUME_HINT}; {log} has the launcher's output"
        said = log.read_text(errors="replace").rpartition(STARTED)[2]
        if "RendezvousTimeoutError" in said or "RendezvousConnectionError" in said:
            message = (
                f"{self.spec.nnodes} machines did not meet at {self.spec.rdzv_endpoint} "
                f"within {self.spec.timeout_s:.0f} s (fsdp.timeout_s)"
            )
            hint = f"start the same command on each, --node-rank 0 to {self.spec.nnodes - 1}; {log} says more"
        record = {"code": int(ExitCode.PEERS), "message": message, "hint": hint}
        return [*ends, RankEnd(node * self.spec.nproc, agent.status, agent.when, agent.ours, record)]

    def _release_guard(self) -> None:
        if self._guard is None or self._guard.stdin is None:
            return
        with self._guard.stdin as pipe:
            pipe.write(guard.RELEASE)
        self._guard.wait()
        self._guard = None


class NodeBoard:
    """How the parents of one run on several machines learn of each other's failure: files in the shared folder.

    Torch's launcher on one machine does not end when another's has failed, and a worker whose peer is gone may wait
    for its time limit. Times are the file system's, so clocks need not agree.
    """

    CHECK_EVERY_S = 1.0

    def __init__(self, spec: LaunchSpec) -> None:
        self._spec = spec
        self._began = 0.0
        self._checked = 0.0

    def _path(self, node: int) -> Path:
        return self._spec.logs / f"node_{node}.exit.json"

    def begin(self) -> None:
        """Take down what this machine's last launch had written."""
        own = self._path(self._spec.node_rank)
        own.write_text("{}")
        self._began = own.stat().st_mtime
        own.unlink()

    def end(self, code: int) -> None:
        """Tell the others how this machine's share ended."""
        self._path(self._spec.node_rank).write_text(json.dumps({"code": code}))

    def failed_elsewhere(self) -> int | None:
        """Another machine whose share failed since we began."""
        if time.monotonic() - self._checked < self.CHECK_EVERY_S:
            return None
        self._checked = time.monotonic()
        for node in range(self._spec.nnodes):
            record = read_record(self._path(node))
            if node == self._spec.node_rank or record is None or self._path(node).stat().st_mtime < self._began:
                continue
            if record["code"] not in (ExitCode.OK, ExitCode.INTERRUPTED, ExitCode.TERMINATED):
                return node
        return None


def rank_of(pid: int) -> int:
    """The RANK in a process's environment; -1 where it has none (any more)."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return -1
    return next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), -1)


def children_of(pid: int) -> list[int]:
    """Direct children of a process (Linux)."""
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        children.extend(int(word) for word in path.read_text().split())
    return children


def lost_rank(log: Path) -> tuple[int, int] | None:
    """(rank, exit status) of the first failure that torch's launcher reports in its log since its last start."""
    try:
        text = log.read_text(errors="replace").rpartition(STARTED)[2]
    except OSError:
        return None
    found = re.search(r"Root Cause.*?\brank\s*: (\d+) .*?exitcode\s*: (-?\d+)", text, re.DOTALL)
    return (int(found[1]), int(found[2])) if found else None
