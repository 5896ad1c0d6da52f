"""Weights that a LoRA-only checkpoint lacks, read in place from the Hugging Face folder it was trained from."""

from __future__ import annotations

import json
from pathlib import Path

from gadcli.checkpoint.hf_folder import weight_files
from gadcli.checkpoint.merge.source import Source
from gadcli.checkpoint.merge.tensors import SourceTensor, whole
from gadcli.checkpoint.safe_unpickle import DTYPES, Strided
from gadcli.errors import CheckpointError

_MAX_HEADER = 100 << 20
_TORCH_NAMES = {stored: name for name, (stored, _) in DTYPES.items()}


def base_tensors(source: Source, base: Path | None) -> dict[str, SourceTensor]:
    """The base's tensors for a checkpoint that holds an adapter and nothing else; nothing for any other."""
    if base is None or not source.has_lora or any(".lora_" not in name for name in source.tensors):
        return {}
    source.notes.append(f"the checkpoint holds the adapter alone: weights from {base}")
    found: dict[str, SourceTensor] = {}
    for path in weight_files(base):
        found.update(read_safetensors(path))
    return found


def read_safetensors(path: Path) -> dict[str, SourceTensor]:
    """Where each tensor of a safetensors file lies. Raises CheckpointError for a header that is not one."""
    size = path.stat().st_size
    found: dict[str, SourceTensor] = {}
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_MAX_HEADER, size):
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype = _TORCH_NAMES[entry["dtype"]]
            shape = tuple(int(n) for n in entry["shape"])
            begin, end = (8 + length + int(at) for at in entry["data_offsets"])
            stride, step = [], 1
            for n in reversed(shape):
                stride.append(step)
                step *= n
            at = Strided(path, dtype, shape, tuple(reversed(stride)), begin, begin, end - begin, None)
            if at.nbytes != end - begin or not 8 + length <= begin <= end <= size:
                raise ValueError(f"{name} lies outside the file")
            found[name] = whole(name, at)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {str(error)[:80]}", "copy it again") from error
    return found
