"""The proof that a sampler holds the actor's weights: tensors compared bit for bit, in float32 and in bf16.

Semantics pinned here: a correct sync passes whatever the model, its seed and the dtype, and the log-prob probe stays
far below its tolerance; a layer that is not sent, a single flipped bit, two slices of a packed layer that change places
and rows in another order are each refused by name. The engines are real and run in processes of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gadcli.config.schema import RolloutConfig
from gadcli.distributed.world import World
from gadcli.errors import SyncError
from gadcli.launch.environment import engine_variables, free_port
from gadcli.rollout.hf_sampler import HfSampler
from gadcli.rollout.sync_proof import Place, shard_of
from gadcli.rollout.vllm_sampler import _engine_arguments
from gadcli.rollout.weight_sync import TOLERANCES
from model.parts import build_actor
from mutants import mutated
from tiny import write_tiny_model
from train.training import environment

LAYER_1, LAYER_0 = "model.layers.1.", "model.layers.0."
REFUSED = {
    "layer": (f"{LAYER_1}self_attn.o_proj.weight (not loaded)",),
    "bit": (f"{LAYER_0}input_layernorm.weight",),
    "slices": (f"{LAYER_0}self_attn.k_proj.weight", f"{LAYER_0}self_attn.v_proj.weight"),
    "rows": (f"{LAYER_1}mlp.",),
}


def prove(dtype: str, models: list[Path], folder: Path, ranks: int = 1) -> list[dict[str, Any]]:
    """What `proof_checks.py` finds on each rank."""
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(free_port())}
    shared = {**environment(), **engine_variables(), **place, "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(Path(__file__).with_name("proof_checks.py")), str(folder / "found"), dtype]
    processes = []
    for rank in range(ranks):
        env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GAD_STORE_FILE": str(folder / "store")}
        with (folder / f"log.{rank}").open("wb") as log:
            processes.append(subprocess.Popen([*command, *map(str, models)], env=env, stdout=log, stderr=log))
    for rank, process in enumerate(processes):
        process.wait(500)
        assert (folder / f"found.{rank}").exists(), (folder / f"log.{rank}").read_text()[-3000:]
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in range(ranks)]


def assert_refused(found: dict[str, Any]) -> None:
    assert found["unknown"] == []
    assert found["refused"].keys() == REFUSED.keys()
    for fault, names in REFUSED.items():
        assert all(name in found["refused"][fault] for name in names), found["refused"][fault]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_correct_bf16_syncs_pass_and_faulty_ones_are_refused_by_name(family: str, tmp_path: Path) -> None:
    """Three seeds of each shape. The probe's differences are bf16's rounding: far below its tolerance."""
    pytest.importorskip("vllm")
    models = [
        write_tiny_model(tmp_path / f"{seed}", family, seed=seed, tied=family != "qwen3_moe") for seed in range(3)
    ]
    (found,) = prove("bfloat16", models, tmp_path)
    assert_refused(found)
    assert len(found["probe"]) == 3 and max(found["probe"]) < TOLERANCES["lower"] / 10


@pytest.mark.slow
def test_each_rank_of_a_shared_engine_proves_its_shard(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    found = prove("float32", [write_tiny_model(tmp_path / "model")], tmp_path, ranks=2)
    for one in found:
        assert_refused(one)
        assert max(one["probe"]) < 1e-4


def test_transformers_sampler_refuses_a_weight_that_came_otherwise(world: World, model_path: str) -> None:
    faulty = mutated("rollout.hf_sampler", "own[name].copy_(tensor)", "own[name].copy_(tensor.flip(0))").HfSampler
    cfg = RolloutConfig(max_num_seqs=8, max_model_len=64)
    model = build_actor(world, model_path).model
    HfSampler(cfg, model_path, world, [1], torch.bfloat16).load(model)
    with pytest.raises(SyncError, match="bit for bit"):
        faulty(cfg, model_path, world, [1], torch.bfloat16).load(model)


def test_a_rank_compares_the_slices_it_keeps_of_a_packed_layer() -> None:
    """Four query heads and two key heads of size 2 over four ranks: ranks 2 and 3 share the second key head."""
    q, k = torch.arange(8.0)[:, None], torch.arange(100.0, 104.0)[:, None]
    parts = {"q": (0, q), "k": (1, k)}
    for rank in range(4):
        engine = torch.cat([q[2 * rank : 2 * rank + 2], k[2 * (rank // 2) : 2 * (rank // 2) + 2]])
        module = SimpleNamespace(
            weight=torch.nn.Parameter(engine), output_partition_sizes=[2, 2], tp_rank=rank, tp_size=4
        )
        for part, whole in parts.values():
            own = Place("qk_proj", "weight", None, part, 2).slice_of(module)
            assert torch.equal(own, shard_of(whole, own.shape, module))


def test_a_row_parallel_layer_and_padded_embeddings_are_cut_as_the_engine_cuts_them() -> None:
    whole = torch.arange(24.0).view(4, 6)
    module = SimpleNamespace(tp_rank=1, tp_size=2)
    assert torch.equal(shard_of(whole, torch.Size([4, 3]), module), whole[:, 3:])
    indices = SimpleNamespace(num_org_elements=1, org_vocab_start_index=3)
    padded = SimpleNamespace(
        weight=torch.nn.Parameter(torch.cat([whole[3:], torch.zeros(2, 6)])), shard_indices=indices
    )
    own = Place("embed", "weight").slice_of(padded)
    assert torch.equal(own, whole[3:]) and torch.equal(shard_of(whole, own.shape, padded), whole[3:])


def test_a_kv_cache_in_gib_asks_vllm_for_no_share_of_the_card() -> None:
    """An 80-GB card with 12 GiB free beside the models: .92 of it, vLLM's default, would be refused at start-up."""
    world: Any = SimpleNamespace(device=torch.device("cuda", 0))
    arguments = _engine_arguments(RolloutConfig(kv_cache_gb=8.0), "unused", world, torch.bfloat16, 1)
    assert arguments["kv_cache_memory_bytes"] == 8 * 2**30
    assert arguments["gpu_memory_utilization"] * 79.6 < 12
    shared = _engine_arguments(RolloutConfig(gpu_memory_utilization=0.4), "unused", world, torch.bfloat16, 1)
    assert shared["gpu_memory_utilization"] == 0.4 and "kv_cache_memory_bytes" not in shared
