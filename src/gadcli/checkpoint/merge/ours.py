"""Reads our own checkpoints (DCP shards) as a merge source: no torch, the `.metadata` through inert stand-ins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gadcli.checkpoint.dcp_metadata import DcpIndex, read_dcp_index
from gadcli.checkpoint.hf_folder import read_json
from gadcli.checkpoint.manifest import MANIFEST, verify
from gadcli.checkpoint.merge.source import LoraInfo, Source
from gadcli.checkpoint.merge.tensors import Part, SourceTensor
from gadcli.checkpoint.safe_unpickle import Strided, TorchZip
from gadcli.errors import CheckpointError


def read_ours(folder: Path, *, trust: bool = False) -> Source:
    """`global_step_N/actor` or `critic`. Without our manifest beside it, only with `trust`.

    Raises CheckpointError for what is missing, cut, mixed or hostile; sha256 of the files is `Source.integrity`.
    """
    checkpoint, name = folder.parent, folder.name
    lineage: dict[str, Any] = {"kind": "gad", "model": name}
    allowed, integrity = None, None
    if (checkpoint / MANIFEST).is_file():
        manifest = verify(checkpoint, [f"{name}/"], deep=False)
        verify(checkpoint, [f"{name}/.metadata", f"{name}/huggingface/"])
        if f"{name}/.metadata" not in manifest.files:
            raise CheckpointError(f"{folder}: not listed in {MANIFEST}", f"it lists: {', '.join(manifest.models)}")
        allowed = [f.removeprefix(f"{name}/") for f in manifest.files if f.startswith(f"{name}/")]
        lineage |= {"run": checkpoint.parent.name, "step": manifest.step, "stage": manifest.stage,
                    "config_hash": manifest.config_hash, "world_size": manifest.world_size,
                    "metrics": manifest.metrics}  # fmt: skip

        def integrity() -> None:
            verify(checkpoint, [f"{name}/"])
    elif not trust:
        raise CheckpointError(
            f"{folder}: no {MANIFEST} beside it: not a checkpoint of gad, or an unfinished one",
            "--trust-checkpoint merges it anyway; nothing in it is executed either way",
        )
    index = read_dcp_index(folder, allowed)
    tensors = _tensors(folder, index)
    assets = folder / "huggingface"
    source = Source(folder, "gad", tensors, assets if assets.is_dir() else None, lineage, integrity=integrity)
    run, saved = _run_settings(folder), assets / "adapter_config.json"
    base = read_json(saved).get("base_model_name_or_path") if saved.is_file() else run.get("path")
    if base:
        lineage["base"] = str(base)
    if source.has_lora:
        source.lora = _lora_info(folder, run)
    return source


def _tensors(folder: Path, index: DcpIndex) -> dict[str, SourceTensor]:
    streams = {}
    tensors = {}
    try:
        for name in sorted(index.tensors):
            entry = index.tensors[name]
            parts = []
            for chunk in entry.chunks:
                path = folder / chunk.stored.file
                if path not in streams:
                    streams[path] = _open(path)
                item = TorchZip(path, streams[path], chunk.stored.offset, chunk.stored.length).obj
                if not isinstance(item, Strided) or item.shape != chunk.sizes or item.dtype != entry.dtype:
                    raise CheckpointError(f"{path}: {name} is not what .metadata says", "use another checkpoint")
                parts.append(Part(chunk.offsets, item))
            tensors[name] = SourceTensor(name, entry.dtype, entry.shape, tuple(sorted(parts, key=lambda p: p.offsets)))
            tensors[name].check()
    finally:
        for stream in streams.values():
            stream.close()
    return tensors


def _open(path: Path) -> Any:
    try:
        return open(path, "rb")  # closed by the caller once all items are read
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "a rank's shard is missing: copy it again") from error


def _run_settings(folder: Path) -> dict[str, Any]:
    """The model's section of the run's config.yaml; {} where a checkpoint lies without its run."""
    config = folder.parent.parent / "config.yaml"
    if not config.is_file():
        return {}
    import yaml

    try:
        return dict(yaml.safe_load(config.read_text())[folder.name]["model"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError, UnicodeDecodeError):
        return {}


def _lora_info(folder: Path, run: dict[str, Any]) -> LoraInfo | None:
    """Alpha and rank of the adapter: from its saved adapter_config.json, else from the run's settings."""
    saved = folder / "huggingface" / "adapter_config.json"
    if saved.is_file():
        return lora_from_peft(saved)
    try:
        return LoraInfo(float(run["lora"]["alpha"]), int(run["lora"]["rank"]))
    except (KeyError, TypeError, ValueError):
        return None


def lora_from_peft(path: Path) -> LoraInfo:
    """The scale in a peft adapter_config.json; CheckpointError for variants that are not plain LoRA."""
    config = read_json(path)
    odd = [k for k in ("rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "layer_replication")
           if config.get(k)]  # fmt: skip
    if odd:
        raise CheckpointError(f"{path}: {', '.join(odd)} is not supported", "merge it with peft itself")
    try:
        return LoraInfo(float(config["lora_alpha"]), int(config["r"]), bool(config.get("use_rslora")),
                        str(config.get("task_type") or ""))  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no r and lora_alpha", "--lora-alpha A") from error
