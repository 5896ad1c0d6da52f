"""A smaller student cut from a model: some of its layers, renumbered, as an ordinary Hugging Face folder.

Weights are copied byte for byte, shard by shard; tokenizer and generation files as they are. For decoders whose layers
are `model.layers.N`; whatever in config.json speaks of single layers is cut along, and where gad does not know how, the
model is refused. What is cut has to be trained before it says anything: stage seqkd first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadcli import __version__
from gadcli.checkpoint.hf_folder import INDEX, SINGLE, read_json, weight_files
from gadcli.checkpoint.manifest import check_disk
from gadcli.checkpoint.merge import assets
from gadcli.checkpoint.merge.base import read_safetensors
from gadcli.checkpoint.merge.plan import OutFile, OutTensor
from gadcli.checkpoint.merge.tensors import Files, SourceTensor, read_pieces
from gadcli.errors import CheckpointError, ConfigError
from gadcli.files import fsync_path

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Lists of config.json with an entry for each layer; transformers derives them where a file has only their rule.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
LAYER_NUMBERS = ("mlp_only_layers",)  # lists of layers, by number
FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers")  # how many of the first layers are of one kind
# Rules by a layer's number that would hold for other layers after the cut; the value at which there is none.
RULES = {"decoder_sparse_step": 1, "moe_layer_freq": 1, "interleave_moe_layer_step": 1, "num_kv_shared_layers": 0,
         "scale_attn_by_inverse_layer_idx": False}  # fmt: skip
ELSEWHERE = "choose another base, or cut it with the model's own code"


@dataclass(frozen=True)
class CutReport:
    """What was written: layers kept of how many, parameters of the cut and of the base."""

    out: Path
    kept: list[int]
    layers: int
    parameters: int
    base_parameters: int


def choose_layers(layers: int, count: int) -> list[int]:
    """`count` of `layers` layers: the first three quarters of them from the bottom, the rest from the top.

    The first layer is always kept and, of two or more, the last.
    """
    if not 1 <= count <= layers:
        raise ConfigError(f"--layers {count}: the model has {layers} layers", f"--layers 1 to {layers}")
    top = max(1, count // 4) if count > 1 else 0
    return [*range(count - top), *range(layers - top, layers)]


def cut_model(folder: Path, out: Path, *, count: int = 0, keep: Sequence[int] = (), name: str = "") -> CutReport:
    """Write the layers `keep` (else `count` chosen ones, else a quarter) of the model in `folder` to the new `out`.

    `name` is how the model card calls the base. Nothing appears at `out` unless all of it was written. Raises
    CheckpointError (damaged, not understood, or `out` exists), ConfigError (layers), ResourceError (disk).
    """
    if out.is_symlink() or out.exists():
        raise CheckpointError(f"{out} exists: not overwritten", "give another -o DIR, or move it away")
    config = read_json(folder / "config.json")
    shards = [(path, read_safetensors(path)) for path in weight_files(folder)]
    tensors = {name: tensor for _, found in shards for name, tensor in found.items()}
    layers = check_layers(config, tensors, folder)
    kept = check_kept(list(keep), layers) if keep else choose_layers(layers, count or max(2, round(layers / 4)))
    new_config = cut_config(config, kept, layers, uniform=same_layers(tensors))
    files = plan_files([found for _, found in shards], kept)
    parameters = sum(tensor.source.numel for file in files for tensor in file.tensors)
    report = CutReport(out, kept, layers, parameters, sum(tensor.numel for tensor in tensors.values()))
    side: dict[str, str | Path] = {
        **assets.asset_files(folder, None, critic=False),
        "config.json": json.dumps(new_config, indent=2, ensure_ascii=False) + "\n",
        "README.md": card(report, name or str(folder), new_config),
    }
    if len(files) > 1:
        weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
        total = {"total_size": sum(file.data_bytes for file in files)}
        side[INDEX] = json.dumps({"metadata": total, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    write_folder(out, files, side)
    return report


def check_layers(config: Mapping[str, Any], tensors: Mapping[str, SourceTensor], folder: Path) -> int:
    """How many layers the model has; CheckpointError unless all of them are model.layers.0 … model.layers.N-1."""
    layers = config.get("num_hidden_layers")
    found = {int(match[1]) for tensor in tensors if (match := LAYER.fullmatch(tensor))}
    if not isinstance(layers, int) or not found:
        raise CheckpointError(f"{folder}: its layers are not model.layers.N of a plain decoder", ELSEWHERE)
    if found != set(range(layers)):
        odd = sorted(found ^ set(range(layers)))[0]
        raise CheckpointError(
            f"{folder}: config.json says {layers} layers, and layer {odd} "
            + ("is beyond them (an extra prediction head?)" if odd >= layers else "has no weights"),
            ELSEWHERE,
        )
    numbered = [name for name in tensors if not LAYER.fullmatch(name) and re.search(r"\.\d+\.", name)]
    if numbered:
        raise CheckpointError(f"{folder}: {numbered[0]} is numbered outside of model.layers", ELSEWHERE)
    return layers


def check_kept(keep: list[int], layers: int) -> list[int]:
    """The layers asked for, in order, each once and one of the model's."""
    if sorted(set(keep)) != keep or not 0 <= keep[0] <= keep[-1] < layers:
        shown = ",".join(map(str, keep))
        raise ConfigError(f"--keep {shown}: not rising layer numbers from 0 to {layers - 1}", "--keep 0-5,28,29")
    return keep


