"""What scaling out and surviving cost, on the demo's student (SmolLM2-135M) and settings, CPU.

start   seconds from the command to the first recorded step, for each of the three stages (`gad train …`)
commit  seconds a save takes and training stands still for it, against a step, at trainer.save_freq=10
weak    update steps at 1 and at 2 ranks, one thread each, the same prompts a rank: t1 / t2 (1 is perfect)

Run: python benchmarks/scale.py [start] [commit] [weak] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from gadcli.checkpoint.embedded_model import ensure_demo_model
from gadcli.launch.supervisor import children_of

SAVE_FREQ = 10


class Bench:
    """A folder with the demo's data, and stages run in it as a user would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = str(ensure_demo_model())
        subprocess.run([sys.executable, "-m", "gadcli.demo.docstring_data", str(folder / "data")], check=True)

    def train(self, stage: str, name: str, *words: str) -> tuple[float, float, list[dict[str, Any]]]:
        """Run a stage; returns when it began (wall clock), the processor seconds of all its processes until the first
        step began, and its records."""
        command = [sys.executable, "-m", "gadcli", "train", stage, "--preset", "demo", "--output-dir", str(self.folder),
                   "--exp-name", name, "--quiet", f"data.train_files=[{self.folder / 'data/train.parquet'}]",
                   "trainer.logger=[console]", *words]  # fmt: skip
        began = time.time()
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        log, seconds = self.folder / name / "metrics.jsonl", 0.0
        while process.poll() is None and not (log.exists() and '"type":"run"' in log.read_text()):
            seconds = max(seconds, processor_seconds(process.pid))
            time.sleep(0.1)
        if process.wait():
            sys.exit(f"{stage} ended with {process.returncode}")
        return began, seconds, [json.loads(line) for line in log.read_text().splitlines()]


def processor_seconds(pid: int) -> float:
    """Of a process, all that it started, and all of those that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(map(processor_seconds, children_of(pid)))


def step_seconds(records: list[dict[str, Any]]) -> list[float]:
    return [r["metrics"]["timing_s/step"] for r in records if r["type"] == "step"]


def start(bench: Bench) -> dict[str, Any]:
    """Load, build and one step of each stage; the step itself is not counted."""
    found = {}
    student, critic = bench.model, ""
    for stage in ("seqkd", "warmup", "gad"):
        words = [f"actor.model.path={student}", "trainer.total_steps=1", "data.val_rows=0"]
        words += [f"critic.model.path={critic}"] if critic else []
        words += ["trainer.critic_warmup=1"] if stage == "warmup" else []
        began, cpu, records = bench.train(stage, f"start-{stage}", *words)
        first = next(r for r in records if r["type"] == "step")
        found[stage] = {"to_first_step_s": first["time"] - step_seconds(records)[0] - began, "cpu_s": cpu,
                        "load_s": next(r for r in records if r["type"] == "run")["load_seconds"],
                        "first_step_s": step_seconds(records)[0]}  # fmt: skip
        checkpoint = bench.folder / f"start-{stage}" / "global_step_1"
        student, critic = str(checkpoint / "actor"), str(checkpoint / "critic") if stage != "seqkd" else ""
        shown = ", ".join(f"{key} {value:.1f}" for key, value in found[stage].items())
        print(f"start {stage}: {shown}", flush=True)
    return found


def commit(bench: Bench) -> dict[str, Any]:
    """Three steps of the gad stage with a save after each, in the way and in the background."""
    found = {}
    for how in ("never", "always"):
        words = [f"actor.model.path={bench.model}", "trainer.total_steps=4", "trainer.save_freq=1", "data.val_rows=0",
                 f"trainer.async_save={how}"]  # fmt: skip
        _, _, records = bench.train("gad", f"commit-{how}", *words)
        steps = step_seconds(records)
        saves = [r for r in records if r["type"] == "event" and r["kind"] == "save"]
        blocked = median(r.get("blocked_seconds", r["seconds"]) for r in saves)
        files = json.loads((bench.folder / f"commit-{how}" / "global_step_4" / "MANIFEST.json").read_text())["files"]
        found[how] = {"step_s": median(steps[1:]), "save_s": median(r["seconds"] for r in saves), "blocked_s": blocked,
                      "share_of_a_step": blocked / SAVE_FREQ / median(steps[1:]),
                      "gb": sum(entry["size"] for entry in files.values()) / 1e9}  # fmt: skip
        shown = ", ".join(f"{key} {value:.3f}" for key, value in found[how].items())
        print(f"commit async_save={how}: {shown}", flush=True)
    return found


def weak(bench: Bench) -> dict[str, Any]:
    """Supervised and adversarial updates with 8 prompts a rank."""
    found: dict[str, Any] = {}
    for stage, timing, rows in (("seqkd", "timing_s/actor", 16), ("gad", "", 4)):
        for ranks in (1, 2):
            words = [f"actor.model.path={bench.model}", "trainer.total_steps=4", f"trainer.nproc={ranks}",
                     f"data.train_batch_size={rows * ranks}", "data.val_rows=0", "rollout.engine=hf"]  # fmt: skip
            _, _, records = bench.train(stage, f"weak-{stage}-{ranks}", *words)
            steps = [r["metrics"] for r in records if r["type"] == "step"][1:]
            if stage == "seqkd":
                seconds = median(m[timing] if timing in m else m["timing_s/step"] for m in steps)
                found[f"seqkd actor, {ranks}"] = seconds
            else:
                for role in ("actor", "critic"):
                    found[f"gad {role}, {ranks}"] = median(m[f"timing_s/{role}"] for m in steps)
    for name in ("seqkd actor", "gad actor", "gad critic"):
        one, two = found[f"{name}, 1"], found[f"{name}, 2"]
        found[f"{name}, efficiency"] = one / two
        print(f"weak {name}: {one:.2f} s at 1, {two:.2f} s at 2 ranks: {one / two:.2f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["start", "commit", "weak"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        found = {name: {"start": start, "commit": commit, "weak": weak}[name](bench) for name in options.what}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
