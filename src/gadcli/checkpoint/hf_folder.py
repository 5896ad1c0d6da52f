"""A Hugging Face folder as it should be: config, safetensors, an index that stays inside. Refuses the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gadcli.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_JSON = 256 << 20
_MAX_HEADER = 100 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if it is missing, not JSON, or something else than an object."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a readable JSON file: {str(error)[:100]}", "copy the model again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object", "copy the model again")
    return value


def _allowed_root(folder: Path) -> Path:
    """Where the folder's links may lead: the folder, or for a hub snapshot its repository in the cache."""
    resolved = folder.resolve()
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        return resolved.parent.parent
    return resolved


def check_inside(folder: Path, name: object, where: Path) -> Path:
    """The file `name` of `folder`; CheckpointError for `../`, absolute paths, and links that lead out of the folder."""
    if not isinstance(name, str) or not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
        raise CheckpointError(
            f"{where}: names the file {str(name)[:80]!r} outside its folder: refused", "do not use this model folder"
        )
    path = folder / name
    if not path.resolve().is_relative_to(_allowed_root(folder)):
        raise CheckpointError(f"{path}: a link that leads out of its folder: refused", "do not use this model folder")
    if not path.is_file():
        raise CheckpointError(f"{path}: missing (named by {where.name})", "copy or download the model again")
    return path


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to lie inside it.

    Raises CheckpointError when there are none, when the index names others, or when only pickles are there.
    """
    index = folder / INDEX
    if index.is_symlink() or index.exists():
        check_inside(folder, INDEX, index)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no weight_map", "copy or download the model again")
        named = {str(name) if isinstance(name, str) else name for name in weight_map.values()}
        return [check_inside(folder, name, index) for name in sorted(named, key=str)]
    if (folder / SINGLE).is_symlink() or (folder / SINGLE).exists():
        return [check_inside(folder, SINGLE, folder / SINGLE)]
    pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise CheckpointError(
            f"{folder}: weights only as pickles ({pickles[0]}): not loaded", "convert the model to safetensors first"
        )
    raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}", "not a Hugging Face model folder, or incomplete")


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's entries by tensor name, and the byte where its data begins. CheckpointError if it has none.

    Checked: the entries' fields, and that each tensor lies inside the file.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_MAX_HEADER, size):
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not (0 <= begin <= end <= size - 8 - length) or min([0, *entry["shape"]]) < 0 or not entry["dtype"]:
                raise ValueError(f"{name} lies outside the file")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {str(error)[:80]}", "copy it again") from error
    return header, 8 + length


def check_folder(folder: Path) -> dict[str, Any]:
    """Checks a model folder without reading its weights; returns its config."""
    config = read_json(check_inside(folder, "config.json", folder / "config.json"))
    weight_files(folder)
    return config
