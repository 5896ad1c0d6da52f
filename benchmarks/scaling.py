"""One actor update on 1, 2, … gloo ranks of this machine: the same prompts split (strong), and so many each (weak).

    python benchmarks/scaling.py [--worlds 1 2] [--prompts 2] [--rounds 3] [--out FILE.json]

Every rank is a process with one thread. Reported are CPU seconds over all ranks a token, and wall seconds; on a machine
without a free core for every rank only the first says anything. What ranks add is FSDP2's gathers and reductions, and
waiting where a rank has less to do than its peers (which gloo spends blocked, at no CPU).
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
from typing import Any

import contest


def run_rank(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    import ours

    world = ours.world()
    actor = ours.actor(world, args.model, 4096)
    vocabulary = actor.model.config.vocab_size
    mine = args.prompts if args.kind == "weak" else args.prompts // world.size
    rollout = ours.drawn(mine, args.group, args.prompt, args.response, vocabulary, seed=world.rank)
    advantages = torch.randn(mine, args.group)
    for number in range(args.rounds + 1):
        dist.barrier()
        cpu, wall = time.process_time(), time.perf_counter()
        actor.update(rollout, advantages, None, None)
        dist.barrier()
        if number:  # the first one is the warm-up
            tokens = sum(group.n_tokens for group in rollout.student_groups())
            figures = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall, "tokens": tokens}
            print(json.dumps(figures), file=sys.stderr, flush=True)


def measure(args: argparse.Namespace, kind: str, size: int) -> list[dict[str, float]]:
    """A round's figures, summed over ranks (the wall clock: the slowest)."""
    names = ("model", "prompts", "prompt", "group", "response", "rounds")
    command = [sys.executable, __file__, f"--kind={kind}", *(f"--{name}={getattr(args, name)}" for name in names)]
    path = os.pathsep.join([str(contest.ROOT / "src"), str(contest.ROOT / "benchmarks")])
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(size):
            env = os.environ | {
                "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "RANK": str(rank), "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank), "GAD_STORE_FILE": f"{folder}/store", "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
            ranks.append(
                subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            )
        outputs = [rank.communicate()[1] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(outputs[0][-3000:])
    by_rank = [[json.loads(line) for line in text.splitlines() if line.startswith('{"cpu_s"')] for text in outputs]
    return [
        {
            "cpu_s": sum(r["cpu_s"] for r in turn),
            "wall_s": max(r["wall_s"] for r in turn),
            "tokens": sum(r["tokens"] for r in turn),
        }
        for turn in zip(*by_rank, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("weak", "strong"), help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help="Hugging Face folder; default: the demo's SmolLM2-135M")
    parser.add_argument("--worlds", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--response", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the figures go as JSON, and a plot beside them")
    args = parser.parse_args()
    if args.kind:
        return run_rank(args)
    from gadcli.checkpoint.embedded_model import ensure_demo_model

    args.model = args.model or str(ensure_demo_model())
    rounds: dict[str, Any] = {}
    rows: dict[str, dict[str, float]] = {}
    for kind in ("strong", "weak"):
        for size in args.worlds:
            runs = rounds[f"{kind}, {size}"] = measure(args, kind, size)
            rows[f"{kind}, {size} ranks"] = contest.spread([1000 * r["cpu_s"] / r["tokens"] for r in runs])
    contest.print_table("CPU time a token, all ranks", "ms", rows)
    shown = {name: getattr(args, name) for name in ("worlds", "prompts", "prompt", "group", "response", "rounds")}
    results = {"machine": contest.machine(), "settings": shown, "ms_per_token": rows, "rounds": rounds}
    contest.write(args.out, results, "scaling.py: CPU milliseconds a token, all ranks", rows)
    return None


if __name__ == "__main__":
    main()
