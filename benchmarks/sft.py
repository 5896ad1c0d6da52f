"""Supervised training on ragged text: real tokens a CPU-second, side by side with TRL's SFTTrainer.

    python benchmarks/sft.py [--peers padded packed padding-free] [--rows 8] [--text even|long-tail] [--rounds 3]
                             [--out FILE.json]

The same prompts and answers, `--rows` a step (8 is TRL's default), loss on the answers: rows of 32 to 512 tokens, all
lengths as likely (`even`), or mostly short ones and a few long (`long-tail`: log-normal, median 96, at most 1,024), as
chat data has them. The share of padding in TRL's padded batches is printed. TRL runs in three ways: padded
(its default), packed (best-fit, padding-free within) and padding-free; each meets ours in a comparison of its own, two
processes at a time, so that memory suffices. Gradient checkpointing is off (TRL's default is on, and slower).
One thread each, float32; see alternate.py.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import alternate

PEERS = {"padded": {}, "packed": {"packing": True}, "padding-free": {"padding_free": True, "max_length": None}}
ROWS_IN_ALL = 64


def row_lengths(text: str) -> list[int]:
    """Tokens of each row."""
    draw = random.Random(0)
    if text == "even":
        return [draw.randint(32, 512) for _ in range(ROWS_IN_ALL)]
    return [min(1024, max(24, round(draw.lognormvariate(math.log(96), 0.9)))) for _ in range(ROWS_IN_ALL)]


def text_pairs(tokenizer: Any, text: str) -> list[tuple[str, str]]:
    """(prompt, answer), a third of the row the prompt."""
    import ours

    lengths = row_lengths(text)
    parts = [size for length in lengths for size in (length // 3, length - length // 3)]
    found = ours.texts(tokenizer, parts)
    return list(zip(found[::2], found[1::2], strict=True))


def run_ours(args: argparse.Namespace, turns: alternate.Turns) -> None:
    import ours
    from gadcli.model.packing import Group

    actor = ours.actor(ours.world(), args.model, 4096)
    tokenizer = ours.tokenizer_of(args.model)
    groups = [
        Group(tokenizer(prompt).input_ids, [[*tokenizer(answer).input_ids, tokenizer.eos_token_id]])
        for prompt, answer in text_pairs(tokenizer, args.text)
    ]
    at = 0
    while turns.wait():
        batch = [groups[(at + i) % len(groups)] for i in range(args.rows)]
        at += args.rows
        actor.sft_update(batch)
        turns.done(tokens=sum(group.n_tokens for group in batch))


def run_trl(args: argparse.Namespace, turns: alternate.Turns, extra: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    import ours

    torch.set_num_threads(1)
    tokenizer = ours.tokenizer_of(args.model)
    seen: list[int] = []
    cells: list[int] = []

    class OneTurn(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not turns.wait():
                os._exit(0)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.done(tokens=sum(seen), padding=1 - sum(seen) / sum(cells))
            seen.clear()
            cells.clear()

    class Counting(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            mask = inputs.get("attention_mask")
            cells.append(inputs["input_ids"].numel())
            seen.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
            return super().compute_loss(model, inputs, *rest, **more)

    pairs = text_pairs(tokenizer, args.text)
    data = Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})
    rows = 1 if extra.get("packing") else args.rows  # a packed row is about as many tokens as a step's rows
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, per_device_train_batch_size=rows, learning_rate=1e-6, gradient_checkpointing=False,
            bf16=False, use_cpu=True, report_to=[], save_strategy="no", max_steps=10000, logging_steps=10000,
            disable_tqdm=True, **{"max_length": 1024, **extra}, model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        Counting(args.model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[OneTurn()]).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help="Hugging Face folder; default: the demo's SmolLM2-135M")
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--rows", type=int, default=8, help="rows of text a step")
    parser.add_argument("--text", choices=("even", "long-tail"), default="even")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the figures go as JSON, and a plot beside them")
    args = parser.parse_args()
    if args.runner == "gad":
        return run_ours(args, alternate.Turns())
    if args.runner:
        return run_trl(args, alternate.Turns(), PEERS[args.runner])
    from gadcli.checkpoint.embedded_model import ensure_demo_model

    args.model = args.model or str(ensure_demo_model())
    rounds, ratio = {}, {}
    for peer in args.peers:
        with tempfile.TemporaryDirectory() as logs:
            options = [f"--model={args.model}", f"--rows={args.rows}", f"--text={args.text}"]
            found = alternate.alternate(__file__, ["gad", peer], options, args.rounds, Path(logs))
        speed = {name: [r["tokens"] / r["cpu_s"] for r in runs] for name, runs in found.items()}
        rows = {name: alternate.spread(values) for name, values in speed.items()}
        alternate.print_table(f"gad and TRL {peer}", "real tokens a CPU-second", rows)
        print(
            "  peak MB: " + ", ".join(f"{name} {max(r['peak_mb'] for r in runs):.0f}" for name, runs in found.items())
        )
        print(f"  padding in TRL's batches: {100 * statistics.mean(r['padding'] for r in found[peer]):.0f} %")
        ratio[f"gad / TRL {peer}"] = alternate.ratios(speed[peer], speed["gad"])
        rounds[peer] = found
    alternate.print_table("Ratio", "times", ratio)
    shown = {"rows": args.rows, "text": args.text, "rounds": args.rounds}
    results = {"machine": alternate.machine(), "settings": shown, "ratios": ratio, "rounds": rounds}
    alternate.write(args.out, results)
    return None


if __name__ == "__main__":
    main()
