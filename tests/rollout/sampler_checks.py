"""What a sampler does on a tiny model, as JSON-like findings; as a program: vLLM's, in a process of its own.

`python sampler_checks.py MODEL OUT` writes {"draws": …, "sync": …} for the real vLLM engine.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gadcli.config.schema import FsdpConfig, LoraConfig, ModelConfig, RolloutConfig
from gadcli.distributed.world import World, init_world
from gadcli.errors import SyncError
from gadcli.model.actor import Actor
from gadcli.model.packing import Group
from gadcli.rollout.sampler import Sampler, Sampling
from gadcli.rollout.weight_sync import make_probe
from model.parts import TEMPERATURE, build_actor, local, resharded

MAX_TOKENS = 10
PROMPTS = [[7, 8, 9, 10, 11, 12], [20, 21], [33, 34, 35, 36]]
SEEDS = [101, 202, 303]
SAMPLING = Sampling(4, TEMPERATURE, 1.0, -1, MAX_TOKENS)
# What a model's folder may ask of whoever samples from it; each entry would change draws, lengths or ends.
HOSTILE = {
    "do_sample": True, "repetition_penalty": 1.5, "temperature": 0.3, "top_k": 3, "top_p": 0.5, "min_p": 0.3,
    "bad_words_ids": [[40], [41, 42]], "suppress_tokens": list(range(50, 90)), "begin_suppress_tokens": [90, 91],
    "forced_bos_token_id": 5, "forced_eos_token_id": 1, "no_repeat_ngram_size": 1, "max_length": 9,
    "min_new_tokens": 3, "sequence_bias": [[[100], -9.0]], "exponential_decay_length_penalty": [1, 2.0],
    "eos_token_id": list(range(1, 120)), "stop_strings": ["e"], "num_return_sequences": 3, "num_beams": 1,
}  # fmt: skip
DRAWS = 1500
SPREADS = (Sampling(DRAWS, 1.0, 1.0, -1, 1), Sampling(DRAWS, 0.7, 0.8, -1, 1), Sampling(DRAWS, 1.3, 1.0, 20, 1))


def drawn_ids(sampler: Sampler, prompts: list[list[int]], seeds: list[int]) -> list[list[list[int]]]:
    return [[answer.ids for answer in group] for group in sampler.generate(prompts, SAMPLING, seeds)]


def check_draws(make: Callable[[int], Sampler], actor: Actor) -> dict[str, Any]:
    """Draws of a sampler (`make(eos)`) that holds the actor's weights, in several batches and with another EOS."""
    sampler = make(1)
    sampler.load(actor.model)
    answers = sampler.generate(PROMPTS, SAMPLING, SEEDS)
    groups = [Group(p, [a.ids for a in group]) for p, group in zip(PROMPTS, answers, strict=True)]
    actor_BT = actor.logprobs(groups, MAX_TOKENS, temperature=TEMPERATURE)
    flat = [answer for group in answers for answer in group]
    found: dict[str, Any] = {
        "ids": [[a.ids for a in group] for group in answers],
        "again": drawn_ids(sampler, PROMPTS, SEEDS),
        "alone": [drawn_ids(sampler, [p], [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)],
        "backwards": drawn_ids(sampler, PROMPTS[::-1], SEEDS[::-1]),
        "other_seed": drawn_ids(sampler, PROMPTS, [s + 1 for s in SEEDS]),
        "logp_difference": max(
            abs(x - float(actor_BT[b, t])) for b, answer in enumerate(flat) for t, x in enumerate(answer.logps)
        ),
    }
    ending = make(flat[0].ids[0])
    ending.load(actor.model)
    ended = ending.generate(PROMPTS, SAMPLING, SEEDS)
    found["with_eos"] = [[a.ids for a in group] for group in ended]
    found["finished"] = [[a.finished for a in group] for group in ended]
    return found


def make_hostile(folder: Path) -> Path:
    """The folder with a generation_config.json that asks for everything."""
    (folder / "generation_config.json").write_text(json.dumps(HOSTILE))
    return folder


def check_frequencies(sampler: Sampler) -> list[dict[str, float]]:
    """Many draws of one token under several samplings: Pearson's statistic against the log-probs that came with them.

    Tokens that are expected ten times or more stand alone, all others together: {"chi2", "freedom", "mass"}. `mass`
    is what the distinct tokens drawn add up to by their log-probs: at most 1.
    """
    found = []
    for sampling in SPREADS:
        (answers,) = sampler.generate([PROMPTS[0]], sampling, [SEEDS[0]])
        logp = {answer.ids[0]: answer.logps[0] for answer in answers}
        counts = Counter(answer.ids[0] for answer in answers)
        cells = [(counts[token], DRAWS * math.exp(p)) for token, p in logp.items() if DRAWS * math.exp(p) >= 10]
        rest = DRAWS - sum(seen for seen, _ in cells), DRAWS - sum(expected for _, expected in cells)
        cells += [rest] if rest[1] > 1 else []
        chi2 = sum((seen - expected) ** 2 / expected for seen, expected in cells)
        found.append({"chi2": chi2, "freedom": len(cells) - 1, "mass": sum(map(math.exp, logp.values()))})
    return found


def difference(sampler: Sampler, actor: Actor, step: int) -> float:
    """What the probe finds, as a run does it after each sync."""
    ids = [7, 8, 9, 10, 11, 12, 40, 41, 42, 43]
    probe = make_probe(ids, 0.0, torch.float32)
    logp = actor.logprobs([Group(ids[:1], [ids[1:]])], len(ids) - 1, temperature=1.0)[0].tolist()
    return probe.check(logp, sampler.logprobs(ids), step)


def check_sync(sampler: Sampler, actor: Actor, adapted: Actor) -> dict[str, Any]:
    """Probe figures after a load, after weights changed without one, after the next; then for a LoRA actor."""
    found: dict[str, Any] = {}
    draw = torch.Generator().manual_seed(4)
    sampler.load(actor.model)
    found["after_load"] = difference(sampler, actor, 1)
    resharded(actor.model)
    with torch.no_grad():
        for p in actor.model.parameters():
            local(p).add_(0.02 * torch.randn(local(p).shape, generator=draw))
    try:
        difference(sampler, actor, 2)
    except SyncError as error:
        found["stale"] = error.message
    sampler.load(actor.model)
    found["after_reload"] = difference(sampler, actor, 3)
    greedy = Sampling(1, 0.0, 1.0, -1, MAX_TOKENS)
    found["greedy"] = [group[0].ids for group in sampler.generate(PROMPTS, greedy, SEEDS)]
    found["greedy_by_hand"] = [greedy_by_hand(actor, prompt) for prompt in PROMPTS]
    base = adapted.logprobs([Group([7], [[8, 9, 10]])], 3)
    resharded(adapted.model)
    with torch.no_grad():
        for name, p in adapted.model.named_parameters():
            if ".lora_B." in name:
                local(p).add_(0.1 * torch.randn(local(p).shape, generator=draw))
    found["lora_is_seen"] = float((adapted.logprobs([Group([7], [[8, 9, 10]])], 3) - base).abs().max())
    sampler.load(adapted.model)
    found["after_lora"] = difference(sampler, adapted, 4)
    return found


def check_second_sync(sampler: Sampler, partly: dict[str, Actor]) -> dict[str, float]:
    """Actors of which only a part trains: what the probe finds once that part has moved and was sent alone."""
    found = {}
    for name, actor in partly.items():
        sampler.load(actor.model)
        difference(sampler, actor, 1)
        resharded(actor.model)
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in filter(lambda p: p.requires_grad, actor.model.parameters()):
                local(p).add_(0.1 * torch.randn(local(p).shape, generator=draw))
        with contextlib.suppress(SyncError):
            difference(sampler, actor, 2)
            raise AssertionError(f"{name}: the sampler answered with weights it was not given")
        sampler.load(actor.model)
        found[name] = difference(sampler, actor, 3)
    return found


def partly_trained(world: World, path: str) -> dict[str, Actor]:
    few = LoraConfig(rank=4, target_modules="q_proj,v_proj,up_proj")
    return {
        "adapters on parts of packed layers": build_actor(world, path, model=ModelConfig(lora=few)),
        "the last layer": build_actor(world, path, model=ModelConfig(train_layers=1)),
        "everything": build_actor(world, path),
    }


@torch.no_grad()
def greedy_by_hand(actor: Actor, prompt: list[int]) -> list[int]:
    """The argmax of transformers' own forward, a token at a time, EOS (1) included."""
    ids = list(prompt)
    while len(ids) < len(prompt) + MAX_TOKENS and (len(ids) == len(prompt) or ids[-1] != 1):
        logits = actor.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def vllm(world: World, path: str) -> Callable[[int], Sampler]:
    """One engine for all: an EOS is a matter of each request."""
    from gadcli.rollout.vllm_sampler import VllmSampler

    cfg = RolloutConfig(max_num_seqs=16, max_model_len=64, kv_cache_gb=0.02)
    sampler = VllmSampler(cfg, path, world, [1], torch.float32, seed=1)

    def with_eos(eos: int) -> Sampler:
        sampler.eos_ids = [eos]
        return sampler

    return with_eos


def main() -> None:
    path, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    world = init_world("cpu", FsdpConfig())
    before = dict(os.environ), torch.get_rng_state()
    make = vllm(world, path)
    kept = all(os.environ.get(k) == before[0].get(k) for k in ("LD_PRELOAD", "LOCAL_WORLD_SIZE"))
    kept = kept and torch.equal(torch.get_rng_state(), before[1])
    actor = build_actor(world, path)
    draws = check_draws(make, actor)
    frequencies = check_frequencies(make(1))
    sync = check_sync(make(1), actor, build_actor(world, path, lora=4))
    second = check_second_sync(make(1), partly_trained(world, path))
    found = {"draws": draws, "frequencies": frequencies, "sync": sync, "second": second, "environment_kept": kept}
    out.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # native libraries sometimes abort in their own teardown


if __name__ == "__main__":
    main()
