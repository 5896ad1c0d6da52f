"""Where a run comes from: its data's fingerprints, its models' configs and parents, read without loading anything."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gadcli.checkpoint.manifest import MANIFEST, step_of
from gadcli.checkpoint.resolve_model import check_model
from gadcli.config.modelinfo import local_model_dir
from gadcli.config.schema import GadConfig
from gadcli.errors import ConfigError

WHOLE_FILE_BYTES = 64 << 20
EDGE_BYTES = 1 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "vocab.json")


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file; of a large one, sha256 over its size, first and last MiB (a parquet's footer)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        digest = hashlib.sha256(str(size).encode())
        digest.update(file.read(EDGE_BYTES))
        file.seek(-EDGE_BYTES, os.SEEK_END)
        digest.update(file.read(EDGE_BYTES))
    return {"bytes": size, "sha256": digest.hexdigest(), "sampled": True}


def check_model_path(path: str, *, role: str = "actor", dry_run: bool = False) -> None:
    """ConfigError (2) for what is not there or holds no model, CheckpointError (4) for a model or checkpoint that is
    damaged or unsafe. A hub name is the worker's to find; a config.json alone is enough for a plan."""
    local = Path(path).expanduser()
    looks_local = local.is_absolute() or path.startswith(("~", ".")) or path.count("/") > 1 or path.endswith(".gguf")
    if path and looks_local and not local.exists():
        raise ConfigError(f"model {path}: no such file or folder", nearest(local))
    if local.is_file() and local.name == "config.json":
        if not dry_run:
            raise ConfigError(f"model {path}: a config.json alone has no weights", "--dry-run plans with it")
        return
    if local.is_file() and local.suffix.lower() != ".gguf":
        raise ConfigError(f"model {path}: a file that is no .gguf", "--model takes a model's folder, or a .gguf file")
    check_model(path, role=role)


def nearest(path: Path) -> str:
    """What there is instead of a path that is not: the entries of the first folder above it that exists."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))[:8]
    return f"{parent} holds {', '.join(names) or 'nothing'}"


def model_lineage(path: str) -> dict[str, Any]:
    """What a model path stands for: the run and step it came from, and its tokenizer's fingerprint where known."""
    said: dict[str, Any] = {"path": path}
    folder = local_model_dir(path)
    local = Path(path).expanduser()
    step = step_of(local.parent) if local.is_dir() else None
    if step is not None:
        said |= {"run": str(local.parent.parent), "step": step, "manifest": _manifest_hash(local.parent)}
    if folder is not None:
        digest = hashlib.sha256()
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                digest.update(name.encode() + (folder / name).read_bytes())
        said["tokenizer_sha256"] = digest.hexdigest()
    return said


def _manifest_hash(checkpoint: Path) -> str | None:
    manifest = checkpoint / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None


def make_lineage(config: GadConfig, files: Iterable[Path]) -> dict[str, Any]:
    """lineage.json of a new run."""
    parents = {"actor": model_lineage(config.actor.model.path)}
    if config.trainer.critic_warmup >= 0 and config.critic.model.path:
        parents["critic"] = model_lineage(config.critic.model.path)
    return {
        "stage": config.stage,
        "preset": config.preset,
        "parents": parents,
        "data": {str(path): fingerprint(path) for path in files},
    }
