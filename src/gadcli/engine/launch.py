"""Starts a run's workers, passes signals on, notices dead and frozen ones, and leaves no process behind. No torch.

The parent calls `start`, then `poll` about ten times a second until it is false, then `close` for the outcome.
Workers live in sessions of their own, so that a Ctrl-C reaches them through the parent only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from gadcli.engine import environment, guard, lifetime
from gadcli.engine.liveness import Liveness
from gadcli.engine.outcome import RESUME_HINT, Lost, Outcome, RankEnd, StopRequest, judge, oom_kills, read_record
from gadcli.errors import ExitCode

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
        self.lost: Lost | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._oom_before = oom_kills()
        self._liveness = Liveness(spec.run_dir, spec.timeout_s)
        self._kill_at: float | None = None
        self._dumped = False

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
        if self.spec.nnodes > 1:
            del env[lifetime.PARENT_VARIABLE]  # the workers' parent will be torch's launcher
            self.workers.append(Worker(self.spec.node_rank * self.spec.nproc, self._start_agent(env)))
            return
        env |= {"MASTER_ADDR": environment.LOOPBACK, "MASTER_PORT": str(environment.free_port())}
        for rank in range(self.spec.nproc):
            own = environment.rank_env(env, rank, self.spec.nproc, rank, self.spec.nproc)
            words = ["-m", "gadcli.engine.lifetime", self.spec.worker_module, *self.spec.worker_args]
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
        env = {name: value for name, value in env.items() if name not in environment.RANK_VARIABLES}
        env[lifetime.LOG_DIR_VARIABLE] = str(spec.logs)
        words = [
            "-m", "torch.distributed.run", f"--nnodes={spec.nnodes}", f"--nproc-per-node={spec.nproc}",
            f"--node-rank={spec.node_rank}", "--rdzv-backend=c10d", f"--rdzv-endpoint={spec.rdzv_endpoint}",
            f"--rdzv-id={spec.run_dir.name}", f"--max-restarts={spec.max_restarts}",
            "-m", "gadcli.engine.lifetime", spec.worker_module, *spec.worker_args,
        ]  # fmt: skip
        return self._spawn(words, env, spec.logs / f"node_{spec.node_rank}.log")

    def _spawn(self, words: list[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        file: IO[bytes]
        with log.open("ab") as file:
            file.write(f"--- started {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n".encode())
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
        self.lost = self._liveness.check({worker.rank: worker.process.pid for worker in alive})
        if self.lost is not None:
            self._kill_at = time.monotonic()

    def _kill(self, alive: list[Worker]) -> None:
        """SIGKILL what is left; first ask for stacks, so that the log says where each rank stood."""
        if not self._dumped:
            self._dumped = True
            stopped = [worker.rank for worker in alive if guard.process_state(worker.process.pid) in ("T", "t")]
            if stopped and self.lost is None:  # its peers ran into their time limit before we did
                self.lost = Lost(stopped[0], f"rank {stopped[0]} is stopped (SIGSTOP or a debugger), its peers gave up")
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
        self._release_guard()
        if self.spec.nnodes > 1:
            ends = self._ends_behind_agent()
        else:
            ends = [worker.end for worker in self.workers if worker.end is not None]
        return judge(ends, self.spec.logs, self.stop, self.lost, oom_kills() > self._oom_before)

    def _ends_behind_agent(self) -> list[RankEnd]:
        """Behind torch's launcher the workers' records tell the ends; its own status only when there are none."""
        ends = []
        for path in sorted(self.spec.logs.glob("rank_*.exit.json")):
            record = read_record(path)
            if record is not None:
                rank = int(path.name.removeprefix("rank_").removesuffix(".exit.json"))
                ends.append(RankEnd(rank, record["code"], path.stat().st_mtime, record=record))
        agent = self.workers[0].end
        if agent is not None and not ends:
            return [agent]
        if agent is not None and agent.failed and not any(end.failed for end in ends):
            # torch's launcher ends with 1 when a worker was killed, or with 143 when it was told to stop.
            code = int(ExitCode.PEERS)
            record = {"code": code, "message": "a rank was lost", "hint": RESUME_HINT}
            if not self.stop.number:
                ends.append(RankEnd(agent.rank, code, agent.when, agent.ours, record))
        return ends

    def _release_guard(self) -> None:
        if self._guard is None or self._guard.stdin is None:
            return
        with self._guard.stdin as pipe:
            pipe.write(guard.RELEASE)
        self._guard.wait()
        self._guard = None


def children_of(pid: int) -> list[int]:
    """Direct children of a process (Linux)."""
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        children.extend(int(word) for word in path.read_text().split())
    return children
