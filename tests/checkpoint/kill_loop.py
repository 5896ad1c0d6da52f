"""Kills a saving process with SIGKILL at random moments and looks at what is left.

    python tests/checkpoint/kill_loop.py FOLDER [KILLS] [SEED]      (make test-kill runs 100)

One process imports torch and forks savers; each saves step after step (16 MB, keep_last 2) and acknowledges a step
once save_checkpoint has returned. After every kill the newest valid checkpoint must be as new as the last
acknowledged one, the acknowledged pair must verify byte by byte, and the loaded weights must be those of their step.
Prints one JSON line: kills, lost, partial_chosen, and how often the kill met a half-written or half-deleted folder.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from checkpoint.saving import save
from gadcli.checkpoint.manifest import latest_valid, step_of, verify
from gadcli.errors import CheckpointError
from gadcli.train.checkpoint import load_checkpoint

SIZE = 2_000_000  # float32 weights: 8 MB, and as many bytes of optimiser state


def saver(run_dir: Path, first: int, ack: int) -> None:
    """Saves for ever; writes each committed step to the pipe."""
    torch.set_num_threads(1)
    step = first
    while True:
        save(run_dir, step, size=SIZE)
        os.write(ack, f"{step}\n".encode())
        step += 1


def kill_once(run_dir: Path, first: int, after_s: float) -> int:
    """Forks a saver, kills it `after_s` after its first commit (so that two always exist); returns the last ack."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            saver(run_dir, first, write)
        finally:
            os._exit(1)
    os.close(write)
    acknowledged = os.read(read, 64)
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while chunk := os.read(read, 4096):
        acknowledged += chunk
    os.close(read)
    return int(acknowledged.split()[-1])


def intact(path: Path) -> bool:
    """Whether a checkpoint verifies and holds the weights of its own step."""
    try:
        verify(path)
        state = {"model": {"w": torch.zeros(SIZE)}}
        load_checkpoint(path, "actor", state)
    except CheckpointError:
        return False
    return bool((state["model"]["w"] == float(step_of(path) or -1)).all())


def main(folder: str, kills: int, seed: int) -> dict[str, int]:
    """The counts described above."""
    run_dir = Path(folder)
    rng = random.Random(seed)
    counts = {"kills": 0, "lost": 0, "partial_chosen": 0, "met_tmp": 0, "met_old": 0, "at_rest": 0}
    first = 1
    for _ in range(kills):
        acknowledged = kill_once(run_dir, first, rng.uniform(0.0, 0.4))
        names = {p.suffix for p in run_dir.iterdir()}
        counts["kills"] += 1
        counts["met_tmp"] += ".tmp" in names
        counts["met_old"] += ".old" in names
        counts["at_rest"] += not names & {".tmp", ".old"}
        chosen = latest_valid(run_dir, lambda _: None)
        if chosen is None or (step_of(chosen) or 0) < acknowledged:
            counts["lost"] += 1
        elif not intact(chosen):
            counts["partial_chosen"] += 1
        first = 1 + max((step_of(p) or 0 for p in run_dir.iterdir()), default=0)
    return counts


if __name__ == "__main__":
    arguments = sys.argv[1:]
    result = main(arguments[0], int((arguments[1:2] or ["100"])[0]), int((arguments[2:3] or ["0"])[0]))
    print(json.dumps(result))
    sys.exit(1 if result["lost"] or result["partial_chosen"] else 0)
