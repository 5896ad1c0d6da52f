"""What ranks of test_gathering run: the same step with weights gathered in every micro-batch, and once."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from gadcli.config.schema import FsdpConfig, LoraConfig, ModelConfig
from gadcli.distributed.fsdp import shard
from gadcli.model.loading import load_actor
from model.parts import STILL, build_critic, last_gradient, tiny_rollout, values, worst_relative
from model.rank_jobs import step, world_of_all

GATHER, SCATTER = "all_gather_single", "reduce_scatter_single"  # what FSDP2 calls


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often FSDP2 gathers weights and reduces gradients meanwhile."""
    calls: Counter[str] = Counter()

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    reals = {name: getattr(dist, name) for name in (GATHER, SCATTER)}
    for name, real in reals.items():
        setattr(dist, name, counting(name, real))
    try:
        yield calls
    finally:
        for name, real in reals.items():
            setattr(dist, name, real)


def compare(path: str) -> None:
    """Full and LoRA, with and without gradient checkpointing: the same gradients, and traffic counted."""
    world = world_of_all()
    for lora, checkpointing in itertools.product((0, 4), (False, True)):
        cfg = ModelConfig(lora=LoraConfig(rank=lora), gradient_checkpointing=checkpointing)
        gradients, traffic = {}, {}  # type: dict[str, Any], dict[str, Counter[str]]
        for when in ("micro_batch", "step"):
            model: Any = shard(load_actor(path, cfg, seed=3), world, FsdpConfig(gather=when), "float32")
            for _ in range(2):  # the second step shows whether the first has left anything behind
                with counted() as traffic[when]:
                    gradients[when] = step(model, world)[1]
        what = f"lora {lora}, checkpointing {checkpointing}: {traffic}"
        assert gradients["step"].keys() == gradients["micro_batch"].keys(), what
        assert any(float(gradient.norm()) > 0 for gradient in gradients["step"].values()), what
        assert worst_relative(gradients["step"], gradients["micro_batch"]) < 1e-5, what
        units = len(model.model.layers) + 1
        learning = units if not lora else units - 1  # adapters are in layers alone
        assert (traffic["step"][GATHER], traffic["step"][SCATTER]) == (units, learning), what
        rounds = traffic["micro_batch"][SCATTER] // learning
        assert rounds > 1, what
        # Gathered for the forward and for the backward pass, in every round.
        both = {GATHER: 2 * rounds * units, SCATTER: rounds * learning}
        assert traffic["micro_batch"] == both, what


def penalise(path: str) -> None:
    """Two backward passes a micro-batch (a gradient penalty on the teacher's text) end as one does."""
    world, found = world_of_all(), []
    for when in ("micro_batch", "step"):
        critic = build_critic(
            world, path, optim=STILL, gradient_penalty=0.7, micro_batch_tokens=1, fsdp=FsdpConfig(gather=when)
        )
        metrics = values(critic.score_and_update(tiny_rollout(seed=world.rank))[1])
        found.append((last_gradient(critic), metrics["critic/gradient_penalty"]))
    assert worst_relative(found[1][0], found[0][0]) < 1e-5
    assert found[1][1] == found[0][1]


def replicate(path: str) -> None:
    """Hybrid sharding: two copies of a whole model, whose gradients are summed over copies."""
    world, found = world_of_all(replicate=2), []
    for when in ("micro_batch", "step"):
        model: Any = shard(load_actor(path, ModelConfig()), world, FsdpConfig(gather=when), "float32")
        found.append(step(model, world)[1])
    assert worst_relative(found[1], found[0]) < 1e-5


def frees_weights(path: str) -> None:
    """After a step nothing is left whole."""
    world = world_of_all()
    model: Any = shard(load_actor(path, ModelConfig()), world, FsdpConfig(gather="step"), "float32")
    step(model, world)
    assert all(isinstance(p, DTensor) for p in model.parameters())
