"""The adversarial step: with and without shared prompts, and side by side with TRL's GRPOTrainer.

    python benchmarks/step.py update [--response 128] [--qwen] [--rounds 3] [--out FILE.json]
    python benchmarks/step.py trl [--prompts 1] [--response 64] [--rounds 2] [--out FILE.json]
    python benchmarks/step.py memory [--prompts 2] [--rounds 1] [--out FILE.json]

`update` is one update of actor and critic and one pass of the reference over the same drawn rows, packed with shared
prompts ("shared") and with a prompt for every answer ("alone": packed too, so that only the sharing differs).
`trl` is a whole step from the same prompts: generation, reference, actor; ours also with the critic besides. TRL runs
as documented (GRPOTrainer, beta 0.001, its own generation), without gradient checkpointing, which is its default, since
without it is faster. Its reward is a random number: constant cost. One thread each, float32; see alternate.py.
Beside them runs "lean": our reference pass and actor update of rows of that shape, with neither sampler nor critic, in
micro-batches of `--budget` tokens. Its peak memory is the update's own, to compare with TRL's. `memory` is these two
alone, for more prompts than three runners have room for.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import alternate

if TYPE_CHECKING:
    from gadcli.data.batches import TokenizedRow

PARTS = ("reference", "actor", "critic")
Figures = dict[str, list[dict[str, Any]]]


def run_update(args: argparse.Namespace, turns: alternate.Turns) -> None:
    """Both layouts in turn, actor, reference and critic each timed; the figures of a turn hold both."""
    import torch

    import ours
    from gadcli.model.rollout_batch import Rollout

    world = ours.world()
    budget = args.group * (args.prompt + args.response) + args.prompt
    actor, critic = ours.actor(world, args.model, budget), ours.critic(world, args.model, budget)
    config = actor.model.config
    shared = ours.drawn(args.prompts, args.group, args.prompt, args.response, config.vocab_size)
    alone = Rollout(
        [row for row in shared.rows for _ in range(args.group)], [[a] for group in shared.answers for a in group]
    )
    advantages = torch.randn(args.prompts, args.group)
    inside = ours.InModels(actor, critic)
    while turns.wait():
        figures = {"gemm_gflops": ours.gemm_gflops(1280, config.hidden_size, config.intermediate_size)}
        for name, rollout in (("shared", shared), ("alone", alone)):
            shape = (len(rollout.rows), len(rollout.answers[0]))
            groups, width = rollout.student_groups(), rollout.width
            inside.seconds = 0.0
            figures[f"{name}_reference"], _ = ours.cpu(actor.logprobs, groups, width)
            figures[f"{name}_actor"], _ = ours.cpu(actor.update, rollout, advantages.view(shape), None, None)
            figures[f"{name}_critic"], _ = ours.cpu(critic.score_and_update, rollout)
            whole = sum(figures[f"{name}_{part}"] for part in PARTS)
            figures[f"{name}_outside"] = 1 - inside.seconds / whole
        turns.done(**figures)


def run_ours(args: argparse.Namespace, turns: alternate.Turns) -> None:
    """The product's step: sync, rollout, reference, critic and actor, as train/stages.py runs them."""
    import torch

    import ours
    from gadcli.config.schema import RolloutConfig
    from gadcli.model.rollout_batch import Rollout
    from gadcli.rollout.build import build_sampler
    from gadcli.rollout.sampler import Sampling

    world = ours.world()
    actor, reference = ours.actor(world, args.model, ours.BUDGET, use_kl_loss=True), ours.reference(world, args.model)
    critic = ours.critic(world, args.model, ours.BUDGET)
    tokenizer = ours.tokenizer_of(args.model)
    rows = prompt_rows(args, tokenizer)
    prompts = [row.prompt_ids for row in rows]
    cfg = RolloutConfig(engine=args.engine, n=args.group, max_model_len=1024, max_num_seqs=64)
    eos = [tokenizer.eos_token_id]
    sampler = build_sampler(cfg, args.model, world, eos_ids=eos, dtype="float32", seed=1)
    sampling = Sampling.of(cfg, args.response)
    step = 0
    while turns.wait():
        step += 1
        seeds = [1000 * step + i for i in range(len(rows))]
        sync, _ = ours.cpu(sampler.load, actor.model)
        rolled, answers = ours.cpu(sampler.generate, prompts, sampling, seeds)
        rollout = Rollout(rows, answers)
        scored, _ = ours.cpu(critic.score_and_update, rollout)
        advantages = torch.randn(len(rows), args.group)
        referred, ref = ours.cpu(actor.logprobs, rollout.student_groups(), rollout.width, reference=reference)
        updated, _ = ours.cpu(actor.update, rollout, advantages, None, ref)
        turns.done(
            sync=sync, rollout=rolled, reference=referred, actor=updated, critic=scored, tokens=sum(rollout.lengths)
        )
    os._exit(0)  # vLLM's shutdown is slow, and nothing is left to keep


