"""The proof of a sync on a real vLLM engine: `python proof_checks.py OUT DTYPE MODEL …` (models of one shape).

Writes {"probe": [difference of each model], "refused": {fault: message}}: what the log-prob probe finds after correct
syncs of every model, and what the proof says of syncs with a fault planted into what is sent.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gadcli.config.schema import FsdpConfig, ModelConfig, RolloutConfig
from gadcli.distributed.world import init_world
from gadcli.errors import SyncError
from gadcli.model.packing import Group
from gadcli.rollout.weight_sync import make_probe
from model.parts import build_actor

IDS = [7, 8, 9, 10, 11, 12, 40, 41, 42, 43, 7, 9, 60, 61, 62, 5]
Pieces = Iterator[tuple[str, torch.Tensor]]


def without_a_layer(pieces: Pieces) -> Pieces:
    return (piece for piece in pieces if "layers.1.self_attn.o_proj" not in piece[0])


def with_an_old_norm(pieces: Pieces) -> Pieces:
    """A single bit of a single weight: the least that can be wrong."""
    for name, tensor in pieces:
        if name.endswith("layers.0.input_layernorm.weight"):
            bits = tensor.clone().view(torch.int16 if tensor.itemsize == 2 else torch.int32)
            bits[3] ^= 1
            tensor = bits.view(tensor.dtype)
        yield name, tensor


def with_slices_swapped(pieces: Pieces) -> Pieces:
    """Keys and values of one layer change places within its packed qkv_proj."""
    other = {"k_proj": "v_proj", "v_proj": "k_proj"}
    for name, tensor in pieces:
        part = name.split(".")[-2]
        yield name.replace(part, other[part]) if "layers.0." in name and part in other else name, tensor


def with_rows_swapped(pieces: Pieces) -> Pieces:
    for name, tensor in pieces:
        mlp = name.endswith(("layers.1.mlp.down_proj.weight", "layers.1.mlp.experts.2.down_proj.weight"))
        yield name, tensor.roll(1, 0) if mlp else tensor


FAULTS: dict[str, Callable[[Pieces], Pieces]] = {
    "layer": without_a_layer, "bit": with_an_old_norm, "slices": with_slices_swapped, "rows": with_rows_swapped,
}  # fmt: skip


def main() -> None:
    out, dtype, *paths = sys.argv[1:]
    torch.set_num_threads(1)
    world = init_world("cpu", FsdpConfig())
    from gadcli.rollout.vllm_sampler import VllmSampler

    compute = getattr(torch, dtype)
    cfg = RolloutConfig(max_num_seqs=16, max_model_len=64, kv_cache_gb=0.02, tensor_parallel_size=world.size)
    sampler = VllmSampler(cfg, paths[0], world, [1], compute, seed=1, weights=False)
    probe = make_probe(IDS, 0.0, compute)
    actors = [build_actor(world, path, model=ModelConfig(dtype=dtype)) for path in paths]
    found: dict[str, Any] = {"probe": [], "refused": {}}
    for actor in actors:
        sampler.load(actor.model)
        logp = actor.logprobs([Group(IDS[:1], [IDS[1:]])], len(IDS) - 1, temperature=1.0)[0].tolist()
        found["probe"].append(probe.check(logp, sampler.logprobs(IDS), 1))
    found["unknown"] = sampler._proof.unknown
    plain = sampler._pieces
    for name, fault in FAULTS.items():
        sampler._pieces = lambda model, wanted, fault=fault: fault(plain(model, wanted))  # type: ignore[method-assign]
        try:
            sampler.load(actors[0].model)
        except SyncError as error:
            found["refused"][name] = error.message
    Path(f"{out}.{world.rank}").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # native libraries sometimes abort in their own teardown


if __name__ == "__main__":
    main()
