"""Runs the real worker on a tiny model, at any world size, and reads back what it wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from gadcli.config.resolve import resolve
from tiny import write_tiny_data, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "data.train_batch_size=8", "data.max_prompt_length=96", "data.max_response_length=16", "rollout.n=4",
    "rollout.kv_cache_gb=0.05", "rollout.max_model_len=128", "rollout.max_num_seqs=32", "critic.model.num_layers=0",
    "actor.optim.lr=1e-3", "trainer.logger=[console]", "rollout.engine=hf",
]  # fmt: skip


def write_inputs(folder: Path) -> Path:
    """folder/model, folder/train.parquet (24 rows), folder/val.parquet (6 rows)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_model(folder / "model")
    write_tiny_data(folder / "train.parquet", 24)
    write_tiny_data(folder / "val.parquet", 6)
    return folder


def prepare(run_dir: Path, inputs: Path, stage: str, *overrides: str) -> Path:
    """A run's folder with its resolved config, as the parent leaves it."""
    paths = [
        f"actor.model.path={inputs / 'model'}",
        f"data.train_files=[{inputs / 'train.parquet'}]",
        f"data.val_files=[{inputs / 'val.parquet'}]",
        f"trainer.exp_name={run_dir.name}",
    ]
    resolved = resolve(stage, "demo", None, {}, [*SMALL, *paths, *overrides])
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(resolved.to_yaml())
    return run_dir


def environment() -> dict[str, str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    return env | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}


def start(run_dir: Path, world: int = 1, *, resume: bool = False) -> list[subprocess.Popen[bytes]]:
    """The workers of one launch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gadcli.train.worker", "--run-dir", str(run_dir)] + (
        ["--resume"] if resume else []
    )
    workers = []
    (run_dir / "logs").mkdir(exist_ok=True)
    for rank in range(world):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env = environment() | ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with (run_dir / "logs" / f"rank_{rank}.log").open("ab") as log:
            workers.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    return workers


def end_of_hung_worker(run_dir: Path, patch: str) -> tuple[dict[str, Any], str]:
    """The real worker after `patch` (lines of Python) has made it hang: it must end with 7; its record, its stderr."""
    (run_dir / "logs").mkdir()
    program = f"{patch}\nfrom gadcli.train.worker import main\nmain()\n"
    env = environment() | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", program, "--run-dir", str(run_dir)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 7, done.stderr[-2000:]
    record = json.loads((run_dir / "logs" / "rank_0.exit.json").read_text())
    assert record["code"] == 7 and record["kind"] == "PeerError"
    return record, done.stderr


def train(run_dir: Path, world: int = 1, *, resume: bool = False, timeout: float = 240) -> list[dict[str, Any]]:
    """Run to the end; all ranks must end with 0. Returns the records."""
    workers = start(run_dir, world, resume=resume)
    codes = [worker.wait(timeout) for worker in workers]
    assert codes == [0] * world, (run_dir / "logs" / "rank_0.log").read_text()[-3000:]
    return records(run_dir)


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> dict[int, dict[str, float]]:
    """Metrics by step, without what depends on the clock and the machine."""
    found = {r["step"]: r["metrics"] for r in records(run_dir) if r["type"] == "step"}
    volatile = ("timing_s/", "perf/", "rollout/tokens_per_s")
    return {step: {k: v for k, v in m.items() if not k.startswith(volatile)} for step, m in found.items()}


def manifest_hashes(run_dir: Path, step: int) -> dict[str, str]:
    """sha256 of every DCP shard of a checkpoint: equal shards are equal weights and moments."""
    manifest = json.loads((run_dir / f"global_step_{step}" / "MANIFEST.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".distcp")}
