"""What the algorithm itself costs: every loss, advantage and mask of one adversarial step, without any model.

    python benchmarks/algo_overhead.py --preset demo --run runs/demo-gad

Times the tensors of one step at the preset's shapes, backward down to the critic's values and the actor's log-probs
included, in as many micro-batches as the preset would make; with --run, as a share of that run's median step.
The bound we hold: under 2 % of a step of the demo.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gadcli.algo.advantages import group_advantages
from gadcli.algo.discriminator import NUMBERS, discriminator_loss
from gadcli.algo.kl import kl_loss
from gadcli.algo.masking import response_mask
from gadcli.algo.mean import Mean, add_metrics
from gadcli.algo.mismatch import mismatch_metrics, tis_weights
from gadcli.algo.policy import policy_loss
from gadcli.algo.scores import scores
from gadcli.config.resolve import resolve
from gadcli.config.schema import GadConfig

BOUND = 0.02


def critic_part(cfg: GadConfig, pieces: int) -> None:
    """Masks, scores, discriminator loss and its backward to the critic's values, over all pairs of a step."""
    prompts, group, width = cfg.data.train_batch_size, cfg.rollout.n, cfg.data.max_response_length
    section = getattr(cfg.critic, cfg.critic.loss, None)
    numbers = {name: getattr(section, name) for name in NUMBERS[cfg.critic.loss]}
    metrics: dict[str, Mean] = {}
    for chunk in torch.arange(prompts).chunk(pieces):
        ids = torch.randint(0, 1000, (len(chunk) * (group + 1), width))
        values = torch.randn(ids.shape, requires_grad=True)
        raw, norm = scores(values, response_mask(ids, 0), cfg.critic.values)
        raw, norm = raw.view(len(chunk), -1), norm.view(len(chunk), -1)
        teacher = [x[:, -1:].expand(-1, group).flatten() for x in (raw, norm)]
        student = [x[:, :-1].flatten() for x in (raw, norm)]
        loss, parts = discriminator_loss(cfg.critic.loss, *teacher, *student, numbers, pairs=prompts * group)
        loss.backward()
        add_metrics(metrics, parts)


def actor_part(cfg: GadConfig, pieces: int) -> None:
    """Advantages, then policy loss, KL and mismatch with backward to the log-probs, for every pass over a step."""
    prompts, group, width = cfg.data.train_batch_size, cfg.rollout.n, cfg.data.max_response_length
    rows = prompts * group
    adv, metrics = group_advantages(torch.randn(prompts, group), cfg.algorithm.adv_estimator)
    mask = response_mask(torch.randint(0, 1000, (rows, width)), 0)
    old = -torch.rand(rows, width)
    over = {"rows": float(rows), "tokens": float(mask.sum()), "horizon": float(width)}
    for _ in range(cfg.actor.ppo_epochs):
        for chunk in torch.arange(rows).chunk(pieces):
            logp = (old[chunk] + 0.1 * torch.randn(len(chunk), width)).requires_grad_()
            weights = tis_weights(old[chunk], old[chunk] + 0.01, mask[chunk])
            loss, parts = policy_loss(
                cfg.actor.policy_loss.loss_mode, logp, old[chunk], adv.flatten()[chunk], mask[chunk],
                clip_low=cfg.actor.clip_ratio_low, clip_high=cfg.actor.clip_ratio_high,
                clip_c=cfg.actor.clip_ratio_c, agg=cfg.actor.loss_agg_mode, weights_BT=weights, **over,
            )  # fmt: skip
            kl, more = kl_loss(cfg.actor.kl_loss_type, logp, old[chunk], mask[chunk], rows=float(rows))
            (loss + cfg.actor.kl_loss_coef * kl).backward()
            add_metrics(metrics, parts | more | mismatch_metrics(old[chunk], logp, mask[chunk]))


def seconds(work: Callable[[], None], repeats: int) -> float:
    """Median wall time."""
    work()  # warm
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def step_seconds(run: Path) -> float:
    """Median timing_s/step of a run."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return statistics.median(line["metrics"]["timing_s/step"] for line in lines if line["type"] == "step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--run", type=Path, help="a gad run, for the share of its step")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    cfg = resolve("gad", args.preset).config
    tokens = cfg.data.train_batch_size * cfg.rollout.n * (cfg.data.max_prompt_length + cfg.data.max_response_length)
    # Every answer with its own prompt: more micro-batches than prefix sharing makes, so an upper bound.
    pieces = -(-tokens // cfg.actor.micro_batch_tokens)
    found = {
        "preset": args.preset,
        "micro_batches": pieces,
        "critic_ms": 1e3 * seconds(lambda: critic_part(cfg, pieces), args.repeats),
        "actor_ms": 1e3 * seconds(lambda: actor_part(cfg, pieces), args.repeats),
    }
    if args.run is not None:
        step = step_seconds(args.run)
        found |= {"step_s": step, "share": (found["critic_ms"] + found["actor_ms"]) / 1e3 / step, "bound": BOUND}
    print(json.dumps(found, indent=2))
    return 1 if found.get("share", 0.0) > BOUND else 0


if __name__ == "__main__":
    sys.exit(main())
