"""From a checkpoint's tensors to those of the output: names, LoRA fused or kept apart, ties, dtype, shard files."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gadcli.checkpoint.hf_folder import SINGLE
from gadcli.checkpoint.hub_files import (
    architecture,
    critic_config,
    for_older_readers,
    is_tied,
    read_base_tensors,
    said_family,
)
from gadcli.checkpoint.hub_names import as_on_hub
from gadcli.checkpoint.merge.expected import meta_model
from gadcli.checkpoint.merge.source import LoraInfo, Source
from gadcli.checkpoint.merge.tensors import Files, Segments, SourceTensor, read_pieces, read_whole, same_bytes
from gadcli.checkpoint.safe_unpickle import DTYPES, TORCH_NAMES
from gadcli.errors import CheckpointError

FLOATS = ("float64", "float32", "float16", "bfloat16")
_LORA_A, _LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class Delta:
    """A LoRA update of one weight: scale * b @ a, with a [rank, in] and b [out, rank]."""

    a: SourceTensor
    b: SourceTensor
    scale: float


@dataclass(frozen=True)
class OutTensor:
    """One tensor of the output: where its values come from, its name and its dtype (torch's name).

    `model` (transformers' modules on the meta device) is there where the source is taken apart, `part` is then the
    shape of this piece of it.
    """

    name: str
    source: SourceTensor
    dtype: str
    delta: Delta | None = None
    model: Any = None
    part: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape if self.model is None else self.part

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@dataclass
class OutFile:
    """One safetensors file: tensors in order, each at its offset after the header."""

    name: str
    tensors: list[OutTensor]
    offsets: list[int] = field(default_factory=list)
    header: bytes = b""

    def lay_out(self) -> None:
        """Fills header and offsets. The header is padded to 8 bytes, so that the widest dtype stays aligned."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in self.tensors:
            self.offsets.append(at)
            entries[tensor.name] = {
                "dtype": DTYPES[tensor.dtype][0],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.nbytes],
            }
            at += tensor.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text

    @property
    def data_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.data_bytes


@dataclass
class MergePlan:
    """What will be written. `notes` are said to the user; `weights` are the tensors before packed ones come apart.

    `model`: transformers' modules on the meta device; None where the family is one whose names gad knows itself.
    """

    files: list[OutFile]
    config: dict[str, Any]
    critic: bool
    notes: list[str]
    weights: list[OutTensor]
    model: Any = None

    @property
    def tensors(self) -> list[OutTensor]:
        return [t for f in self.files for t in f.tensors]

    @property
    def nbytes(self) -> int:
        return sum(f.nbytes for f in self.files)

    def index_json(self) -> str | None:
        """The text of model.safetensors.index.json; None for a single file."""
        if len(self.files) == 1:
            return None
        weights = {t.name: f.name for f in self.files for t in f.tensors}
        total = sum(f.data_bytes for f in self.files)
        return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}, indent=2)


def make_plan(
    source: Source,
    config: Mapping[str, Any],
    files: Files,
    *,
    dtype: str | None,
    max_shard_bytes: int,
    fuse: bool,
    lora: LoraInfo | None,
) -> MergePlan:
    """Decides everything about the output but its bytes. Raises CheckpointError for what cannot be merged.

    dtype: torch's name of a floating dtype; "own" keeps each tensor's; None takes that of the base's files where the
    checkpoint knows them, else keeps each tensor's.
    """
    notes = list(source.notes)
    named = dict(source.tensors)
    deltas = split_lora(named, lora if fuse else None)
    if not fuse:
        named, deltas = _adapter_only(source.tensors), {}
    critic = source.is_critic
    recorded = read_base_tensors(source.assets)
    model = None
    out_config = for_older_readers(config)
    if fuse:
        if critic:
            _critic_names(named)
            out_config = critic_config(out_config)
        else:
            if not said_family(out_config):  # vLLM chooses its model class by it
                out_config |= architecture(out_config, "ForCausalLM")
            _drop_tied(named, deltas, out_config, recorded, files, notes)
        model = meta_model(out_config, critic=critic)
    pieces = _pieces(named, model)
    weights, tensors = [], []
    for name, tensor in named.items():
        stored = recorded.get(next(iter(pieces[name])), ("", ()))[0]
        target = dtype or TORCH_NAMES.get(stored, "own")
        weights.append(_out(name, tensor, None if target == "own" else target, deltas.get(name)))
        if pieces[name] == {name: tensor.shape}:
            tensors.append(weights[-1])
        else:
            tensors += [replace(weights[-1], name=n, model=model, part=part) for n, part in pieces[name].items()]
    if fuse:
        _say_dtype(out_config, tensors)
    names = (SINGLE, "model") if fuse else ("adapter_model.safetensors", "adapter_model")
    return MergePlan(_shards(tensors, max_shard_bytes, names), out_config, critic, notes, weights, model)


