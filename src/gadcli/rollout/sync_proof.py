"""Proof that a sampler runs the actor's weights: its own tensors against the actor's, bit for bit.

Log-probs cannot prove it in bf16: two correct computations of one model differ by more than a stale layer does. The
actor's side is gathered anew, not taken from what was sent; the sampler's is

* the tensor its kernels read, after the load, where it keeps weights as they come: embeddings, norms, on GPUs all
  linear layers. Packed layers (qkv_proj, gate_up_proj) are compared by the slices of their parts, and each rank of a
  tensor-parallel engine compares its own shard;
* what it hands to the packer, at that moment, where kernels read another layout: experts everywhere, on vLLM's CPU
  build all linear layers. Those are then asked for some of their columns too (a product with unit vectors is exact),
  which a packed copy of old weights could not answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from gadcli.errors import SyncError
from gadcli.rollout.weight_sync import ActorWeights

COLUMNS = 8  # of a packed layer that are read back by its own product
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<part>\w+)\.weight")
EXPERT_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # and Mixtral's own names


def checkpoint_form(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A weight as a checkpoint's files name and cut it: transformers joins experts, vLLM loads them one by one."""
    return revert_weight_conversion(model, {name: tensor})


def assert_equal(weights: ActorWeights, names: Sequence[str], own: Mapping[str, Tensor]) -> None:
    """Every weight of `names` against the sampler's of that name (collective); SyncError names those that differ."""
    _refuse([name for name in names if not _same(own[name], weights.whole(name, own[name].dtype))])


