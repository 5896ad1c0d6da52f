"""The plan's memory against what a process really takes: eight configurations on CPU, the real worker, two steps each.

Every row is at its limits (that is what the plan assumes), the student is the demo's SmolLM2-135M. Measured is the
kernel's peak of resident memory of the largest rank; estimated is the larger of the plan's two peaks.

Run: python benchmarks/memory.py [--only NAME …] [--json FILE]
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

import pyarrow as pa
import pyarrow.parquet as pq

from gadcli.checkpoint.embedded_model import ensure_demo_model
from gadcli.config.memory import GIB, MemoryEstimate, Placement, estimate
from gadcli.config.modelinfo import model_shape, read_model_config
from gadcli.config.resolve import resolve
from gadcli.config.schema import GadConfig
from gadcli.launch import environment

PROMPT, RESPONSE = 192, 48
COMMON = [
    "data.truncation=right", "data.shuffle=false", f"data.max_prompt_length={PROMPT}",
    f"data.max_response_length={RESPONSE}", "rollout.max_model_len=256", "trainer.total_steps=2",
    "trainer.logger=[console]", "trainer.device=cpu", "trainer.save_freq=0", "data.val_rows=0", "rollout.n=8",
    "data.train_batch_size=4",
]  # fmt: skip
FULL = ["actor.model.train_layers=0", "critic.model.num_layers=0"]
# name: (stage, world size, overrides over the demo's preset)
CONFIGURATIONS: dict[str, tuple[str, int, list[str]]] = {
    "seqkd, all weights": ("seqkd", 1, [*FULL, "data.train_batch_size=16", "actor.micro_batch_tokens=4096"]),
    "seqkd, checkpointing": (
        "seqkd", 1,
        [*FULL, "data.train_batch_size=16", "actor.micro_batch_tokens=4096",
         "actor.model.gradient_checkpointing=true"],
    ),
    "seqkd, LoRA": ("seqkd", 1, [*FULL, "actor.model.lora.rank=16", "data.train_batch_size=16"]),
    "gad, the demo's": ("gad", 1, ["rollout.engine=vllm"]),
    "gad, KL and a whole critic": (
        "gad", 1, [*FULL, "rollout.engine=vllm", "actor.use_kl_loss=true", "actor.kl_loss_coef=0.01"],
    ),
    "gad, LoRA twice, hf": (
        "gad", 1,
        [*FULL, "rollout.engine=hf", "actor.model.lora.rank=16", "critic.model.lora.rank=16",
         "actor.use_kl_loss=true", "actor.kl_loss_coef=0.01"],
    ),
    "gad, 2 ranks, hf": ("gad", 2, [*FULL, "rollout.engine=hf"]),
    "gad, 4096 tokens, hf": (
        "gad", 1, [*FULL, "rollout.engine=hf", "actor.micro_batch_tokens=4096", "critic.micro_batch_tokens=4096"],
    ),
}  # fmt: skip


def write_long_rows(path: Path, rows: int = 64) -> None:
    """Prompts and answers longer than any limit here: all are cut to it."""
    words = [
        "the",
        "wide",
        "river",
        "carries",
        "seven",
        "boats",
        "past",
        "a",
        "quiet",
        "town",
        "while",
        "rain",
        "falls",
    ]
    text = [" ".join(words[(i * 7 + j * (3 + i % 5)) % len(words)] for j in range(500)) for i in range(rows)]
    content = [[{"role": "user", "content": value}] for value in text]
    pq.write_table(pa.table({"content": content, "teacher_response": text}), path)


def config_of(name: str, model: Path, data: Path, run_dir: Path) -> tuple[GadConfig, str]:
    stage, _, overrides = CONFIGURATIONS[name]
    paths = [f"actor.model.path={model}", f"data.train_files=[{data}]", f"trainer.output_dir={run_dir.parent}",
             f"trainer.exp_name={run_dir.name}"]  # fmt: skip
    resolved = resolve(stage, "demo", None, {}, [*COMMON, *paths, *overrides])
    return resolved.config, resolved.to_yaml()


def estimated(config: GadConfig, model: Path, world: int) -> MemoryEstimate:
    shape = model_shape(read_model_config(str(model)) or {})
    has_critic = config.trainer.critic_warmup >= 0
    critic = shape.cut(config.critic.model.num_layers) if has_critic else None
    engine = "hf" if config.rollout.engine == "hf" else "vllm"
    return estimate(config, Placement("cpu", engine, world, shape, critic))


def measure(run_dir: Path, world: int) -> tuple[list[float], float]:
    """Peak resident GiB of each rank of a real run, and its seconds."""
    env = environment.base_env(world, one_node=True) | {"OMP_NUM_THREADS": "1"}
    if world > 1:
        env |= {"MASTER_ADDR": environment.LOOPBACK, "MASTER_PORT": str(environment.free_port()),
                environment.STORE_VARIABLE: str(run_dir / "store")}  # fmt: skip
    (run_dir / "logs").mkdir(parents=True)
    started = time.monotonic()
    workers = []
    for rank in range(world):
        own = environment.rank_env(env, rank, world, rank, world)
        words = [sys.executable, "-P", "-m", "gadcli.train.worker", "--run-dir", str(run_dir)]
        with (run_dir / "logs" / f"rank_{rank}.log").open("wb") as log:
            workers.append(subprocess.Popen(words, env=own, stdout=log, stderr=log))
    peaks = []
    for rank, worker in enumerate(workers):
        _, status, usage = os.wait4(worker.pid, 0)
        worker.returncode = os.waitstatus_to_exitcode(status)
        if worker.returncode:
            text = (run_dir / "logs" / f"rank_{rank}.log").read_text()
            sys.exit(f"rank {rank} ended with {worker.returncode}:\n{text[-2000:]}")
        peaks.append(usage.ru_maxrss / 2**20)
    return peaks, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--no-run", action="store_true", help="estimates only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = ensure_demo_model()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "long.parquet"
        write_long_rows(data)
        for number, name in enumerate(options.only or CONFIGURATIONS):
            run_dir = Path(folder) / f"run{number}"
            run_dir.mkdir()
            config, text = config_of(name, model, data, run_dir)
            world = CONFIGURATIONS[name][1]
            guess = estimated(config, model, world)
            peak = max(guess.training_peak, guess.rollout_peak) / GIB
            if options.no_run:
                print(f"{name:<28} estimated {peak:5.2f} GiB", flush=True)
                continue
            (run_dir / "config.yaml").write_text(text)
            peaks, seconds = measure(run_dir, world)
            ratio = peak / max(peaks)
            found[name] = {"estimated": peak, "measured": peaks, "ratio": ratio, "estimate": guess.to_json()}
            print(
                f"{name:<28} estimated {peak:5.2f} measured {max(peaks):5.2f} GiB, ratio {ratio:.3f} ({seconds:.0f} s)",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