def same_layers(tensors: Mapping[str, SourceTensor]) -> bool:
    """Whether all layers hold tensors of the same names and shapes."""
    by_layer: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for name, tensor in tensors.items():
        if match := LAYER.fullmatch(name):
            by_layer.setdefault(match[1], set()).add((match[2], tensor.shape))
    return len({frozenset(held) for held in by_layer.values()}) == 1


def cut_config(config: Mapping[str, Any], kept: Sequence[int], layers: int, *, uniform: bool) -> dict[str, Any]:
    """config.json of the cut. CheckpointError where something in it speaks of layers in a way gad does not know."""
    effective = effective_config(config)
    new = dict(config) | {"num_hidden_layers": len(kept)}
    for key, plain in RULES.items():
        if effective.get(key, plain) not in (plain, None):
            raise CheckpointError(
                f"config.json: {key}={effective[key]} goes by a layer's number, which changes", ELSEWHERE
            )
    known = {*PER_LAYER, *LAYER_NUMBERS, *FIRST_LAYERS}
    for key in PER_LAYER:
        if isinstance(values := effective.get(key), list):
            if len(values) != layers:
                raise CheckpointError(f"config.json: {key} has {len(values)} entries for {layers} layers", ELSEWHERE)
            new[key] = [values[layer] for layer in kept]
    for key in LAYER_NUMBERS:
        if config.get(key):
            new[key] = [place for place, layer in enumerate(kept) if layer in config[key]]
    for key in FIRST_LAYERS:
        if isinstance(first := config.get(key), int):
            new[key] = sum(layer < first for layer in kept)
    for key, value in config.items():
        if isinstance(value, list) and "layer" in key and value and key not in known:
            raise CheckpointError(f"config.json: {key} is a list that gad does not know how to cut", ELSEWHERE)
    if not uniform and not any(key in new for key in ("mlp_layer_types", "mlp_only_layers", "first_k_dense_replace")):
        raise CheckpointError(
            "its layers hold different tensors, and config.json does not say which is which", ELSEWHERE
        )
    return new


def effective_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what transformers derives from it; CheckpointError for a model type it does not know."""
    from transformers import AutoConfig

    kind = str(config.get("model_type", ""))
    values = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    try:
        return dict(AutoConfig.for_model(kind, **values).to_dict())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"transformers knows no model of type {kind!r} like this", ELSEWHERE) from error


def plan_files(shards: Sequence[Mapping[str, SourceTensor]], kept: Sequence[int]) -> list[OutFile]:
    """The shards without the other layers; one that held nothing else is left out."""
    place = {layer: new for new, layer in enumerate(kept)}
    groups: list[list[OutTensor]] = []
    for shard in shards:
        group = []
        for name, tensor in shard.items():
            match = LAYER.fullmatch(name)
            if match is None:
                group.append(OutTensor(name, tensor, tensor.dtype))
            elif int(match[1]) in place:
                group.append(OutTensor(f"model.layers.{place[int(match[1])]}.{match[2]}", tensor, tensor.dtype))
        if group:
            groups.append(group)
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
    files = [OutFile(name, group) for name, group in zip(names, groups, strict=True)]
    for file in files:
        file.lay_out()
    return files


def card(report: CutReport, base: str, config: Mapping[str, Any]) -> str:
    """README.md: what was kept, and that it has to be trained."""
    kept = ", ".join(map(str, report.kept))
    said = config.get("architectures")
    architecture = said[0] if isinstance(said, list) and said else "?"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gad, distillation]\n---\n\n"
        f"# A student of {len(report.kept)} layers\n\n| | |\n|---|---|\n| cut from | {base} |\n"
        f"| layers kept | {kept} (of {report.layers}, from 0) |\n"
        f"| parameters | {report.parameters:,} of {report.base_parameters:,} |\n"
        f"| architecture | {architecture} |\n| written by | gad {__version__} |\n\n"
        "Layers were taken out and nothing was trained since: it has to learn before it can answer "
        "(`gad train seqkd --model DIR`).\n"
    )


def write_folder(out: Path, files: Sequence[OutFile], side: Mapping[str, str | Path]) -> None:
    """All files in a hidden folder beside `out`, synced, then renamed."""
    part = out.absolute().with_name(f".{out.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        check_disk(part, sum(file.nbytes for file in files), out.name, "free some space, or another -o DIR")
        for name, content in side.items():
            if isinstance(content, Path):
                assets.copy_durably(content, part / name)
            else:
                assets.write_text(part / name, content)
        reader = Files()
        try:
            for file in files:
                with open(part / file.name, "xb") as stream:
                    stream.write(file.header)
                    for tensor in file.tensors:
                        for piece in read_pieces(reader, tensor.source):
                            stream.write(piece)
                    stream.flush()
                    os.fsync(stream.fileno())
        finally:
            reader.close()
        fsync_path(part)
        part.rename(out)
        fsync_path(out.absolute().parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
