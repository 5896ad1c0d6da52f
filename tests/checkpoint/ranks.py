"""Runs a function on W gloo ranks in fresh processes: real FSDP, real collectives, no port (a file store)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, datetime, importlib
import torch
import torch.distributed as dist
torch.set_num_threads(1)
store, rank, world, target = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world,
                        timeout=datetime.timedelta(seconds=120))
module, function = target.split(":")
getattr(importlib.import_module(module), function)(*sys.argv[5:])
dist.barrier()
dist.destroy_process_group()
"""


def run_ranks(world: int, target: str, *args: object) -> None:
    """Calls `target` ("module:function", a module under tests/) with str args on every rank."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PROGRAM, f"{folder}/store"]
        tail = [str(world), target, *map(str, args)]
        ranks = [
            subprocess.Popen(
                [*command, str(r), *tail], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for r in range(world)
        ]
        outputs = [p.communicate(timeout=150)[0] for p in ranks]
    for rank, (process, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {target}: exit {process.returncode}\n{output[-3000:]}"
