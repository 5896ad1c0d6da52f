"""Merging, whole process, side by side with verl's own merger and with a plain copy of the same bytes.

    python benchmarks/merge.py --verl-python OTHER_ENV/bin/python [--model HF_FOLDER] [--gigabytes 2] [--out FILE.json]

The checkpoints are verl's FSDP2 layout at 2 ranks, written here by real FSDP2 under gloo: the given model (its
tokenizer and config are used for both), and a synthetic Llama of the given size in float32. Each command runs
`--repeats` times after one warm-up, all on a warm page cache; the median is reported. CPU seconds are user + system,
memory is the peak resident set, both of the whole process. verl's merger always writes bfloat16, so gad is measured
with and without `--dtype bfloat16`. `copy` writes and fsyncs as many bytes as gad writes (8-MB pieces).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = """
import os, sys
source, target = sys.argv[1:]
os.makedirs(target)
for name in sorted(os.listdir(source)):
    with open(f"{source}/{name}", "rb") as read, open(f"{target}/{name}", "wb") as write:
        while piece := read.read(8 << 20):
            write.write(piece)
        write.flush()
        os.fsync(write.fileno())
"""
SAVE = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM
store, out, source = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
rank, random = int(sys.argv[4]), sys.argv[5] == "random"
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
if random:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
else:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
if random:
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().uniform_(-0.05, 0.05)
torch.save(model.state_dict(), out / f"model_world_size_2_rank_{rank}.pt")
if rank == 0:
    (out / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 2}))
dist.barrier()
"""


def measure(command: Sequence[str], env: dict[str, str]) -> dict[str, float]:
    """Wall and CPU seconds and peak memory in MB of one child process; raises if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{' '.join(command)}\n{output[-3000:]}")
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1000}


def repeated(command: Sequence[str], target: Path, env: dict[str, str], repeats: int) -> dict[str, float]:
    """Medians over `repeats` runs after a warm-up; `target` is removed before each."""
    runs = []
    for _ in range(repeats + 1):
        shutil.rmtree(target, ignore_errors=True)
        runs.append(measure(command, env))
    return {key: round(statistics.median(run[key] for run in runs[1:]), 3) for key in runs[0]}


def make_checkpoint(out: Path, source: Path, *, random: bool) -> None:
    """verl's layout of `source`'s model at 2 ranks; random weights when only a config is there."""
    (out / "huggingface").mkdir(parents=True)
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        if (source / name).is_file():
            shutil.copy(source / name, out / "huggingface" / name)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        tail = [str(out), str(out / "huggingface") if random else str(source)]
        kind = "random" if random else ""
        ranks = [
            subprocess.Popen([sys.executable, "-c", SAVE, f"{folder}/store", *tail, str(rank), kind], env=env)
            for rank in range(2)
        ]
        if any(process.wait() for process in ranks):
            raise SystemExit("the checkpoint could not be made")


def synthetic_config(source: Path, out: Path, gigabytes: float) -> Path:
    """A folder with `source`'s tokenizer and a Llama config of about `gigabytes` in float32 (19.8M weights a layer)."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((out / "config.json").read_text())
    fixed = 2 * config["vocab_size"] * 1280
    layers = max(1, round((gigabytes * 1e9 / 4 - fixed) / 19.8e6))
    config |= {"hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": layers, "num_attention_heads": 20,
               "num_key_value_heads": 20, "head_dim": 64, "tie_word_embeddings": False}  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return out


def compare(checkpoint: Path, work: Path, verl_python: str | None, repeats: int) -> dict[str, dict[str, float]]:
    """Every contender on one checkpoint."""
    env = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT / "src")}
    gad = [sys.executable, "-m", "gadcli.cli.app", "merge", str(checkpoint), "-o"]
    rows = {
        "gad": repeated([*gad, str(work / "gad")], work / "gad", env, repeats),
        "gad --no-verify": repeated([*gad, str(work / "fast"), "--no-verify"], work / "fast", env, repeats),
        "gad --dtype bfloat16": repeated(
            [*gad, str(work / "bf16"), "--dtype", "bfloat16"], work / "bf16", env, repeats
        ),
    }
    copy = [sys.executable, "-c", COPY, str(work / "gad"), str(work / "copy")]
    rows["copy"] = repeated(copy, work / "copy", env, repeats)
    if verl_python:
        command = [verl_python, "-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", str(checkpoint),
                   "--target_dir", str(work / "verl")]  # fmt: skip
        plain = {k: v for k, v in env.items() if k != "PYTHONPATH"}
        rows["verl.model_merger"] = repeated(command, work / "verl", plain, repeats)
        rows["verl, imports alone"] = repeated([*command[:3], "-h"], work / "none", plain, repeats)
    rows["gad, imports alone"] = repeated([*gad[:-2], "-h"], work / "none", env, repeats)
    size = sum(p.stat().st_size for p in (work / "gad").iterdir())
    rows["gad"]["written_mb"] = round(size / 1e6, 1)
    return rows


def main() -> None:
    """Makes the checkpoints, measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verl-python", help="a Python with verl 0.9.1")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder with tokenizer")
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, help="size of the synthetic model in float32; 0 skips it"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    args = parser.parse_args()
    results: dict[str, object] = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cases = {args.model.name: (args.model, False)}
        if args.gigabytes:
            cases[f"synthetic-{args.gigabytes:g}GB"] = (
                synthetic_config(args.model, work / "config", args.gigabytes),
                True,
            )
        for name, (source, random) in cases.items():
            checkpoint = work / "checkpoint"
            make_checkpoint(checkpoint, source, random=random)
            rows = compare(checkpoint, work, args.verl_python, args.repeats)
            results[name] = rows
            print(name)
            for label, row in rows.items():
                print(f"  {label:22} {row['wall_s']:7.2f} s  {row['cpu_s']:7.2f} CPU-s  {row['peak_mb']:8.0f} MB")
            for leftover in work.iterdir():
                if leftover.name != "config":
                    shutil.rmtree(leftover)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
