"""The small files of a model's folder: a trained model has its base's own, and only what training changed is changed.

Copied, not written anew by transformers: version 5 writes configs and tokenizers that version 4 reads wrongly, and
refuses generation configs that half of the hub has. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gadcli.checkpoint.hf_folder import check_inside, read_header, read_json, weight_files
from gadcli.config.modelinfo import TIED_BY_DEFAULT
from gadcli.errors import CheckpointError

CONFIG = "config.json"
GENERATION = "generation_config.json"
# Name -> [dtype, shape] of the base's tensors, as its safetensors files have them: what a merge must write again.
BASE_TENSORS = "base_tensors.json"
TEMPLATES = "additional_chat_templates"
MAX_BYTES = 256 << 20  # larger files beside the weights are no reader's business
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".pkl",
            ".pickle", ".distcp")  # fmt: skip
# About the base's own training, written anew by a merge, or what would make a reader load something else.
_LEFT_OUT = (
    "README.md",
    "gad_lineage.json",
    "adapter_config.json",
    "trainer_state.json",
    "MANIFEST.json",
    BASE_TENSORS,
)
_NUM_EXPERTS = ("qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "qwen3_next")  # as version 4 calls it in these
_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def small_files(folder: Path) -> dict[str, Path]:
    """Name -> file of all that travels with the weights: configs, tokenizer, templates, licence.

    Raises CheckpointError for a link that leads out of the folder.
    """
    found: dict[str, Path] = {}
    for path in sorted([*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*.jinja")]):
        name = path.relative_to(folder).as_posix()
        hidden = name.startswith(".") or name in _LEFT_OUT or name.endswith(".index.json") or path.suffix in _WEIGHTS
        if hidden or path.is_dir() or not (path.is_symlink() or path.is_file()):
            continue
        file = check_inside(path.parent, path.name, path)
        if file.stat().st_size <= MAX_BYTES:
            found[name] = file
    return found


def trained_files(base: Path, *, critic: bool, ends: Sequence[int], num_layers: int = 0) -> dict[str, bytes]:
    """Name -> content of all files but the weights that a model trained from folder `base` has, read into memory.

    ends: ids of the tokens that end an answer in training; a student's generation config names them with the base's.
    num_layers: how many of the base's layers were kept; 0 means all. A critic has a scalar head in place of the
    base's. Raises CheckpointError for what cannot be read: called before training, so that no save fails for it.
    """
    files = {name: path.read_bytes() for name, path in small_files(base).items()}
    config = read_json(base / CONFIG)
    changed = for_older_readers(cut_layers(config, num_layers))
    if critic:
        files.pop(GENERATION, None)
        changed = critic_config(changed)
    else:
        said = read_json(base / GENERATION) if GENERATION in files else None
        generation = with_ends(said, config, ends)
        if generation != said:
            files[GENERATION] = dump(generation)
    if changed != config:
        files[CONFIG] = dump(changed)
    files[BASE_TENSORS] = json.dumps(base_tensors(base), separators=(",", ":")).encode()
    return files


def dump(config: Mapping[str, Any]) -> bytes:
    """JSON as transformers lays it out, keys in their order."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def with_ends(said: Mapping[str, Any] | None, config: Mapping[str, Any], ends: Iterable[int]) -> dict[str, Any]:
    """A generation config that stops at `ends` and wherever the base's stopped; all else as it was.

    Without one in the base (`said` is None) the special tokens come from its config, as transformers takes them.
    """
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    new = {k: config[k] for k in special if config.get(k) is not None} if said is None else dict(said)
    had = new.get("eos_token_id", config.get("eos_token_id"))
    before = had if isinstance(had, list) else [] if had is None else [had]
    first = [end for end in dict.fromkeys(ends) if end not in before]
    if first or "eos_token_id" not in new:
        ids = [*first, *before]  # the first pads where no pad token is named
        new["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    return new


def cut_layers(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The config of a model of which only the first layers were kept."""
    new = dict(config)
    if num_layers:
        new["num_hidden_layers"] = num_layers
        for key in ("layer_types", "no_rope_layers"):  # an entry for each layer
            if isinstance(new.get(key), list):
                new[key] = new[key][:num_layers]
    return new


def for_older_readers(config: Mapping[str, Any]) -> dict[str, Any]:
    """With transformers 4's spellings beside those that only version 5 reads: rope, dtype, the number of experts.

    transformers 4 passes over `rope_parameters` in silence and computes with its default base of 10,000. Version 5
    reads the old spelling too, so a config that has it stays as it is.
    """
    new = dict(config)
    if "dtype" in new and "torch_dtype" not in new:
        new["torch_dtype"] = new["dtype"]
    if new.get("model_type") in _NUM_EXPERTS and "num_local_experts" in new:
        new.setdefault("num_experts", new["num_local_experts"])
    rope = new.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in new:
        return new
    if isinstance(rope.get("full_attention"), dict):  # a set for each kind of layer; version 4 knows two thetas
        local = rope.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:
            new["rope_local_base_freq"] = local["rope_theta"]
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        new["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        new.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    kind = scaling.get("rope_type", "default")
    if kind == "longrope":  # version 4 takes these three keys and no others
        scaling = {"type": kind} | {k: scaling.get(k) for k in ("short_factor", "long_factor")}
    new["rope_scaling"] = None if kind == "default" else scaling
    return new


def tokenizer_for_older_readers(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json of transformers 5 with a class and a list of tokens that version 4 takes too."""
    new = dict(config)
    if new.get("tokenizer_class") == "TokenizersBackend":  # version 5's name for it
        new["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(new.get("extra_special_tokens"), list):  # a mapping in version 4
        new["additional_special_tokens"] = new.pop("extra_special_tokens")
    return new


def critic_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model with a scalar head over every token."""
    labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return dict(config) | architecture(config, "ForTokenClassification") | {"classifier_dropout": 0.0} | labels


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the vocabulary head is the embedding; where the config is silent, its family's default."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") in TIED_BY_DEFAULT))


def said_family(config: Mapping[str, Any]) -> str:
    """ "Llama" of architectures ["LlamaForCausalLM"]; "" where there is no such list."""
    said = config.get("architectures")
    return said[0].split("For")[0] if isinstance(said, list) and said and isinstance(said[0], str) else ""


def architecture(config: Mapping[str, Any], task: str) -> dict[str, Any]:
    """`architectures` for a task: the family the config names, else the model type's; {} where neither is known."""
    family = said_family(config) or _FAMILIES.get(str(config.get("model_type")))
    return {"architectures": [f"{family}{task}"]} if family else {}


def base_tensors(base: Path) -> dict[str, list[Any]]:
    """Name -> [dtype as safetensors spells it, shape] of a base's tensors."""
    record = base / BASE_TENSORS
    if record.is_file():  # converted from a checkpoint of gad: its own base's
        return read_json(record)
    return {
        name: [entry["dtype"], list(entry["shape"])]
        for path in weight_files(base)
        for name, entry in read_header(path)[0].items()
    }


def read_base_tensors(folder: Path | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `trained_files` recorded in a checkpoint's folder of small files; {} where nothing was."""
    record = folder / BASE_TENSORS if folder is not None else None
    if record is None or not record.is_file():
        return {}
    try:
        return {str(n): (str(dtype), tuple(int(i) for i in shape)) for n, (dtype, shape) in read_json(record).items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{record}: not names with dtype and shape", "use another checkpoint") from error
