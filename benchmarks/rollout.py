"""Sampling: our samplers side by side with transformers' own generate, new tokens a CPU-second.

    python benchmarks/rollout.py [--prompts 2] [--group 8] [--response 64] [--rounds 3] [--out FILE.json]

`vllm` and `hf` are the product's samplers (seeded draws, log-probs of every token returned); `generate` is a plain
`model.generate(do_sample=True, num_return_sequences=G)` without log-probs. Same prompts, temperature 1, float32, one
thread.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import alternate


def run_sampler(args: argparse.Namespace, turns: alternate.Turns, engine: str) -> None:
    import ours
    from gadcli.config.schema import RolloutConfig
    from gadcli.rollout.build import build_sampler
    from gadcli.rollout.sampler import Sampling

    world, tokenizer = ours.world(), ours.tokenizer_of(args.model)
    cfg = RolloutConfig(engine=engine, n=args.group, max_model_len=1024, max_num_seqs=128)
    eos = [tokenizer.eos_token_id]
    sampler = build_sampler(cfg, args.model, world, eos_ids=eos, dtype="float32", seed=1)
    sampling = Sampling.of(cfg, args.response)
    step = 0
    while turns.wait():
        step += 1
        prompts = batch_of(args, tokenizer, step)
        answers = sampler.generate(prompts, sampling, [1000 * step + i for i in range(len(prompts))])
        turns.done(tokens=sum(len(answer.ids) for group in answers for answer in group))
    os._exit(0)


def run_generate(args: argparse.Namespace, turns: alternate.Turns) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import ours

    torch.set_num_threads(1)
    tokenizer = ours.tokenizer_of(args.model)
    tokenizer.padding_side = "left"
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    step = 0
    while turns.wait():
        step += 1
        batch = tokenizer.pad({"input_ids": batch_of(args, tokenizer, step)}, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(
                **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=args.group,
                max_new_tokens=args.response,
            )  # fmt: skip
        new = out[:, batch["input_ids"].shape[1] :]
        ended = (new == tokenizer.eos_token_id).int().cumsum(1)
        turns.done(tokens=int((ended - (new == tokenizer.eos_token_id).int() == 0).sum()))


def batch_of(args: argparse.Namespace, tokenizer: Any, step: int) -> list[list[int]]:
    """Other prompts every round: no engine may live on the last round's cache."""
    import ours

    found = ours.texts(tokenizer, [args.prompt - 16 * (i % 4) for i in range(args.prompts * (step + 1))])
    return [tokenizer(text).input_ids for text in found[-args.prompts :]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help="Hugging Face folder; default: the demo's SmolLM2-135M")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=192, help="tokens of a prompt")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the figures go as JSON, and a plot beside them")
    args = parser.parse_args()
    if args.runner == "generate":
        return run_generate(args, alternate.Turns())
    if args.runner:
        return run_sampler(args, alternate.Turns(), args.runner)
    from gadcli.checkpoint.embedded_model import ensure_demo_model

    args.model = args.model or str(ensure_demo_model())
    names = ("model", "prompts", "prompt", "group", "response")
    with tempfile.TemporaryDirectory() as logs:
        options = [f"--{name}={getattr(args, name)}" for name in names]
        found = alternate.alternate(__file__, ["vllm", "hf", "generate"], options, args.rounds, Path(logs))
    speed = {name: [r["tokens"] / r["cpu_s"] for r in runs] for name, runs in found.items()}
    alternate.print_table("Rollout", "tokens a CPU-second", {n: alternate.spread(v) for n, v in speed.items()})
    ratio = {f"{name} / generate": alternate.ratios(speed["generate"], speed[name]) for name in ("vllm", "hf")}
    alternate.print_table("Ratio", "times", ratio)
    shown = {name: getattr(args, name) for name in names[1:]}
    results = {"machine": alternate.machine(), "settings": shown, "ratios": ratio, "rounds": found}
    alternate.write(args.out, results)
    return None


if __name__ == "__main__":
    main()
