"""Folders that hold no model gad can start from, each named as what it is, with the way to a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gadcli.checkpoint.hf_folder import INDEX, SINGLE, read_json
from gadcli.errors import CheckpointError, ConfigError

_TO_SAFETENSORS = (
    'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    "M.from_pretrained('{0}', dtype='auto').save_pretrained('NEW'); T.from_pretrained('{0}').save_pretrained('NEW')\""
)
_MERGE_ADAPTER = (
    'python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained('{0}').merge_and_unload().save_pretrained('NEW')\", add the base's tokenizer, --model NEW"
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def name_folder(folder: Path) -> None:
    """ConfigError that says what `folder` is if it is one of the kinds known here; nothing happens for any other.

    Looks at names and at small JSON files; opens no weights.
    """
    for kind in (_adapter, _deepspeed, _megatron, _dcp, _pipeline, _other_format, _parent, _empty):
        if found := kind(folder):
            what, hint = found
            raise ConfigError(f"{folder}: {what}", hint)


Named = tuple[str, str] | None


def _has(folder: Path, patterns: Iterable[str]) -> str:
    """The first name in `folder` that fits one of `patterns`, "" if none does."""
    return next((path.relative_to(folder).as_posix() for p in patterns for path in sorted(folder.glob(p))), "")


def holds_weights(folder: Path) -> bool:
    """Whether transformers would find safetensors here."""
    return any((folder / name).is_symlink() or (folder / name).exists() for name in (SINGLE, INDEX))


def _adapter(folder: Path) -> Named:
    config = folder / "adapter_config.json"
    if not config.is_file():
        return None
    if holds_weights(folder):  # transformers would pass over these weights and load the adapter's base
        return "holds a whole model and an adapter_config.json beside it", f"if it is merged: rm {config}"
    try:
        base = str(read_json(config).get("base_model_name_or_path") or "a base it does not name")
    except CheckpointError:
        base = "an unknown base"
    return f"an adapter (LoRA or similar) of {base[:100]}, not a whole model", _MERGE_ADAPTER.format(folder)


def _deepspeed(folder: Path) -> Named:
    signs = ("zero_pp_rank_*_optim_states.pt", "mp_rank_*_model_states.pt", "bf16_zero_pp_rank_*")
    inside = _has(folder, [f"{place}{sign}" for place in ("", "global_step[0-9]*/") for sign in signs])
    if not inside or holds_weights(folder):
        return None
    top = folder.parent if "/" not in inside else folder
    return (
        f"a DeepSpeed ZeRO checkpoint ({inside})",
        f"DeepSpeed's own script: python zero_to_fp32.py {top} NEW --safe_serialization; "
        "add config and tokenizer of the base, then --model NEW",
    )


def _megatron(folder: Path) -> Named:
    signs = ("iter_[0-9]*", "mp_rank_[0-9][0-9]*/", "dist_ckpt", "actor/dist_ckpt", "common.pt")
    inside = _has(folder, signs)
    if not inside or holds_weights(folder):
        return None
    return (
        f"a Megatron checkpoint ({inside})",
        "convert it first: Megatron-Bridge's export, or verl's model_merger --backend megatron",
    )


def _dcp(folder: Path) -> Named:
    if not (folder / ".metadata").is_file() or (folder.parent / "MANIFEST.json").is_file():
        return None
    return (
        "shards of torch.distributed.checkpoint that gad did not write (no MANIFEST.json beside them)",
        f"gad merge {folder} -o NEW --trust-checkpoint --base MODEL, then --model NEW",
    )


def _pipeline(folder: Path) -> Named:
    if (folder / "model_index.json").is_file():
        return "a diffusers pipeline, which makes images and not text", "name a language model"
    if (folder / "modules.json").is_file() and _has(folder, ["config_sentence_transformers.json", "1_Pooling"]):
        return "a sentence-transformers model, which makes embeddings and not text", "name a language model"
    return None


def _other_format(folder: Path) -> Named:
    if holds_weights(folder):
        return None
    if gguf := _has(folder, ["*.gguf"]):
        return f"a folder with a GGUF file ({gguf})", f"name the file: --model {folder / gguf}"
    if _has(folder, ["consolidated.*.pth", "consolidated*.safetensors"]) and not (folder / "config.json").is_file():
        return "weights in their maker's own format (consolidated)", "take the Hugging Face version of this model"
    if pickle := _has(folder, _PICKLES):
        return (
            f"weights only as pickles ({pickle}), which gad does not load",
            "convert to safetensors: " + _TO_SAFETENSORS.format(folder),
        )
    if other := _has(folder, ["*.h5", "*.msgpack", "*.onnx", "onnx/*.onnx", "*.mlmodel*", "rust_model.ot"]):
        return f"weights for another framework ({other}), no safetensors", "take a version with safetensors"
    return None


def _parent(folder: Path) -> Named:
    if (folder / "config.json").exists() or holds_weights(folder):
        return None
    trainer = sorted(folder.glob("checkpoint-[0-9]*"), key=lambda p: int(re.sub(r"\D", "", p.name) or 0))
    inside: list[Path] = [p for p in trainer if p.is_dir()][::-1]
    inside += sorted(p for p in folder.glob("*/") if _is_model_or_run(p) and p not in inside)
    inside += sorted(p for p in folder.glob("*/*/") if _is_model_or_run(p) and p.parent not in inside)
    if not inside:
        return None
    names = ", ".join(p.relative_to(folder).as_posix() for p in inside[:4])
    return f"no model itself; it holds {names}", f"name one of them: --model {inside[0]}"


def _is_model_or_run(folder: Path) -> bool:
    named = (folder / "config.json").is_file() or (folder / "huggingface").is_dir()
    return named or next(folder.glob("global_step_*"), None) is not None


def _empty(folder: Path) -> Named:
    names = sorted(p.name for p in folder.iterdir())
    if not names:
        return "an empty folder", "was the download finished? --model takes a model's folder"
    if (folder / "config.json").exists() or holds_weights(folder):
        return None
    return f"no config.json and no checkpoint in it (it holds {', '.join(names[:4])})", "--model takes a model's folder"
