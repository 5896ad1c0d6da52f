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


class ActorWeights:
    """An actor's weights under their plain Hugging Face names, whole and one at a time; LoRA deltas merged.

    A tied head is there as `lm_head.weight` too: samplers that pack their weights would otherwise keep the old one and
    only warn.
    """

    def __init__(self, model: nn.Module) -> None:
        self._adapters = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
        self._stored = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
        self._own_name = {plain_name(name): name for name in self._stored}
        self.names = list(self._own_name)

    def shape(self, name: str) -> torch.Size:
        return self._stored[self._own_name[name]].shape

    def whole(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One weight of all ranks (collective), cast to `dtype` (default: as it is stored).

        A merged weight is added up in float32 and cast once. Others are cast before they are gathered, which halves
        what a sampler in bf16 costs the network; the bits are the same.
        """
        own = self._own_name[name]
        value = self._stored[own]
        owner = own.removesuffix(".base_layer.weight")
        if owner == own:
            return _full(value if dtype is None else value.to(dtype))
        merged = _full(value).float() + lora_delta(self._adapters[owner]).float()
        return merged.to(dtype or value.dtype)


def full_tensors(
    model: nn.Module, only: Collection[str] | None = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight by name, whole, one at a time (see `ActorWeights`).

    `only` (the same on every rank) leaves out, and does not gather, what it does not name.
    """
    weights = ActorWeights(model)
    for name in weights.names:
        if only is None or name in only:
            WATCHDOG.beat()
            yield name, weights.whole(name, dtype)


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


TOLERANCES = {"float32": 1e-3, "lower": 0.5}  # nats a token: the largest difference, and the mean one


@dataclass(frozen=True)
class Probe:
    """A fixed text whose token log-probs (temperature 1) actor and sampler must agree on after every sync.

    `tolerance` bounds the largest difference in float32, the mean one in lower precision. There it is a sanity check
    alone: two correct bf16 computations of a 135M model differ by .05 nats a token, more than many a stale layer
    would show. What proves a sync is the comparison of tensors (`sync_proof`).
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
    """A probe over the first `max_tokens` of `ids`; tolerance 0 takes `TOLERANCES`."""
    kind = "float32" if dtype == torch.float32 else "lower"
    return Probe(ids[:max_tokens], tolerance or TOLERANCES[kind], by_mean=kind != "float32")
