"""What the ranks of the merge tests run: small models under real FSDP1 and FSDP2, saved the way verl and gad save.

Every job also writes `whole.safetensors`: the tensors as the sharding library itself puts them together
(`full_tensor()`), which is what a merge must equal bit for bit.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardedOptimStateDictConfig, ShardedStateDictConfig, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from gadcli.train.checkpoint import save_checkpoint
from merge.models import build


def mesh_of(fsdp_size: int) -> DeviceMesh:
    """verl's create_device_mesh: ("fsdp",) over all ranks, else ("ddp", "fsdp")."""
    world = dist.get_world_size()
    if fsdp_size in (0, world):
        return init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    return init_device_mesh("cpu", (world // fsdp_size, fsdp_size), mesh_dim_names=("ddp", "fsdp"))


def shard(model: nn.Module, version: int, fsdp_size: int) -> nn.Module:
    """Each decoder layer a unit, the rest the root, as verl and gad wrap."""
    mesh = mesh_of(fsdp_size)
    layers = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
    if version == 2:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    policy = ModuleWrapPolicy({type(layers[0])})
    strategy: Any = torch.distributed.fsdp.ShardingStrategy.FULL_SHARD
    if mesh.ndim == 2:
        strategy = torch.distributed.fsdp.ShardingStrategy.HYBRID_SHARD
    return FSDP(model, auto_wrap_policy=policy, device_mesh=mesh, use_orig_params=True, sharding_strategy=strategy,
                device_id=torch.device("cpu"))  # fmt: skip


def sharded_state(model: nn.Module, version: int) -> dict[str, Any]:
    """verl's get_fsdp_state_ctx(SHARDED_STATE_DICT) around model.state_dict()."""
    if version == 2:
        return model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(),
                                  ShardedOptimStateDictConfig()):  # fmt: skip
            return model.state_dict()


def write_whole(state: dict[str, Any], folder: Path) -> None:
    """whole.safetensors: every tensor gathered by torch itself."""
    gathered = {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for k, v in state.items()}
    if dist.get_rank() == 0:
        save_file({k: v.contiguous() for k, v in gathered.items()}, folder / "whole.safetensors")


def save_as_verl(out: str, kind: str, version: str, fsdp_size: str, metadata: str) -> None:
    """One model folder as verl's FSDPCheckpointManager writes it. metadata "no": without the two JSON files."""
    folder = Path(out)
    rank, world = dist.get_rank(), dist.get_world_size()
    model, lora = build(kind)
    config = model.config
    model = shard(model, int(version), int(fsdp_size))
    state = sharded_state(model, int(version))
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    torch.save(state, folder / f"model_world_size_{world}_rank_{rank}.pt")
    write_whole(state, folder)
    if rank == 0:
        config.architectures = ["LlamaForCausalLM"]  # what verl's critics say too
        config.save_pretrained(folder / "huggingface")
        if metadata == "yes":
            (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": int(version), "world_size": world}))
            if lora:
                meta = {"r": lora[0], "lora_alpha": lora[1], "task_type": "CAUSAL_LM"}
                (folder / "lora_train_meta.json").write_text(json.dumps(meta))


def save_as_gad(run_dir: str, kind: str) -> None:
    """A committed global_step_3 of gad with one model, under FSDP2."""
    model, lora = build(kind)
    config = model.config
    sharded = shard(model, 2, 0)
    name = "critic" if kind == "critic" else "actor"
    state = sharded.state_dict()

    def assets(folder: Path) -> None:
        config.save_pretrained(folder)

    save_checkpoint(
        Path(run_dir), 3, stage="gad", config_hash="c0ffee", models={name: state}, optims={}, trainer={"step": 3},
        rng={}, assets={name: assets}, metrics={"val/rouge_l": 0.5},
    )  # fmt: skip
    write_whole(state, Path(run_dir))
    if lora and dist.get_rank() == 0:
        text = f"{name}:\n  model:\n    lora: {{rank: {lora[0]}, alpha: {lora[1]}}}\n"
        (Path(run_dir) / "config.yaml").write_text(text)