def run_lean(args: argparse.Namespace, turns: alternate.Turns) -> None:
    """Reference pass and actor update alone, of rows drawn at the shape that `trl` has."""
    import torch

    import ours
    from gadcli.model.rollout_batch import Rollout

    world = ours.world()
    actor, reference = ours.actor(world, args.model, args.budget, use_kl_loss=True), ours.reference(world, args.model)
    rows = prompt_rows(args, ours.tokenizer_of(args.model))
    vocabulary = actor.model.config.vocab_size
    rollout = Rollout(rows, ours.drawn(args.prompts, args.group, 1, args.response, vocabulary).answers)
    while turns.wait():
        ref = actor.logprobs(rollout.student_groups(), rollout.width, reference=reference)
        actor.update(rollout, torch.randn(len(rows), args.group), None, ref)
        turns.done(tokens=sum(rollout.lengths))


def run_trl(args: argparse.Namespace, turns: alternate.Turns) -> None:
    """GRPOTrainer with a turn a step."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import ours

    torch.set_num_threads(1)
    tokenizer = ours.tokenizer_of(args.model)
    drawn: list[int] = []

    class OneTurn(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not turns.wait():
                os._exit(0)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.done(tokens=sum(drawn))
            drawn.clear()

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        drawn.extend(map(len, completion_ids))
        return [random.random() for _ in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=args.prompts * args.group, num_generations=args.group,
            max_completion_length=args.response, beta=0.001, temperature=ours.TEMPERATURE, learning_rate=1e-6,
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[], save_strategy="no", max_steps=10000,
            logging_steps=10000, disable_tqdm=True, shuffle_dataset=False, model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": prompt_texts(args, tokenizer)})
        trainer = GRPOTrainer(
            args.model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer,
            callbacks=[OneTurn()],
        )  # fmt: skip
        trainer.train()


def prompt_texts(args: argparse.Namespace, tokenizer: Any) -> list[str]:
    """Prompts of 1/2 to 1 times --prompt tokens."""
    import ours

    draw = random.Random(0)
    return ours.texts(tokenizer, [draw.randint(args.prompt // 2, args.prompt) for _ in range(args.prompts)])


def prompt_rows(args: argparse.Namespace, tokenizer: Any) -> list[TokenizedRow]:
    """The same prompts as our rows; the teacher's answer is the beginning of the prompt."""
    from gadcli.data.batches import TokenizedRow

    found = enumerate(tokenizer(text).input_ids for text in prompt_texts(args, tokenizer))
    return [TokenizedRow(i, ids, ids[: args.response], [], "") for i, ids in found]


