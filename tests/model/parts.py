"""Tiny actors, critics and rollouts for one process, and gradients read back from an optimiser that stood still."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gadcli.algo.mean import Mean
from gadcli.config.schema import ActorConfig, CriticConfig, FsdpConfig, LoraConfig, ModelConfig, OptimConfig
from gadcli.data.batches import TokenizedRow
from gadcli.distributed.fsdp import shard
from gadcli.distributed.world import World
from gadcli.model.actor import Actor
from gadcli.model.critic import Critic
from gadcli.model.loading import load_actor, load_critic
from gadcli.model.optim import Optimizer
from gadcli.model.rollout_batch import Answer, Rollout

EOS = 1
TEMPERATURE = 0.8
# A learning rate of 0 leaves the weights alone; beta1 = 0 makes Adam's first moment the last gradient itself.
STILL = OptimConfig(lr=0.0, weight_decay=0.0, beta1=0.0)


def build_actor(world: World, path: str, cls: type[Actor] = Actor, *, lora: int = 0, **settings: Any) -> Actor:
    """An unclipped actor; `settings` are fields of ActorConfig, `lora` a rank."""
    model = settings.pop("model", ModelConfig(lora=LoraConfig(rank=lora)))
    cfg = ActorConfig(model=model, **({"optim": OptimConfig(lr=1e-3), "grad_clip": 0.0} | settings))
    module = shard(load_actor(path, model), world, FsdpConfig(), "float32" if model.dtype == "auto" else model.dtype)
    return cls(module, Optimizer(module, cfg.optim, cfg.grad_clip, 100), cfg, world, TEMPERATURE, 16)


def build_critic(world: World, path: str, cls: type[Critic] = Critic, *, seed: int = 5, **settings: Any) -> Critic:
    """An unclipped critic with a scalar head drawn from `seed`; `settings` are fields of CriticConfig, and `fsdp`."""
    fsdp = settings.pop("fsdp", FsdpConfig())
    cfg = CriticConfig(**({"optim": OptimConfig(lr=1e-3), "grad_clip": 0.0} | settings))
    loaded = load_critic(path, cfg.model, seed, twice_differentiable=cfg.gradient_penalty > 0)
    module = shard(loaded.model, world, fsdp, "float32" if cfg.model.dtype == "auto" else cfg.model.dtype)
    return cls(module, Optimizer(module, cfg.optim, cfg.grad_clip, 100), cfg, world)


def tiny_rollout(prompts: int = 4, group: int = 3, *, seed: int = 7, with_empty: bool = False) -> Rollout:
    """Ragged prompts and answers of random tokens, each with EOS; `with_empty` makes one answer empty."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(2, 250, (n,), generator=draw).tolist()

    rows, answers = [], []
    for row_id in range(prompts):
        rows.append(TokenizedRow(row_id + 100, ids(3, 12), [*ids(2, 9), EOS], [], ""))
        drawn = [[*ids(1, 9), EOS] for _ in range(group)]
        answers.append([Answer(a, [-1.0] * len(a), True) for a in drawn])
    if with_empty:
        answers[1][0] = Answer([], [], False)
    return Rollout(rows, answers)


def same_answers(rollout: Rollout) -> Rollout:
    """The same prompts, with every student's answer replaced by the teacher's text, EOS included."""
    answers = [
        [Answer(list(row.teacher_ids), [-1.0] * len(row.teacher_ids), True) for _ in group]
        for row, group in zip(rollout.rows, rollout.answers, strict=True)
    ]
    return dataclasses.replace(rollout, answers=answers)


def last_gradient(part: Actor | Critic) -> dict[str, torch.Tensor]:
    """The last step's gradient by parameter name, of an actor or critic built with `optim=STILL`."""
    moments = {id(p): part.optimizer.adamw.state[p].get("exp_avg") for p in part.optimizer.parameters}
    named = {name: moments.get(id(p)) for name, p in part.model.named_parameters()}
    return {name: whole(m).clone() for name, m in named.items() if m is not None}


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of every parameter, whole (a forward pass without its backward has left layers gathered)."""
    resharded(model)
    return {name: whole(p).detach().clone() for name, p in model.named_parameters()}


def resharded(model: Any) -> None:
    """Give gathered parameters back, as a backward pass would: the model then holds what the optimiser moves."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter or moment of all ranks; a world of one in float32 is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter, in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def worst_relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest |a - b| / |b| over tensors of the same name."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)) for n in a)


def values(metrics: dict[str, Mean]) -> dict[str, float]:
    return {name: mean.value for name, mean in metrics.items()}


def spread_advantages(rollout: Rollout, seed: int = 11) -> torch.Tensor:
    """Random advantages [P, G] of mean 0 in each group."""
    draw = torch.Generator().manual_seed(seed)
    raw_PG = torch.randn(len(rollout.rows), len(rollout.answers[0]), generator=draw)
    return raw_PG - raw_PG.mean(1, keepdim=True)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], names: Sequence[str] = ()) -> set[str]:
    """Names of the parameters whose bits differ."""
    return {name for name in (names or before) if not torch.equal(before[name], after[name])}
