"""Reads verl's FSDP rank files (`model_world_size_W_rank_R.pt`, FSDP1 and FSDP2) as a merge source: no torch, no verl.

Rank R's file is a torch-saved dict of DTensors, all on mesh ("fsdp",) or, hybrid, ("ddp", "fsdp"). The local tensors
of one replica's ranks, concatenated along dim 0 in rank order, are the whole; chunks are uneven and may be empty.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gadcli.checkpoint.hf_folder import read_json
from gadcli.checkpoint.merge.ours import lora_from_peft
from gadcli.checkpoint.merge.source import LoraInfo, Source
from gadcli.checkpoint.merge.tensors import Part, SourceTensor, whole
from gadcli.checkpoint.safe_unpickle import Inert, Strided, TorchZip, Wrapped
from gadcli.errors import CheckpointError

_NAME = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt\Z")
_MESHES = (("fsdp",), ("ddp", "fsdp"), ("dp", "fsdp"))
_PEFT_PREFIX = "base_model.model."


def is_verl(folder: Path) -> bool:
    """Whether a folder holds verl's rank files."""
    return any(_NAME.match(p.name) for p in folder.iterdir())


def read_verl(folder: Path) -> Source:
    """One model's folder (`global_step_N/actor`). Raises CheckpointError naming the file or tensor that is wrong."""
    world, version = _world_size(folder)
    first = _read_rank(folder, world, 0)
    ranks = [first]
    tensors: dict[str, SourceTensor] = {}
    if any(isinstance(v, Wrapped) for v in first.values()):
        ranks += _replica(folder, world, first)
    for key, value in first.items():
        if isinstance(value, Wrapped):
            tensor = _join(folder, key, [rank.get(key) for rank in ranks])
        else:
            tensor = whole(key, value)
        name = _plain_name(key)
        if name in tensors:
            raise CheckpointError(f"{folder}: two tensors are called {name}", "not a checkpoint verl wrote")
        tensors[name] = SourceTensor(name, tensor.dtype, tensor.shape, tensor.parts)
    lineage = {"kind": "verl", "model": folder.name, "run": folder.parent.parent.name, "world_size": world}
    step = re.match(r"global_step_(\d+)\Z", folder.parent.name)
    lineage |= {"step": int(step.group(1))} if step else {}
    lineage |= {"fsdp_version": version} if version else {}
    assets = folder / "huggingface"
    source = Source(folder, "verl", tensors, assets if assets.is_dir() else None, lineage)
    if source.has_lora:
        source.lora = _lora_info(folder)
    return source


def _world_size(folder: Path) -> tuple[int, int | None]:
    """(W, FSDP version or None): from fsdp_config.json, else from the file names."""
    config = folder / "fsdp_config.json"
    if config.is_file():
        said = read_json(config)
        world, version = said.get("world_size"), said.get("FSDP_version")
        if type(world) is not int or world < 1:
            raise CheckpointError(f"{config}: world_size is {world!r}", "not a checkpoint verl wrote")
        return world, version if isinstance(version, int) else None
    worlds = {int(m.group(1)) for p in folder.iterdir() if (m := _NAME.match(p.name))}
    if len(worlds) != 1:
        what = f"world sizes {sorted(worlds)} mixed" if worlds else "no model_world_size_W_rank_R.pt"
        raise CheckpointError(f"{folder}: {what}", "name a folder with one checkpoint's rank files")
    return worlds.pop(), None


def _read_rank(folder: Path, world: int, rank: int) -> dict[str, Any]:
    path = folder / f"model_world_size_{world}_rank_{rank}.pt"
    try:
        with open(path, "rb") as stream:
            state = TorchZip(path, stream).obj
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "a rank's shard is missing: copy it again") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise CheckpointError(f"{path}: holds no state dict", "not a checkpoint verl wrote")
    for key, value in state.items():
        wrapped = isinstance(value, Wrapped) and value.kind == "DTensor"
        if not wrapped and not isinstance(value, Strided):
            raise CheckpointError(f"{path}: {key} is a {type(value).__name__}, not a tensor", "not read")
    return state


