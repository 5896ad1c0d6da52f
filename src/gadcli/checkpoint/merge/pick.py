"""Which folders a CHECKPOINT argument means: one model, both of a step, or the newest step of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gadcli.checkpoint.manifest import MANIFEST, latest_valid, read_manifest, step_of
from gadcli.checkpoint.merge.verl import is_verl
from gadcli.checkpoint.other_folders import name_folder
from gadcli.errors import CheckpointError, ConfigError

ROLES = ("actor", "critic")


def models_in(path: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """Name -> folder of every model `path` stands for; one entry "" for a single model's own folder.

    Raises ConfigError if there is no such folder, CheckpointError if it holds no checkpoint.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder", "gad merge runs/NAME/global_step_N/actor -o DIR")
    if (path / ".metadata").is_file() or is_verl(path):
        return {"": path}
    if (path / MANIFEST).is_file():
        return {name: path / name for name in read_manifest(path).models}
    found = {role: path / role for role in ROLES if (path / role).is_dir() and is_verl(path / role)}
    if found:
        return found
    if step_of(path) is not None:
        raise CheckpointError(
            f"{path}: no {MANIFEST} and no rank files: never finished, or parts are missing",
            "use an earlier global_step_N; name the model's folder and --trust-checkpoint for foreign DCP shards",
        )
    marker = path / "latest_checkpointed_iteration.txt"
    if marker.is_file() and marker.read_text().strip().isdigit():
        return models_in(path / f"global_step_{marker.read_text().strip()}", say)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path}: a Hugging Face model already: nothing to merge", "use it as it is")
    foreign = [p for p in path.glob("global_step_*") if (p / "actor").is_dir() and is_verl(p / "actor")]
    if foreign:
        raise CheckpointError(
            f"{path}: no latest_checkpointed_iteration.txt says which of verl's steps is whole",
            f"name one yourself: {max(foreign, key=lambda p: step_of(p) or 0)}",
        )
    newest = latest_valid(path, say, deep=False)  # the merge itself checks every byte it reads
    if newest is None:
        name_folder(path)
        raise CheckpointError(f"{path}: holds no finished checkpoint", "name a run, or a global_step_N/actor folder")
    say(f"using {newest}")
    return models_in(newest, say)
