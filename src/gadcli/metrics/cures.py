"""The override that fixes one metric, fitted to the run: never a setting that the run already has."""

from __future__ import annotations

from typing import Literal

from gadcli.metrics.facts import RunFacts
from gadcli.metrics.table import Metric


def cure_for(row: Metric, side: Literal["", "low", "high"], facts: RunFacts) -> str:
    """The table's cure for `row` on that side, or the next one where the run follows it already."""
    cure = (row.cure_low or row.cure) if side == "low" else row.cure
    key, _, value = cure.partition("=")
    slower = _scaled("critic.optim.lr", facts.critic_lr, 1 / 3, 3e-7)
    if key == "critic.optim.lr" and facts.critic_lr is not None:
        return _scaled(key, facts.critic_lr, 3.0, 3e-6)
    if key == "critic.loss" and value == facts.loss:
        return f"critic.{value}.score_reg=0.01" if value == "v2_raw" else slower
    if cure == "critic.loss=v2_raw" and facts.loss == "final":
        return "critic.final.score_reg=0.01"
    if cure == "critic.values=last" and facts.values == "last":
        return "critic.loss=final" if facts.loss not in ("final", None) else "critic.label_smoothing=0.1"
    if key == "rollout.temperature" and (facts.temperature or 0) >= 0.8 and (facts.rollout_n or 0) >= 8:
        return "rollout.temperature=1.0 rollout.n=16"
    if key == "data.max_response_length" and facts.max_response_length is not None:
        if row.name == "val/length_auc" and facts.max_response_length <= int(value):
            return "critic.values=last" if facts.values == "all" else "critic.label_smoothing=0.1"
        if facts.max_response_length <= int(value):
            return f"{key}={2 * facts.max_response_length}"
    if row.name == "actor/grad_norm" and side == "high" and facts.actor_lr is not None:
        return f"actor.grad_clip=1.0 {_scaled('actor.optim.lr', facts.actor_lr, 1 / 3, 1e-6)}"
    return cure


def _scaled(key: str, value: float | None, factor: float, otherwise: float) -> str:
    return f"{key}={value * factor if value else otherwise:.0e}".replace("e-0", "e-")