def _replica(folder: Path, world: int, first: dict[str, Any]) -> list[dict[str, Any]]:
    """Files of ranks 1, 2, … until every tensor is whole: all ranks, or under a hybrid mesh the first replica's."""
    hybrid = any(len(_spec(folder, k, v)[0]) == 2 for k, v in first.items() if isinstance(v, Wrapped))
    rows = {k: _local(v).shape[0] if v.shape else 0 for k, v in first.items() if _sharded(folder, k, v)}
    ranks: list[dict[str, Any]] = []
    for rank in range(1, world):
        if hybrid and all(rows[k] >= first[k].shape[0] for k in rows):
            break
        state = _read_rank(folder, world, rank)
        if state.keys() != first.keys():
            raise CheckpointError(
                f"{folder}: ranks 0 and {rank} hold different tensors", "files of two checkpoints are mixed"
            )
        for key in rows:
            if isinstance(state[key], Wrapped):
                rows[key] += _local(state[key]).shape[0]
        ranks.append(state)
    return ranks


def _local(value: Wrapped) -> Strided:
    local = value.state.get("_local_tensor") if isinstance(value.state, dict) else None
    if not isinstance(local, Strided):
        raise CheckpointError("a DTensor without its local tensor", "not a checkpoint verl wrote")
    return local


def _spec(folder: Path, key: str, value: Wrapped) -> tuple[list[str], tuple[str, ...] | None]:
    """(placements as 'Shard(0)' or 'Replicate', mesh dimension names)."""
    spec = value.state.get("_spec") if isinstance(value.state, dict) else None
    if not isinstance(spec, Inert):
        raise CheckpointError(f"{folder}: {key} has no placements", "not a checkpoint verl wrote")
    placements = []
    for placement in spec.get("placements") or ():
        kind = type(placement).__name__
        placements.append(f"{kind}({placement.get('dim')})" if kind != "Replicate" else kind)
    mesh = spec.get("mesh")
    names = None
    if isinstance(mesh, Inert):
        names = mesh.get("_mesh_dim_names") or mesh.get("mesh_dim_names")
    if names is not None and tuple(names) not in _MESHES:
        raise CheckpointError(f"{folder}: {key} is on a mesh {tuple(names)}: not supported", "use verl's own merger")
    if placements[:-1] not in ([], ["Replicate"]) or placements[-1:] not in (["Shard(0)"], ["Replicate"]):
        said = ", ".join(placements) or "none"
        raise CheckpointError(f"{folder}: {key} has placements ({said}): not supported", "use verl's own merger")
    return placements, None if names is None else tuple(names)


def _sharded(folder: Path, key: str, value: Any) -> bool:
    return isinstance(value, Wrapped) and _spec(folder, key, value)[0][-1] == "Shard(0)"


def _join(folder: Path, key: str, values: list[Any]) -> SourceTensor:
    first = values[0]
    if not _sharded(folder, key, first):
        return whole(key, _local(first))
    parts, row = [], 0
    for rank, value in enumerate(values):
        if not isinstance(value, Wrapped) or value.shape != first.shape:
            raise CheckpointError(f"{folder}: {key} differs in shape between ranks 0 and {rank}", "mixed checkpoints?")
        local = _local(value)
        if local.shape[1:] != first.shape[1:]:
            raise CheckpointError(f"{folder}: {key}: rank {rank} holds {local.shape} of {first.shape}", "not read")
        parts.append(Part((row, *([0] * (len(first.shape) - 1))), local))
        row += local.shape[0]
    tensor = SourceTensor(key, _local(first).dtype, first.shape, tuple(parts))
    tensor.check()
    return tensor


def _plain_name(key: str) -> str:
    """Without the wrappers' parts: FSDP1's, torch.compile's, and peft's prefix of a wrapped model."""
    name = key.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")
    return name.removeprefix(_PEFT_PREFIX)


def _lora_info(folder: Path) -> LoraInfo | None:
    meta = folder / "lora_train_meta.json"
    if meta.is_file():
        said = read_json(meta)
        try:
            return LoraInfo(float(said["lora_alpha"]), int(said["r"]), task_type=str(said.get("task_type") or ""))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{meta}: no r and lora_alpha", "--lora-alpha A") from error
    for saved in (folder / "lora_adapter" / "adapter_config.json", folder / "huggingface" / "adapter_config.json"):
        if saved.is_file():
            return lora_from_peft(saved)
    return None
