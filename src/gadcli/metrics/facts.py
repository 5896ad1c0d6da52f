"""What is known of a run's settings when its numbers are judged: from its log's header and its config.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


def _of(key: str = "", header: str = "", default: Any = None) -> Any:
    """A fact that metrics.jsonl's header holds under `header` (its own name) and config.yaml under `key`."""
    return field(default=default, metadata={"key": key, "header": header})


@dataclass(frozen=True)
class RunFacts:
    """Settings that decide which values are healthy; None where a run does not say."""

    stage: str | None = _of("stage")
    objective: str | None = _of("actor.objective")
    loss: str | None = _of("critic.loss", "critic_loss")
    values: str | None = _of("critic.values", "critic_values")
    critic_warmup: int | None = _of("trainer.critic_warmup")
    ppo_epochs: int | None = _of("actor.ppo_epochs")
    mini_batches: int | None = _of()
    rollout_n: int | None = _of("rollout.n")
    temperature: float | None = _of("rollout.temperature")
    max_response_length: int | None = _of("data.max_response_length")
    clip_low: float | None = _of("actor.clip_ratio_low", "clip_ratio_low")
    clip_high: float | None = _of("actor.clip_ratio_high", "clip_ratio_high")
    loss_mode: str | None = _of("actor.policy_loss.loss_mode")
    actor_lr: float | None = _of("actor.optim.lr")
    critic_lr: float | None = _of("critic.optim.lr")
    margin: float = _of("critic.{loss}.margin", default=1.0)

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
        found: dict[str, Any] = {}
        value: Any
        for fact in fields(cls):
            key = fact.metadata["key"].format(loss=found.get("loss"))
            raw = header.get(fact.metadata["header"] or fact.name, _dig(config or {}, key))
            if str(fact.type).startswith("str"):
                value = raw if isinstance(raw, str) and raw else None
            else:
                value = _number(raw)
                value = int(value) if value is not None and str(fact.type).startswith("int") else value
            if value is not None:
                found[fact.name] = value
        return cls(**found)


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