def report_update(found: Figures, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    rounds = found["update"]
    rows = {}
    for part in PARTS:
        rows[part] = alternate.ratios([r[f"shared_{part}"] for r in rounds], [r[f"alone_{part}"] for r in rounds])
    totals = {name: [sum(r[f"{name}_{part}"] for part in PARTS) for r in rounds] for name in ("shared", "alone")}
    rows["whole update"] = alternate.ratios(totals["shared"], totals["alone"])
    title = f"{args.prompts} x {args.prompt} tokens, {args.group} answers of {args.response}"
    alternate.print_table(
        f"CPU seconds, {title}", "s", {name: alternate.spread(times) for name, times in totals.items()}
    )
    alternate.print_table(f"alone / shared, {title}", "times", rows)
    outside = max(r["shared_outside"] for r in rounds)
    print(f"  outside models (layouts, masks, losses, metrics): at most {100 * outside:.2f} % of the update")
    return rows


def report_trl(found: Figures, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    gad, trl = found["gad"], found["trl"]
    parts = ("sync", "rollout", "reference", "actor", "critic")
    per_token = {
        "TRL GRPO": [r["cpu_s"] / r["tokens"] for r in trl],
        "gad, whole GAD step": [r["cpu_s"] / r["tokens"] for r in gad],
        "gad, without critic": [(r["cpu_s"] - r["critic"]) / r["tokens"] for r in gad],
    }
    alternate.print_table(
        "CPU milliseconds a generated token", "ms",
        {name: alternate.spread([1000 * v for v in values]) for name, values in per_token.items()},
    )  # fmt: skip
    alternate.print_table("gad's parts", "CPU-s", {p: alternate.spread([r[p] for r in gad]) for p in parts})
    peer = per_token.pop("TRL GRPO")
    rows = {f"TRL / {name}": alternate.ratios(values, peer) for name, values in per_token.items()}
    outside = [1 - sum(r[p] for p in parts) / r["cpu_s"] for r in gad]
    report_memory(found, args)
    print(f"  outside gad's parts: {100 * max(outside):.2f} % of a step")
    alternate.print_table("Ratio", "times", rows)
    return rows


def report_memory(found: Figures, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    peaks = {name: max(r["peak_mb"] for r in runs) for name, runs in found.items()}
    print("  peak MB: " + ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items()))
    print(f"  memory of the update alone: {peaks['lean'] / peaks['trl']:.2f} of TRL's")
    return {"peak memory, TRL / gad's update": alternate.spread([peaks["trl"] / peaks["lean"]])}


CONTESTS = {
    "update": (["update"], report_update),
    "trl": (["gad", "lean", "trl"], report_trl),
    "memory": (["lean", "trl"], report_memory),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(CONTESTS))
    parser.add_argument("--runner", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help="Hugging Face folder; default: the demo's SmolLM2-135M")
    parser.add_argument("--qwen", action="store_true", help="update: a random Qwen2 with a vocabulary of 151,936")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--response", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--engine", choices=("auto", "vllm", "hf"), default="auto", help="our sampler")
    parser.add_argument("--budget", type=int, default=1024, help="trl: tokens a micro-batch where memory is measured")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where the figures go as JSON, and a plot beside them")
    args = parser.parse_args()
    if args.runner:
        runs = {"update": run_update, "gad": run_ours, "lean": run_lean, "trl": run_trl}
        runs[args.runner](args, alternate.Turns())
        return
    from gadcli.checkpoint.embedded_model import ensure_demo_model

    names, report = CONTESTS[args.what]
    given = ("prompts", "prompt", "group", "response", "engine", "budget")
    with tempfile.TemporaryDirectory() as folder:
        if args.qwen:
            import ours

            args.model = ours.qwen_like(f"{folder}/qwen")
        args.model = args.model or str(ensure_demo_model())
        options = [args.what, f"--model={args.model}", *(f"--{k}={getattr(args, k)}" for k in given)]
        found = alternate.alternate(__file__, names, options, args.rounds, Path(folder))
    rows = report(found, args)
    shown = {k: v for k, v in vars(args).items() if k not in ("out", "runner", "model")}
    results = {"machine": alternate.machine(), "settings": shown, "ratios": rows, "rounds": found}
    alternate.write(args.out, results)


if __name__ == "__main__":
    main()
