"""Breaks whole runs at random moments and resumes them: the disk fills up, or a process is killed.

    python tests/checkpoint/fault_loop.py FOLDER disk|kill [CASES] [SEED]      (make test-disk, make test-kill-run)

A run is `gad train gad` on a tiny model, parent and workers, one process and two in turn, saving at every step. First
it runs undisturbed. Then, in each case,
  disk  from the N-th call of every thread on (or at the N-th alone) strace gives ENOSPC to write, fsync, mkdir or
        rename; the exit code must be 6, or 0 where the fault came after the work;
  kill  SIGKILL meets the parent (nothing it started may live 10 s later) or a rank (exit code 7).
What is left must be sound: no traceback on the terminal, no process, every folder called global_step_N verifies, none
that the records call saved is gone. Then the run is resumed without a fault, and its weights and moments (sha256 of all
shards), its records and its TensorBoard floats must equal those of the undisturbed run.
Prints one line a case and one JSON line of counts.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gadcli.checkpoint.manifest import latest_valid, list_checkpoints, step_of, verify
from gadcli.errors import CheckpointError
from train.training import SMALL, environment, manifest_hashes, steps, write_inputs

STEPS = 4
# System calls that fail together: what a full disk can refuse.
CALLS = {
    "write": "write,pwrite64,writev,pwritev,pwritev2",
    "fsync": "fsync,fdatasync",
    "mkdir": "mkdir,mkdirat",
    "rename": "rename,renameat,renameat2",
}
VOLATILE = ("timing_s/", "perf/", "rollout/tokens_per_s")
TIMEOUT_S = 240
GONE_WITHIN_S = 10.0


def strace(log: Path, calls: str, when: str = "") -> list[str]:
    """The words before a command: trace `calls` of all its processes and, with `when`, let them fail."""
    inject = ["-e", f"inject={calls}:error=ENOSPC:when={when}"] if when else []
    return ["strace", "-f", "--seccomp-bpf", "-qq", "-o", str(log), "-e", "signal=none", "-e", f"trace={calls}",
            *inject, "--"]  # fmt: skip


def why_no_strace() -> str:
    """Why faults cannot be injected here; empty where they can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    probe = [*strace(Path(os.devnull), CALLS["mkdir"], "1"), "mkdir", "/tmp/never-made"]
    said = subprocess.run(probe, capture_output=True, text=True, check=False).stderr
    return "" if "No space left" in said else f"strace may not inject here: {said.strip()[:200]}"


@dataclass
class Case:
    """One fault and what came of it."""

    number: int
    world: int
    fault: str  # for people
    code: int = -1
    resumed: int = -1
    met: str = ""  # what the fault met, for people
    wrong: list[str] = field(default_factory=list)


