"""Scores of answers by a discriminator that a run trained: `gad eval --discriminator global_step_N/critic`."""

from __future__ import annotations

from gadcli.checkpoint.resolve_model import resolve_model
from gadcli.config.schema import CriticConfig, FsdpConfig, ModelConfig
from gadcli.distributed.fsdp import shard
from gadcli.distributed.world import World
from gadcli.errors import ConfigError
from gadcli.model.critic import Critic
from gadcli.model.loading import load_critic
from gadcli.model.optim import Optimizer
from gadcli.model.packing import Group


def load_discriminator(path: str, values: str, vocabulary: int, dtype: str, world: World) -> Critic:
    """A trained critic, for scoring only. `values` is the run's critic.values.

    Raises ConfigError for a model without a trained head (its scores would be noise) or of another vocabulary.
    """
    loaded = load_critic(str(resolve_model(path, role="critic")), ModelConfig(dtype=dtype), seed=0)
    if loaded.fresh_head:
        raise ConfigError(f"{path}: not a discriminator: no scalar head", "name a global_step_N/critic")
    if loaded.model.config.vocab_size != vocabulary:
        raise ConfigError(f"{path}: has another vocabulary than the student", "they must share a tokenizer")
    cfg = CriticConfig(values=values)
    model = shard(loaded.model, world, FsdpConfig(), dtype)
    return Critic(model, Optimizer(model, cfg.optim, cfg.grad_clip, total_updates=1), cfg, world)


def score(critic: Critic, groups: list[Group]) -> list[list[float]]:
    """Raw scores of each group's answers, in order. Collective: ranks call it together."""
    return [[float(value) for value in raw_B] for raw_B in critic.score(groups)]
