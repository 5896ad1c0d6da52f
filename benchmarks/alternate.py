"""Compared trainers, whose runs alternate: one process each, a step at a time, so a busy machine slows all alike.

The parent starts every runner, lets each warm up once, then goes round. A turn is judged by the CPU seconds of the
runner's process (all its threads) and by its peak resident set (VmHWM), which includes its weights and optimiser.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gadcli.launch import environment

ROOT = Path(__file__).resolve().parents[1]
THREADS = "1"
OURS = ("gad", "lean", "update", "vllm", "hf")


class Turns:
    """A runner's side: `while turns.wait(): …; turns.done(figures)`. Whatever else prints goes to stderr."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.waiting = False

    def wait(self) -> bool:
        """True when it is our turn; False when there are no more."""
        self._say("ready")
        if not sys.stdin.readline():
            return False
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return True

    def done(self, **figures: float) -> None:
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        self._say(json.dumps({"cpu_s": cpu, "wall_s": wall, "peak_mb": peak / 1000, **figures}))

    def _say(self, text: str) -> None:
        print(text, file=self.out, flush=True)


class Runner:
    """The parent's side of one process."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])
        env = os.environ | {
            "OMP_NUM_THREADS": THREADS, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CONFIGURE_LOGGING": "0", "VLLM_NO_USAGE_STATS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        if name in OURS:  # as a run's workers are started, allocator and all, where the caller does not know better
            env = environment.engine_variables() | env
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, *command], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"),
            text=True,
        )  # fmt: skip

    def expect(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"{self.name} ended early:\n{self.log.read_text()[-3000:]}")
        return line

    def turn(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        figures: dict[str, float] = json.loads(self.expect())
        self.expect()  # ready again
        return figures

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def alternate(
    script: str, names: list[str], options: list[str], rounds: int, logs: Path
) -> dict[str, list[dict[str, Any]]]:
    """{name: figures of each round}; `script --runner NAME options…` is what each runs."""
    running: list[Runner] = []
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for name in names:  # one after another: loading is not part of the comparison, and memory is not unlimited
            running.append(Runner(name, [script, "--runner", name, *options], logs / f"{name}.log"))
            running[-1].expect()
            _say(f"{name}, warm-up", running[-1].turn())
        for number in range(rounds):
            for runner in running if number % 2 == 0 else reversed(running):
                found[runner.name].append(runner.turn())
                _say(runner.name, found[runner.name][-1])
    finally:
        for runner in running:
            runner.close()
    return found


def _say(who: str, figures: dict[str, float]) -> None:
    """Progress: a comparison of many minutes that is interrupted has shown what it had."""
    print(f"{who}: {json.dumps({k: round(v, 3) for k, v in figures.items()})}", file=sys.stderr, flush=True)


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """What the figures come from."""
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": int(THREADS), "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "trl") if find_spec(name)},
    }  # fmt: skip


def ratios(ours: list[float], peer: list[float]) -> dict[str, float]:
    """peer / ours of each round, both taken in the same round, so on an equally busy machine."""
    return spread([b / a for a, b in zip(ours, peer, strict=True)])


def print_table(title: str, unit: str, rows: dict[str, dict[str, float]]) -> None:
    width = max(len(name) for name in rows)
    print(f"{title}\n  {'':{width}} {'min':>9} {'median':>9} {'max':>9}  {unit}")
    for name, row in rows.items():
        print(f"  {name:{width}} {row['min']:9.2f} {row['median']:9.2f} {row['max']:9.2f}")


def write(out: Path | None, results: dict[str, Any]) -> None:
    """The figures as JSON at `out`."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
