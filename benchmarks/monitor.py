"""Watching costs: first picture of a million-step log (time, memory), its polls after, and a training step's share.

Run: python benchmarks/monitor.py [--steps 1000000] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

READ = """
import io, json, resource, sys, time
begin, cpu = time.perf_counter(), time.process_time()
from pathlib import Path
from rich.console import Console
from gadcli.dashboard import RunView, render
view = RunView(Path(sys.argv[1]))
view.poll()
console = Console(file=io.StringIO(), width=120, height=40, force_terminal=True)
console.print(render(view, 120, 40, time.time()))
first, first_cpu = time.perf_counter() - begin, time.process_time() - cpu
begin = time.perf_counter()
for _ in range(20):
    view.poll()
poll = (time.perf_counter() - begin) / 20
begin = time.perf_counter()
for _ in range(10):
    console.print(render(view, 120, 40, time.time()))
frame = (time.perf_counter() - begin) / 10
print(json.dumps({"first_picture_s": first, "first_picture_cpu_s": first_cpu,
                  "idle_poll_ms": poll * 1e3, "frame_ms": frame * 1e3,
                  "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                  "steps_kept": len(view.log.history), "last_step": view.log.history.last.step,
                  "starts": len(view.log.runs)}))
"""


def write_log(path: Path, steps: int) -> None:
    """A log of `steps` records of about 400 bytes, resumed once in its middle."""
    rng = random.Random(1)
    header = {"type": "run", "time": 0, "stage": "gad", "critic_loss": "final", "total_steps": steps, "start_step": 0}
    with path.open("w") as file:
        file.write(json.dumps(header) + "\n")
        for step in range(1, steps + 1):
            if step == steps // 2:
                file.write(json.dumps({**header, "start_step": step - 1, "resumed": True}) + "\n")
            g = rng.random()
            file.write(
                f'{{"type":"step","time":{step}.0,"step":{step},"epoch":0,"metrics":{{'
                f'"critic/d_acc":{0.6 + 0.1 * g:.6f},'
                f'"critic/score_diff":{0.1 + 0.1 * g:.6f},"critic/d_loss":{1 + g:.6f},"critic/grad_norm":{0.3 + g:.6f},'
                f'"actor/pg_loss":{g - 0.5:.6f},"actor/grad_norm":{0.2 + g:.6f},"response_length/mean":{100 + g:.4f},'
                f'"response_length/clip_ratio":{0.1 * g:.4f},"teacher_length/mean":{100 + g:.4f},'
                f'"timing_s/step":{1 + g:.4f},"timing_s/rollout":{g:.4f},"perf/tokens_per_s":{5000 * g:.1f}}}}}\n'
            )


def training_step_cost(folder: Path, steps: int = 1000) -> float:
    """CPU milliseconds a training step pays for its record, a sample, TensorBoard (scalars, histograms of 1,024 scores
    and lengths) and the health rules."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from gadcli.metrics.diagnose import Watch
    from gadcli.metrics.facts import RunFacts
    from gadcli.metrics.record import MetricsWriter
    from gadcli.metrics.sinks import TensorBoardSink
    from metrics.generated import healthy

    info, rows = healthy(1, steps=steps)
    writer, sink = MetricsWriter(folder, append=False), TensorBoardSink(folder / "tensorboard")
    watch = Watch(RunFacts.of(info))
    rng = random.Random(2)
    scores = [rng.gauss(0, 1) for _ in range(1024)]
    sample = {"prompt": "p" * 400, "student": "s" * 800, "teacher": "t" * 800, "student_score": 0.1, "teacher_score": 1}
    begin = time.process_time()
    for step, metrics in enumerate(rows, start=1):
        writer.step(step, 0, metrics)
        writer.samples(step, "train", [sample])
        sink.scalars(step, metrics)
        sink.histograms(step, {"scores/student": scores, "scores/teacher": scores[:128], "response_length": scores})
        watch.step(step, metrics)
    return (time.process_time() - begin) / steps * 1e3


def main() -> None:
    """Write the log, read it in a fresh process (its CPU seconds too: a shared machine's wall clock misleads)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--keep", type=Path, help="folder to write the log to (and leave it there)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "metrics.jsonl"
        if not log.exists():
            write_log(log, args.steps)
        answer = subprocess.run([sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, check=True)
        cost = Path(temporary) / "cost"
        figures = {"log_mb": log.stat().st_size / 1e6, **json.loads(answer.stdout)}
        figures["training_step_ms"] = training_step_cost(cost)
        figures["own_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
