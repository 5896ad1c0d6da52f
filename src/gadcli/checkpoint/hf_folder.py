"""A Hugging Face folder as it should be: config, safetensors, an index that stays inside. Refuses the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gadcli.errors import CheckpointError, ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_JSON = 256 << 20
_MAX_HEADER = 100 << 20
_BLOB = re.compile(r"[0-9a-f]{40,64}\Z")
# Files of a model that people link: a name of their own choice is not followed out of its folder.
_KNOWN = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|processor_config"
    r"|preprocessor_config|chat_template|model\.safetensors\.index)\.(json|jinja|model|txt)\Z"
    r"|merges\.txt\Z|spiece\.model\Z|[\w.-]+\.tiktoken\Z"
)
_LFS = b"version https://git-lfs"


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


def _may_follow(link: Path, target: Path) -> bool:
    if link.suffix == ".safetensors":
        try:
            read_header(target)
        except CheckpointError:
            return False
        return True
    in_cache = target.parent.name == "blobs" and _BLOB.match(target.name) is not None
    return _KNOWN.match(link.name) is not None and (in_cache or target.name == link.name)


def check_inside(folder: Path, name: object, where: Path) -> Path:
    """The file `name` of `folder`. CheckpointError for `../`, absolute paths, and links that may not be followed.

    Links within the folder may be; out of it those of people who keep their weights elsewhere or change one file of a
    model: into a hub's cache, to a file of the same well-known name, and from weights to any safetensors file. A
    folder made to bring other files of this machine into a merged model gets none of these.
    """
    if not isinstance(name, str) or not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
        raise CheckpointError(
            f"{where}: names the file {str(name)[:80]!r} outside its folder: refused", "do not use this model folder"
        )
    path = folder / name
    root = _allowed_root(folder)
    snapshot = root != folder.resolve()  # whose links all lead into its own cache
    if not path.resolve().is_relative_to(root) and (snapshot or not _may_follow(path, path.resolve())):
        raise CheckpointError(
            f"{path}: a link that leads out of its folder, to {path.resolve()}: refused",
            "copy the file there if you know it",
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: missing (named by {where.name})", "copy or download the model again")
    return path


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to lie inside it.

    Raises CheckpointError where one is missing, damaged or elsewhere, ConfigError where there are none.
    """
    index = folder / INDEX
    if index.is_symlink() or index.exists():
        check_inside(folder, INDEX, index)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no weight_map", "copy or download the model again")
        named = {str(name) if isinstance(name, str) else name for name in weight_map.values()}
        files = [check_inside(folder, name, index) for name in sorted(named, key=str)]
    elif (folder / SINGLE).is_symlink() or (folder / SINGLE).exists():
        files = [check_inside(folder, SINGLE, folder / SINGLE)]
    else:
        raise ConfigError(
            f"{folder}: a config.json without weights (no {SINGLE}, no {INDEX})",
            "download the whole model; --dry-run plans with --model DIR/config.json alone",
        )
    for path in files:
        read_header(path)
    return files


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's entries by tensor name, and the byte where its data begins. CheckpointError if it has none.

    Checked: the entries' fields, and that each tensor lies inside the file.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as stream:
            if (first := stream.read(len(_LFS))) == _LFS:
                raise ValueError("a Git LFS pointer, not the weights: git lfs pull")
            length = int.from_bytes(first[:8], "little")
            stream.seek(8)
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
