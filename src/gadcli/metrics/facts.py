"""What is known of a run's settings when its numbers are judged: from its log's header and its config.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunFacts:
    """Settings that decide which values are healthy; None where a run does not say."""

    stage: str | None = None
    objective: str | None = None
    loss: str | None = None
    values: str | None = None
    critic_warmup: int | None = None
    ppo_epochs: int | None = None
    mini_batches: int | None = None
    rollout_n: int | None = None
    temperature: float | None = None
    max_response_length: int | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    loss_mode: str | None = None
    actor_lr: float | None = None
    critic_lr: float | None = None
    margin: float = 1.0

    @property
    def sft(self) -> bool:
        """The actor learns by likelihood or preference, so there is no policy gradient to judge."""
        return self.objective in ("sft", "soda", "best_of_n") or self.stage == "seqkd" or self.critic_warmup == -1

    @property
    def on_policy(self) -> bool | None:
        """One pass over one mini-batch: the ratio is 1 by construction. None where unknown."""
        if self.ppo_epochs is None or self.mini_batches is None:
            return None
        return self.ppo_epochs == 1 and self.mini_batches == 1

    @classmethod
    def of(cls, header: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> RunFacts:
        """Facts from a metrics.jsonl header, completed by the run's resolved config; the header wins."""
        config = config or {}

        def text(name: str, key: str) -> str | None:
            value = header.get(name, _dig(config, key))
            return value if isinstance(value, str) and value else None

        def number(name: str, key: str) -> float | None:
            return _number(header.get(name, _dig(config, key)))

        def whole(name: str, key: str) -> int | None:
            value = number(name, key)
            return None if value is None else int(value)

        loss = text("critic_loss", "critic.loss")
        margin = _number(_dig(config, f"critic.{loss}.margin"))
        return cls(
            stage=text("stage", "stage"),
            objective=text("objective", "actor.objective"),
            loss=loss,
            values=text("critic_values", "critic.values"),
            critic_warmup=whole("critic_warmup", "trainer.critic_warmup"),
            ppo_epochs=whole("ppo_epochs", "actor.ppo_epochs"),
            mini_batches=whole("mini_batches", ""),
            rollout_n=whole("rollout_n", "rollout.n"),
            temperature=number("temperature", "rollout.temperature"),
            max_response_length=whole("max_response_length", "data.max_response_length"),
            clip_low=number("clip_ratio_low", "actor.clip_ratio_low"),
            clip_high=number("clip_ratio_high", "actor.clip_ratio_high"),
            loss_mode=text("loss_mode", "actor.policy_loss.loss_mode"),
            actor_lr=number("actor_lr", "actor.optim.lr"),
            critic_lr=number("critic_lr", "critic.optim.lr"),
            margin=1.0 if margin is None else margin,
        )


def _number(value: Any) -> float | None:
    """A number; YAML 1.1 reads 3e-4 (without a point) as text, so text that spells one counts."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _dig(tree: Mapping[str, Any], dotted: str) -> Any:
    node: Any = tree
    for key in dotted.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def read_config(run_dir: Path) -> dict[str, Any] | None:
    """The run's config.yaml as plain data, or None where there is none that can be read."""
    import yaml

    try:
        loaded = yaml.safe_load((run_dir / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return loaded if isinstance(loaded, dict) else None