class Place:
    """A folder with inputs and one run a case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = write_inputs(folder / "inputs")

    def start(self, where: Path, world: int, before: list[str], *more: str) -> subprocess.Popen[str]:
        where.mkdir(exist_ok=True)
        paths = [f"actor.model.path={self.inputs / 'model'}", f"data.train_files=[{self.inputs / 'train.parquet'}]",
                 f"data.val_files=[{self.inputs / 'val.parquet'}]"]  # fmt: skip
        settings = [f"trainer.total_steps={STEPS}", "trainer.critic_warmup=1", "trainer.test_freq=2",
                    "trainer.save_freq=1", "trainer.logger=[console,tensorboard]", "trainer.device=cpu",
                    "trainer.tensorboard.auto_start=never"]  # fmt: skip
        gad = [sys.executable, "-m", "gadcli", "train", "gad", "--preset", "demo", "--nproc", str(world)]
        words = [*before, *gad, "--exp-name", "e", *SMALL, *paths, *settings, *more]
        return subprocess.Popen(words, cwd=where, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)  # fmt: skip

    def train(self, where: Path, world: int, before: list[str], *more: str) -> tuple[int, str]:
        """Exit code and what was printed; 124 where it did not end by itself."""
        return end_of(self.start(where, world, before, *more))


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said = "".join(process.communicate(timeout=TIMEOUT_S))
    except subprocess.TimeoutExpired:
        process.kill()
        return 124, "".join(process.communicate(timeout=60))
    return process.returncode, said


def living(where: Path) -> list[str]:
    """Command lines of the processes that work in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")).is_relative_to(where):
                found.append(entry.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it ended, or is a zombie
            continue
    return found


def floats_of(run_dir: Path) -> dict[tuple[str, int], float]:
    """Every scalar that TensorBoard shows of a run, without those that depend on the clock."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(VOLATILE)]
    return {(tag, event.step): event.value for tag in tags for event in events.Scalars(tag)}


def told_saves(run_dir: Path) -> set[int]:
    """Steps that the run's records say are saved."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return set()
    told = set()
    for line in lines:
        if '"kind":"save"' in line and line.endswith("}"):  # a kill may tear the last one
            told.add(int(json.loads(line)["step"]))
    return told


def look_at_what_is_left(case: Case, run_dir: Path) -> None:
    """What must hold after the fault, before anything is mended."""
    if not run_dir.exists():
        return
    for path in run_dir.iterdir():
        if step_of(path) is not None:
            try:
                verify(path)
            except CheckpointError as error:
                case.wrong.append(f"{path.name} looks committed and is not: {error.message}")
    kept = [step_of(path) or 0 for path in list_checkpoints(run_dir)]
    told = told_saves(run_dir)
    if told and max(told) not in kept:
        case.wrong.append(f"saved {sorted(told)}, kept {kept}")
    chosen = latest_valid(run_dir, lambda _: None)
    if (step_of(chosen) if chosen else None) != max(kept, default=None):
        case.wrong.append(f"kept {kept}, would resume from {chosen}")


def fill_disk(case: Case, place: Place, rng: random.Random, most: dict[str, int]) -> None:
    """A run whose disk is full from some call on."""
    kind = rng.choice(("write", "write", "write", *CALLS))
    when = f"{rng.randint(1, most[kind])}{rng.choice(('+', '+', ''))}"
    where, log = place.folder / f"case{case.number}", place.folder / f"case{case.number}.strace"
    case.fault = f"{kind} {when}"
    case.code, said = place.train(where, case.world, strace(log, CALLS[kind], when))
    case.met = f"{log.read_text().count('(INJECTED)')} calls"
    if case.code not in (0, 6):
        case.wrong.append(f"exit code {case.code}: {said.strip()[-300:]}")
    if "Traceback" in said:
        case.wrong.append("a traceback on the terminal")
    if alive := living(where):
        case.wrong.append(f"still alive: {alive}")


def kill_one(case: Case, place: Place, rng: random.Random, seconds: float) -> None:
    """A run of which one process is killed."""
    where = place.folder / f"case{case.number}"
    victim = rng.choice(("parent", *(f"rank {rank}" for rank in range(case.world))))
    after = rng.uniform(0.3, 1.0) * seconds
    case.fault = f"{victim} after {after:.1f} s"
    process = place.start(where, case.world, [])
    time.sleep(after)
    pid = process.pid if victim == "parent" else pid_of_rank(where, int(victim[5:]), case.world)
    case.met = phase_of(where / "runs" / "e")
    hit = pid is not None and process.poll() is None
    if hit:
        os.kill(pid, signal.SIGKILL)
    case.met += "" if hit else ", nobody: it had ended or had not begun"
    case.code, said = end_of(process)
    expected = [-9] if victim == "parent" else [7]
    if not hit or case.met.startswith(
        ("end", f"save {STEPS}")
    ):  # a rank may die after its record says that all is done
        expected.append(0)
    if case.code not in expected:
        case.wrong.append(f"exit code {case.code}, not {expected}: {said.strip()[-300:]}")
    if "Traceback" in said and victim == "parent":
        case.wrong.append("a traceback on the terminal")
    deadline = time.monotonic() + GONE_WITHIN_S
    while (alive := living(where)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if alive:
        case.wrong.append(f"still alive: {alive}")


def pid_of_rank(where: Path, rank: int, world: int) -> int | None:
    """The worker of that rank, found by its folder and its environment (a world of one gives it no RANK)."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")).is_relative_to(where):
                words = entry.joinpath("cmdline").read_bytes()
                variables = entry.joinpath("environ").read_bytes().split(b"\0")
                if b"gadcli.train.worker" in words and (world == 1 or f"RANK={rank}".encode() in variables):
                    return int(entry.name)
        except OSError:
            continue
    return None


def phase_of(run_dir: Path) -> str:
    """What a run says it is doing, and whether a checkpoint is half written or half deleted."""
    try:
        status = json.loads((run_dir / "status.json").read_text())
    except (OSError, ValueError):
        return "loading"
    parts = sorted(path.name for path in run_dir.iterdir() if path.name.startswith("global_step_") and path.suffix)
    return " ".join([f"{status['phase']} {status['step']}", *parts])


def differences(run_dir: Path, whole: Path) -> list[str]:
    """In what a resumed run is not the whole one."""
    pairs = {
        "weights and moments": (manifest_hashes(run_dir, STEPS), manifest_hashes(whole, STEPS)),
        "records": (steps(run_dir), steps(whole)),
        "TensorBoard": (floats_of(run_dir), floats_of(whole)),
    }
    return [name for name, (ours, theirs) in pairs.items() if ours != theirs]


def resume(case: Case, place: Place, whole: Path) -> None:
    """Go on without a fault; what comes out must be the whole run."""
    where = place.folder / f"case{case.number}"
    run_dir = where / "runs" / "e"
    again = "--resume" if (run_dir / "config.yaml").exists() else "--force"
    case.resumed, said = place.train(where, case.world, [], again)
    if case.resumed:
        case.wrong.append(f"resuming ended with {case.resumed}: {said.strip()[-300:]}")
    elif different := differences(run_dir, whole):
        case.wrong.append(f"after resuming other than the whole run: {', '.join(different)}")
    if not case.wrong:
        shutil.rmtree(where)


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: its folder, its seconds, and the most calls of each kind that any of its threads made."""

    run_dir: Path
    seconds: float
    most: dict[str, int]


def undisturbed(place: Place, world: int, kind: str) -> Whole:
    where, log = place.folder / f"whole{world}", place.folder / f"whole{world}.strace"
    began = time.monotonic()
    code, said = place.train(where, world, strace(log, ",".join(CALLS.values())) if kind == "disk" else [])
    seconds = time.monotonic() - began
    assert code == 0, said[-2000:]
    lines = log.read_text().splitlines() if kind == "disk" else []
    most = {}
    for name, calls in CALLS.items():
        one = re.compile(rf"(\d+) +(?:{calls.replace(',', '|')})\(")
        most[name] = max(Counter(m[1] for line in lines if (m := one.match(line))).values(), default=1)
    return Whole(where / "runs" / "e", seconds, most)


def main(folder: str, kind: str, cases: int, seed: int, worlds: tuple[int, ...] = (1, 2)) -> int:
    """All cases; returns how many went wrong."""
    if kind == "disk" and (reason := why_no_strace()):
        print(f"skipped: {reason}")
        return 0
    rng = random.Random(seed)
    place = Place(Path(folder).resolve())
    wholes = {world: undisturbed(place, world, kind) for world in worlds}
    counts: Counter[str] = Counter()
    for number in range(cases):
        began = time.monotonic()
        case = Case(number, worlds[number % len(worlds)], "")
        whole = wholes[case.world]
        if kind == "disk":
            fill_disk(case, place, rng, whole.most)
        else:
            kill_one(case, place, rng, whole.seconds)
        look_at_what_is_left(case, place.folder / f"case{number}" / "runs" / "e")
        resume(case, place, whole.run_dir)
        counts.update({"cases": 1, "wrong": int(bool(case.wrong)), f"exit {case.code}": 1})
        print(f"{number:3} x{case.world} {case.fault}: met {case.met}; exit {case.code}, resumed {case.resumed}, "
              f"{time.monotonic() - began:.0f} s: {'; '.join(case.wrong) or 'well'}", flush=True)  # fmt: skip
    print(json.dumps(counts))
    return counts["wrong"]


if __name__ == "__main__":
    arguments = sys.argv[1:]
    failed = main(arguments[0], arguments[1], int((arguments[2:3] or ["25"])[0]), int((arguments[3:4] or ["0"])[0]))
    sys.exit(1 if failed else 0)
