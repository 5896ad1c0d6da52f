"""One of two ranks that share a vLLM engine: `python team_checks.py MODEL OUT`, with RANK and WORLD_SIZE set.

Each rank asks for answers to prompts of its own (another number of them on each) and writes how far the engine's
log-probs of those answers are from its own sharded actor's: as far as another prompt's, if answers were dealt wrongly.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from gadcli.config.schema import FsdpConfig, RolloutConfig
from gadcli.distributed.world import init_world
from gadcli.model.packing import Group
from model.parts import TEMPERATURE, build_actor
from rollout.sampler_checks import MAX_TOKENS, SAMPLING, check_second_sync, difference, partly_trained

PROMPTS = ([[7, 8, 9, 10, 11, 12], [20, 21]], [[33, 34, 35, 36], [50, 51, 52], [60]])
SEEDS = ([101, 202], [303, 404, 505])


def main() -> None:
    path, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    world = init_world("cpu", FsdpConfig())
    from gadcli.rollout.vllm_sampler import VllmSampler

    cfg = RolloutConfig(max_num_seqs=32, max_model_len=64, kv_cache_gb=0.02, tensor_parallel_size=2)
    sampler = VllmSampler(cfg, path, world, [1], torch.float32, seed=1)
    second = check_second_sync(sampler, partly_trained(world, path))
    actor = build_actor(world, path)
    with torch.no_grad():  # today's weights are not those on disk
        for p in actor.model.parameters():
            p.mul_(1.1)
    sampler.load(actor.model)
    probe = difference(sampler, actor, 1)
    own, seeds = PROMPTS[world.rank], SEEDS[world.rank]
    every = sampler.generate(own, SAMPLING, seeds)
    again = sampler.generate(own, SAMPLING, seeds)
    assert [[a.ids for a in group] for group in again] == [[a.ids for a in group] for group in every], "seeds decide"
    groups = [Group(prompt, [a.ids for a in group]) for prompt, group in zip(own, every, strict=True)]
    actor_BT = actor.logprobs(groups, MAX_TOKENS, temperature=TEMPERATURE)
    flat = [answer for group in every for answer in group]
    largest = max(abs(x - float(actor_BT[b, t])) for b, answer in enumerate(flat) for t, x in enumerate(answer.logps))
    probe = max(probe, *second.values())
    found = {"probe": probe, "logp_difference": largest, "groups": len(every), "answers": len(flat)}
    out.with_suffix(f".{world.rank}").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # native libraries sometimes abort in their own teardown


if __name__ == "__main__":
    main()