def _pieces(named: Mapping[str, SourceTensor], model: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """Module's name of each weight -> {name in the hub's files: shape}."""
    if model is None:
        return {name: {name: tensor.shape} for name, tensor in named.items()}
    import torch

    return {
        name: {n: tuple(t.shape) for n, t in as_on_hub(model, name, torch.empty(tensor.shape, device="meta")).items()}
        for name, tensor in named.items()
    }


def split_lora(named: dict[str, SourceTensor], lora: LoraInfo | None) -> dict[str, Delta]:
    """Takes adapters out of `named` (in place), gives base layers their plain names; returns deltas by plain name."""
    adapters = {n for n in named if ".lora_" in n}
    pairs = sorted(n.removesuffix(_LORA_A) for n in adapters if n.endswith(_LORA_A))
    odd = adapters - {p + s for p in pairs for s in (_LORA_A, _LORA_B)}
    if odd:
        raise CheckpointError(
            f"{len(odd)} adapter tensors are not plain LoRA of linear layers: {sorted(odd)[0]}",
            "merge it with peft itself",
        )
    found = {n: named.pop(n) for n in adapters}
    deltas: dict[str, Delta] = {}
    for name in [n for n in named if ".base_layer." in n or ".original_module." in n or ".modules_to_save." in n]:
        tensor = named.pop(name)
        if ".original_module." in name:
            continue  # the copy under modules_to_save was trained in its place
        named[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = tensor
    for pair in pairs if lora is not None else []:
        assert lora is not None
        name, a, b = f"{pair}.weight", found[pair + _LORA_A], found.get(pair + _LORA_B)
        base = named.get(name)
        if b is None or base is None:
            what = "base weight" if b is not None else "lora_B"
            raise CheckpointError(f"{pair}: has lora_A but no {what}", "--base MODEL gives the base's weights")
        rank = a.shape[0] if len(a.shape) == 2 else 0
        if base.shape != (b.shape[0], a.shape[-1]) or b.shape != (base.shape[0], rank) or not rank:
            raise CheckpointError(f"{pair}: LoRA {b.shape} @ {a.shape} does not fit {base.shape}", "not plain LoRA")
        if lora.rank not in (None, rank):
            raise CheckpointError(f"{pair}: rank {rank}, but the adapter's config says {lora.rank}", "--lora-alpha A")
        deltas[name] = Delta(a, b, lora.scale(rank))
    return deltas


def _adapter_only(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Adapter tensors under the names of a peft adapter file; a critic's head is part of it, being trained whole."""
    picked = {}
    for name, tensor in tensors.items():
        if ".lora_" in name or saved_module(name):
            plain = name.replace(".modules_to_save.default.", ".").replace(".default.weight", ".weight")
            picked[f"base_model.model.{plain}"] = tensor
    return picked


def saved_module(name: str) -> str:
    """The module of a tensor that was trained whole beside an adapter ("score"), "" for any other tensor."""
    if ".modules_to_save." in name:
        return name.split(".modules_to_save.")[0].rsplit(".", 1)[-1]
    return "score" if name in ("score.weight", "score.bias") else ""


def _critic_names(named: dict[str, SourceTensor]) -> None:
    """TRL's value head (`v_head.summary`) under token classification's name; a language head has no place there."""
    for part in ("weight", "bias"):
        if f"v_head.summary.{part}" in named:
            named[f"score.{part}"] = named.pop(f"v_head.summary.{part}")
            named.pop("lm_head.weight", None)
    for name in [n for n in named if n.startswith("pretrained_model.")]:
        named[name.removeprefix("pretrained_model.")] = named.pop(name)


def _drop_tied(
    named: dict[str, SourceTensor],
    deltas: dict[str, Delta],
    config: dict[str, Any],
    recorded: Mapping[str, Any],
    files: Files,
    notes: list[str],
) -> None:
    """A tied head is the embedding and written once, unless the base's own files hold both."""
    head, embedding = named.get("lm_head.weight"), named.get("model.embed_tokens.weight")
    if head is None or embedding is None or not is_tied(config) or "lm_head.weight" in recorded:
        return
    changed = "lm_head.weight" in deltas or "model.embed_tokens.weight" in deltas
    if not changed and same_bytes(files, head, embedding):
        del named["lm_head.weight"]
        return
    config["tie_word_embeddings"] = False
    notes.append("the head and the embedding are tied in the config but differ here: both written, tie removed")


def _out(name: str, tensor: SourceTensor, dtype: str | None, delta: Delta | None) -> OutTensor:
    target = dtype if dtype is not None and tensor.dtype in FLOATS else tensor.dtype
    if delta is not None and tensor.dtype not in FLOATS:
        raise CheckpointError(f"{name}: LoRA on {tensor.dtype} weights cannot be fused", "--keep-adapter")
    return OutTensor(name, tensor, target, delta)


def _say_dtype(config: dict[str, Any], tensors: list[OutTensor]) -> None:
    """The dtype most bytes have, under the keys that are there; a config that says none reads as float32."""
    weight: dict[str, int] = {}
    for tensor in tensors:
        if tensor.dtype in FLOATS:
            weight[tensor.dtype] = weight.get(tensor.dtype, 0) + tensor.nbytes
    most = max(weight, key=lambda d: weight[d], default="float32")
    keys = ("dtype", "torch_dtype")
    said = [key for key in keys if key in config] or (keys if most != "float32" else ())
    config.update(dict.fromkeys(said, most))


def _shards(tensors: list[OutTensor], limit: int, names: tuple[str, str]) -> list[OutFile]:
    """Files of at most `limit` data bytes (a larger tensor alone), widest dtype first so that all stay aligned."""
    ordered = sorted(tensors, key=lambda t: (-DTYPES[t.dtype][1], t.name))
    groups: list[list[OutTensor]] = [[]]
    filled = 0
    for tensor in ordered:
        if groups[-1] and filled + tensor.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if not groups[-1]:
        raise CheckpointError("the checkpoint holds no tensors", "use another checkpoint")
    single, stem = names
    count = len(groups)
    files = [
        OutFile(single if count == 1 else f"{stem}-{i:05d}-of-{count:05d}.safetensors", group)
        for i, group in enumerate(groups, 1)
    ]
    for file in files:
        file.lay_out()
    return files


def is_copy(tensor: OutTensor) -> bool:
    """Whether the output's bytes are the source's own."""
    return tensor.delta is None and tensor.model is None and tensor.dtype == tensor.source.dtype


def produce(
    files: Files, tensor: OutTensor, segments: Segments | None = None, *, check: bool = True
) -> Iterator[memoryview]:
    """The output's bytes of one tensor, in pieces: read (`check`: CRCs compared), LoRA added in float32, converted.

    segments: gets (bytes, CRC) of what was produced.
    """
    source = tensor.source
    if is_copy(tensor):
        yield from read_pieces(files, source, segments, check=check)
        return
    size, crc = 0, 0
    for piece in _computed(files, tensor, check):
        yield piece
        if segments is not None:
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    if segments is not None:
        segments.append((size, crc))


def _apart(files: Files, tensor: OutTensor, check: bool) -> dict[str, memoryview]:
    """A packed weight's pieces by their hub names, as raw bytes in row-major order."""
    import torch

    source = tensor.source
    whole = torch.frombuffer(bytearray(read_whole(files, source, check=check)), dtype=getattr(torch, source.dtype))
    pieces = as_on_hub(tensor.model, source.name, whole.view(source.shape))
    return {n: t.contiguous().view(-1).view(torch.uint8).numpy().data for n, t in pieces.items()}


def _computed(files: Files, tensor: OutTensor, check: bool) -> Iterator[memoryview]:
    from gadcli.checkpoint.merge.cast import convert, from_float32, raw_bytes, to_float32

    source, delta = tensor.source, tensor.delta
    if tensor.model is not None:
        assert delta is None, f"{source.name}: adapters sit on linear layers, and this is a packed weight"
        piece = files.kept(source, lambda: _apart(files, tensor, check))[tensor.name]
        yield convert(piece, source.dtype, tensor.dtype)
        return
    if delta is None:
        for piece in read_pieces(files, source, check=check):
            yield convert(piece, source.dtype, tensor.dtype)
        return
    a_RI = to_float32(memoryview(read_whole(files, delta.a)), delta.a.dtype).reshape(delta.a.shape)
    b_OR = to_float32(memoryview(read_whole(files, delta.b)), delta.b.dtype).reshape(delta.b.shape)
    row = 0
    for piece in read_pieces(files, source, check=check):
        base = to_float32(piece, source.dtype).reshape(-1, source.shape[1])
        update = (b_OR[row : row + len(base)] @ a_RI) * delta.scale
        update += base
        row += len(base)
        yield raw_bytes(from_float32(update.reshape(-1), tensor.dtype))
