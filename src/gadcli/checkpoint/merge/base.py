"""Weights that a LoRA-only checkpoint lacks, read in place from the Hugging Face folder it was trained from."""

from __future__ import annotations

import math
from pathlib import Path

from gadcli.checkpoint.hf_folder import read_header, weight_files
from gadcli.checkpoint.merge.source import Source
from gadcli.checkpoint.merge.tensors import SourceTensor, whole
from gadcli.checkpoint.safe_unpickle import TORCH_NAMES, Strided
from gadcli.errors import CheckpointError


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
    header, start = read_header(path)
    found: dict[str, SourceTensor] = {}
    for name, entry in header.items():
        dtype, shape = TORCH_NAMES.get(entry["dtype"]), tuple(entry["shape"])
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        begin, end = (start + at for at in entry["data_offsets"])
        at = Strided(path, dtype or "", shape, stride, begin, begin, end - begin, None)
        if dtype is None or at.nbytes != end - begin:
            raise CheckpointError(f"{path}: {name}: {entry['dtype']} of shape {shape} is not read", "another copy?")
        found[name] = whole(name, at)
    return found