@dataclass(frozen=True)
class Place:
    """Where an engine keeps a weight: a module's attribute, an expert of it, and the part of its rows."""

    module: str
    attribute: str
    expert: int | None = None
    part: int = 0  # of the module's parts, in its order
    parts: int = 1

    def slice_of(self, module: Any) -> Tensor:
        """The engine's own tensor of this weight (a view), this rank's shard of it."""
        tensor = getattr(module, self.attribute).data
        if self.expert is not None:
            tensor = tensor[self.expert]
        if hasattr(module, "shard_indices"):  # rows of padding behind the vocabulary
            return tensor[: module.shard_indices.num_org_elements]
        if self.parts == 1:
            return tensor
        sizes = getattr(module, "output_partition_sizes", None) or [len(tensor) // self.parts] * self.parts
        return tensor.split(sizes)[self.part]


def shard_of(whole: Tensor, shape: torch.Size, module: Any) -> Tensor:
    """The part of a whole weight that this rank of a tensor-parallel engine keeps in a tensor of `shape`.

    Where there are fewer shards than ranks (key heads), neighbours hold the same one.
    """
    if hasattr(module, "shard_indices"):
        start = module.shard_indices.org_vocab_start_index
        return whole[start : start + shape[0]]
    rank, size = _tensor_parallel(module)
    for dim, kept in enumerate(shape):
        if kept < whole.shape[dim]:
            shards = whole.shape[dim] // kept
            whole = whole.narrow(dim, rank * shards // size * kept, kept)
    return whole


class EngineProof:
    """The proof for one vLLM engine, of which `engine` is this rank's model."""

    def __init__(self, engine: nn.Module) -> None:
        self.modules: dict[str, Any] = dict(engine.named_modules())
        self.packed: dict[str, list[str]] = dict(getattr(engine, "packed_modules_mapping", None) or {})
        self._layer_of = {
            part: (layer, i, len(parts)) for layer, parts in self.packed.items() for i, part in enumerate(parts)
        }
        self.unknown: list[
            str
        ] = []  # weights of the last sync whose place is not known: the probe alone speaks for them

    def place(self, name: str) -> Place | None:
        """Where the engine keeps a weight of this (checkpoint's) name; None where that is not known."""
        if found := EXPERT.fullmatch(name):
            module, kind = f"{found['experts']}.routed_experts", EXPERT_PARTS.get(found["part"], found["part"])
            place = Place(module, "w2_weight", int(found["index"]))
            if kind != "w2":
                place = Place(module, "w13_weight", int(found["index"]), ("w1", "w3").index(kind), 2)
        else:
            path, _, attribute = name.rpartition(".")
            parent, _, module = path.rpartition(".")
            layer, part, parts = self._layer_of.get(module, (module, 0, 1))
            place = Place(f"{parent}.{layer}".removeprefix("."), attribute, None, part, parts)
        return place if hasattr(self.modules.get(place.module), place.attribute) else None

    @contextmanager
    def around_load(self, actor: Any, names: Sequence[str], dtype: torch.dtype) -> Iterator[None]:
        """Around a load of these weights of the actor (collective). SyncError names those that differ afterwards."""
        weights = ActorWeights(actor)
        places = {name: self._places(actor, name, weights.shape(name)) for name in names}
        self.unknown = [name for name in names if None in places[name].values()]
        packed: dict[str, list[str]] = {}  # names by the module whose packer gets them
        kept: list[str] = []
        for name in names:
            if name not in self.unknown:
                paths = {place.module for place in places[name].values() if place}
                packs = [path for path in paths if _packs(self.modules[path])]
                (packed.setdefault(packs[0], []) if packs else kept).append(name)

        def wrong(some: Sequence[str]) -> list[str]:
            return [name for name in some if not self._holds(places[name], actor, name, weights.whole(name, dtype))]

        found: list[str] = []
        columns: dict[str, Columns] = {}

        def before_packing(path: str) -> None:
            found.extend(wrong(packed.pop(path, ())))
            if hasattr(self.modules[path], "cpu_linear"):
                columns[path] = Columns.of(self.modules[path].weight)

        with _before_packing({path: self.modules[path] for path in packed}, before_packing):
            yield
        found += wrong(kept)
        found += [f"{name} (not loaded)" for some in packed.values() for name in some]
        found += [f"{path} (as packed)" for path, own in columns.items() if not own.are_answered(self.modules[path])]
        _refuse(found)

    def _places(self, actor: Any, name: str, shape: torch.Size) -> dict[str, Place | None]:
        """The places of a weight's pieces: itself, or where the engine does not know it so, what files call it."""
        if (place := self.place(name)) is not None:
            return {name: place}
        return {piece: self.place(piece) for piece in checkpoint_form(actor, name, torch.empty(shape, device="meta"))}

    def _holds(self, places: Mapping[str, Place | None], actor: Any, name: str, whole: Tensor) -> bool:
        """Whether the engine's tensors of a weight (of its pieces, where it keeps those) are the actor's."""
        pieces = {name: whole} if name in places else checkpoint_form(actor, name, whole)
        for piece, place in places.items():
            assert place is not None
            module = self.modules[place.module]
            own = place.slice_of(module)
            if not _same(own, shard_of(pieces[piece], own.shape, module)):
                return False
        return True


def _tensor_parallel(module: Any) -> tuple[int, int]:
    parallel = module.moe_config.moe_parallel_config if hasattr(module, "moe_config") else module
    return getattr(parallel, "tp_rank", 0), getattr(parallel, "tp_size", 1)


def _same(own: Tensor, actors: Tensor) -> bool:
    return torch.equal(own, actors.to(own.device))


def _packs(module: Any) -> bool:
    """Whether the engine's kernels read another layout of this module's weights than they are loaded in."""
    emptied = hasattr(module, "weight") and not module.weight.numel()  # vLLM's CPU build keeps the packed copy alone
    return emptied or hasattr(module, "w13_weight")


@contextmanager
def _before_packing(modules: Mapping[str, Any], do: Callable[[str], None]) -> Iterator[None]:
    """`do(path)` before a module is packed, its weights loaded and still in their own order."""

    def wrap(path: str, module: Any) -> None:
        method = module.quant_method
        plain = method.process_weights_after_loading

        def process(layer: nn.Module) -> None:
            do(path)
            if hasattr(layer, "w13_weight") and layer.w13_weight.device.type == "cpu":
                method.moe_kernel = None  # vLLM 0.32 packs experts for its CPU kernel at the first load alone
            plain(layer)

        method.process_weights_after_loading = process

    for path, module in modules.items():
        wrap(path, module)
    try:
        yield
    finally:
        for module in modules.values():
            del module.quant_method.process_weights_after_loading


@dataclass(frozen=True)
class Columns:
    """Some columns of a linear layer's weight [N, C], and the unit vectors [C, K] whose products with it they are."""

    unit_CK: Tensor
    columns_NC: Tensor

    @staticmethod
    def of(weight_NK: Tensor) -> Columns:
        every = max(1, weight_NK.shape[1] // COLUMNS)
        unit = torch.eye(weight_NK.shape[1], dtype=weight_NK.dtype)
        return Columns(unit[::every].contiguous(), weight_NK[:, ::every].clone())

    def are_answered(self, module: Any) -> bool:
        return torch.equal(module.cpu_linear(self.unit_CK, None, None).T.to(self.columns_NC), self.columns_NC)


def _refuse(names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise SyncError(
            f"after a weight sync the sampler does not hold the student's weights, bit for bit: {shown}",
            "please report this; rollout.engine=hf is slower and avoids vLLM",
        )
