"""A gad step with and without `trainer.overlap`, in turns within one process and run: wall and CPU seconds.

    python benchmarks/overlap.py [--prompts 2] [--group 8] [--response 64] [--rounds 3] [--engine vllm] [--threads 1]
                                 [--critic-layers 8] [--critic-mini 0] [--model DIR] [--out FILE.json]

The real run (sync and its proof, rollout, critic, actor) over the loop's own functions. A turn with overlap learns from
answers drawn beforehand, untimed, and draws the next ones beside the critic's update; that is a step in the middle of
a run. Its answers are then compared with those that the same weights give in the open.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def build(args: argparse.Namespace, folder: Path) -> Any:
    """A Run of stage gad on rows of plain text."""
    from gadcli.config.resolve import load_resolved, resolve
    from gadcli.train.build import build_run

    text = "The function returns the value that was asked for and leaves its argument as it is. " * 40
    with (folder / "train.jsonl").open("w") as file:
        for i in range(64 * args.prompts):
            content = [{"role": "user", "content": f"Row {i}: " + text[: args.prompt_chars]}]
            file.write(json.dumps({"content": content, "teacher_response": text[i % 80 :][: args.response * 4]}) + "\n")
    words = [
        f"actor.model.path={args.model}", f"data.train_files=[{folder / 'train.jsonl'}]", "data.truncation=right",
        f"data.train_batch_size={args.prompts}", f"data.max_response_length={args.response}", f"rollout.n={args.group}",
        "data.max_prompt_length=512", "rollout.max_model_len=640", f"rollout.engine={args.engine}",
        "actor.optim.lr=1e-6", f"critic.model.num_layers={args.critic_layers}", "trainer.logger=[console]",
        f"critic.ppo_mini_batch_size={args.critic_mini}", "trainer.total_steps=1000", "trainer.exp_name=run",
    ]  # fmt: skip
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(resolve("gad", "demo", None, {}, words).to_yaml())
    return build_run(load_resolved(folder / "run" / "config.yaml"), folder / "run", resume_from=None)


class StoodStill:
    """Seconds in which this whole process did not run (a suspended machine): a turn with any is left out."""

    def __init__(self) -> None:
        self.seconds = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            start = time.monotonic()
            time.sleep(0.05)
            late = time.monotonic() - start - 0.05
            self.seconds += late if late > 1.0 else 0.0


def turn(run: Any, step: int, overlap: bool) -> dict[str, float]:
    """One step's seconds by phase."""
    from gadcli.train.stages import learn_and_draw_ahead, learn_from, roll_out_now
    from gadcli.train.steplog import StepLog

    run.ahead = None
    rollout = None
    if overlap:
        run.sync_sampler(step, StepLog(step))
        rollout = run.draw(run.rows_of(step), step)
    else:
        run.synced_step = -1  # the last turn's weights are in the sampler already: either kind of step sends them once
    log = StepLog(step)
    wall, cpu = time.perf_counter(), time.process_time()
    if rollout is None:
        learn_from(run, roll_out_now(run, run.rows_of(step), log), log)
    else:
        learn_and_draw_ahead(run, rollout, log)
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return found | log.seconds | {"hidden": log.values.get("rollout/hidden_s", 0.0)}


def same_answers(run: Any) -> float:
    """Share of the answers drawn beside the critic's update that the same weights give again in the open."""
    ahead = run.ahead
    again = run.draw(ahead.rollout.rows, ahead.step)
    pairs = [(a.ids, b.ids) for x, y in zip(ahead.rollout.answers, again.answers, strict=True)
             for a, b in zip(x, y, strict=True)]  # fmt: skip
    return sum(a == b for a, b in pairs) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"prompts": 2, "group": 8, "response": 64, "rounds": 3, "threads": 1, "critic-layers": 8,
                        "critic-mini": 0, "prompt-chars": 600}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm")
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from gadcli.launch.environment import engine_variables

    os.environ |= engine_variables() | {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if args.model is None:
        from gadcli.checkpoint.embedded_model import ensure_demo_model

        args.model = str(ensure_demo_model())
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        run = build(args, Path(folder))
        turns: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        still = StoodStill()
        for number in range(8 * (args.rounds + 1)):
            overlap = number % 2 == 1
            before = still.seconds
            found = turn(run, number + 1, overlap)
            stood = still.seconds - before
            same = same_answers(run) if overlap else 1.0
            if number >= 2 and not stood and len(turns[overlap]) < args.rounds:  # the first of each warms up
                turns[overlap].append(found | {"same": same})
            shown = {k: round(v, 2) for k, v in found.items()}
            print(number, "overlap" if overlap else "plain", shown, f"same {same}, stood {stood:.1f}", flush=True)
            if min(map(len, turns.values())) == args.rounds:
                break
    medians = {
        name: {key: statistics.median(t.get(key, 0.0) for t in turns[overlap]) for key in turns[overlap][0]}
        for name, overlap in (("plain", False), ("overlap", True))
    }
    for name, found in medians.items():
        print(f"{name:8}" + "".join(f"  {key} {value:.2f}" for key, value in found.items()))
    ratios = [p["wall"] / o["wall"] for p, o in zip(turns[False], turns[True], strict=True)]
    print(f"wall, plain / overlap: {min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}")
    if args.out:
        args.out.write_text(
            json.dumps(
                {"settings": vars(args) | {"out": None}, "medians": medians, "turns": turns[False] + turns[True]}
            )
        )
    os._exit(0)


if __name__ == "__main__":
    main()
