"""The actor's weights as the sampler wants them, and the proof that the sampler runs them.

`full_tensors` is collective: every rank must consume all of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor

from gadcli.distributed.watchdog import WATCHDOG
from gadcli.errors import SyncError


def full_tensors(model: nn.Module, only: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under its plain Hugging Face name, whole, one at a time; LoRA deltas merged into their base.

    A tied head is sent as `lm_head.weight` too: samplers that have packed their weights would otherwise keep the old
    one and only warn. `only` (the same on every rank) leaves out, and does not gather, what it does not name.
    """
    adapters = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, value in model.state_dict().items():
        if ".lora_" in name or (only is not None and plain_name(name) not in only):
            continue
        WATCHDOG.beat()
        owner = name.rsplit(".base_layer.", 1)[0] if ".base_layer." in name else None
        full = _full(value)
        if owner is not None and name.endswith(".base_layer.weight"):
            full = full + lora_delta(adapters[owner]).to(full.dtype)
        yield plain_name(name), full


def plain_name(name: str) -> str:
    """A weight's name in the model without adapters."""
    return name.replace(".base_layer.", ".")


def weight_names(model: nn.Module) -> list[str]:
    """What `full_tensors` sends, in its order."""
    return [plain_name(name) for name in model.state_dict() if ".lora_" not in name]


def changing_names(model: nn.Module) -> set[str]:
    """The weights that training moves: those with gradients, and the bases of adapters that have them."""
    moved = {id(p) for p in model.parameters() if p.requires_grad}
    found = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in moved}
    return {name.split(".lora_")[0] + ".weight" if ".lora_" in name else plain_name(name) for name in found}


def whole_layers(names: Sequence[str], some: Collection[str], packed: Mapping[str, Sequence[str]]) -> set[str]:
    """`some` of `names` and whatever shares a layer with them in a sampler that packs modules: {its layer: ours}.

    vLLM loads a layer anew or not at all; its `qkv_proj` is our `q_proj`, `k_proj` and `v_proj`, biases included.
    """
    layer_of = {ours: layer for layer, parts in packed.items() for ours in parts}

    def layer(name: str) -> str:
        parent, _, module = name.rpartition(".")[0].rpartition(".")
        return f"{parent}.{layer_of.get(module, module)}"

    touched = {layer(name) for name in some}
    return {name for name in names if layer(name) in touched}


def lora_delta(layer: Any) -> torch.Tensor:
    """(alpha / r) * B @ A of a LoRA layer's default adapter, whole."""
    a, b = _full(layer.lora_A["default"].weight), _full(layer.lora_B["default"].weight)
    return float(layer.scaling["default"]) * (b @ a)


def _full(value: torch.Tensor) -> torch.Tensor:
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach()


@dataclass(frozen=True)
class Probe:
    """A fixed text whose token log-probs (temperature 1) actor and sampler must agree on after every sync.

    `tolerance` bounds the largest difference in float32; in lower precision it bounds the mean one.
    """

    ids: list[int]
    tolerance: float
    by_mean: bool

    def check(self, actor_logp: list[float], sampler_logp: list[float], version: int) -> float:
        """The difference that counts; raises SyncError, with the figures, when it is over the tolerance."""
        differences = [abs(a - b) for a, b in zip(actor_logp, sampler_logp, strict=True)]
        worst, mean = max(differences), sum(differences) / len(differences)
        judged = mean if self.by_mean else worst
        if not judged <= self.tolerance:  # also catches NaN
            kind = "mean" if self.by_mean else "largest"
            raise SyncError(
                f"after syncing weights for step {version}, sampler and actor differ: {kind} |log-prob difference| "
                f"{judged:.3g} over {len(differences)} probe tokens (mean {mean:.3g}, max {worst:.3g}), "
                f"tolerance {self.tolerance:g}",
                "please report this; rollout.engine=hf is slower and avoids the engine, "
                "rollout.sync_tolerance=… widens the check",
            )
        return judged


def make_probe(ids: list[int], tolerance: float, dtype: torch.dtype, max_tokens: int = 64) -> Probe:
    """A probe over the first `max_tokens` of `ids`; tolerance 0 takes 1e-3 (max) in float32, 0.02 (mean) otherwise."""
    exact = dtype == torch.float32
    return Probe(ids[:max_tokens], tolerance or (1e-3 if exact else 0.02), by_mean=not exact)
