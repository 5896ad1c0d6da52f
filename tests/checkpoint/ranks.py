"""Runs functions on W gloo ranks, forked from one fresh process: real FSDP and collectives, no port (a file store)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The process imports torch once and never computes, so that its forked children may (OpenMP threads do not fork).
PROGRAM = """
import datetime, importlib, json, os, sys, traceback
import torch
import torch.distributed as dist
import torch.distributed.checkpoint, torch.distributed.fsdp

def rank_main(store, rank, world, target, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=120))
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(*args)
    dist.barrier()
    dist.destroy_process_group()

folder, jobs = sys.argv[1], json.loads(sys.argv[2])
for number, (world, target, *args) in enumerate(jobs):
    importlib.import_module(target.split(":")[0])
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            try:
                rank_main(f"{folder}/store{number}", rank, world, target, args)
                code = 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if any(codes):
        sys.exit(f"ranks of {target} ended with {codes}")
"""


def run_jobs(*jobs: tuple[int, str, *tuple[object, ...]]) -> None:
    """Runs jobs (world size, "module:function" under tests/, str args…) one after another; fails if any rank fails."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    plain = [[world, target, *map(str, args)] for world, target, *args in jobs]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, folder, json.dumps(plain)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
