"""What lies beside the weights of a merged folder: config, generation config, tokenizer, model card, lineage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gadcli import __version__
from gadcli.checkpoint.hf_folder import check_inside
from gadcli.checkpoint.hub_files import CONFIG, GENERATION, small_files
from gadcli.checkpoint.manifest import human_bytes
from gadcli.errors import CheckpointError

LINEAGE = "gad_lineage.json"


def config_file(folder: Path | None, base: Path | None) -> Path:
    """The model's config.json: the checkpoint's own, else the base's. CheckpointError if neither has one."""
    for candidate in (folder, base):
        if candidate is not None and (candidate / CONFIG).is_file():
            return check_inside(candidate, CONFIG, candidate)
    raise CheckpointError(
        f"no config.json with the checkpoint{f' ({folder})' if folder else ''}",
        "--base MODEL: the Hugging Face folder it was trained from",
    )


def asset_files(folder: Path | None, base: Path | None, *, critic: bool) -> dict[str, Path]:
    """Name -> file to copy: the checkpoint's own; where those lack a tokenizer, the base's too."""
    own, bases = small_files(folder) if folder else {}, small_files(base) if base else {}
    found = own if any(name.startswith(("tokenizer", "vocab")) for name in own) else bases | own
    if not critic and GENERATION in bases:
        found.setdefault(GENERATION, bases[GENERATION])
    return {n: p for n, p in found.items() if n != CONFIG and not (critic and n == GENERATION)}


def copy_durably(source: Path, target: Path) -> None:
    """Copies the contents of a file and forces them to disk."""
    target.parent.mkdir(exist_ok=True)
    with open(source, "rb") as read, open(target, "xb") as write:
        shutil.copyfileobj(read, write, 1 << 20)
        write.flush()
        os.fsync(write.fileno())


def write_text(target: Path, text: str) -> None:
    """A new file with `text`, on disk when this returns."""
    with open(target, "x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def model_card(lineage: Mapping[str, Any], config: Mapping[str, Any], nbytes: int, *, critic: bool) -> str:
    """README.md: what this is, where it came from, how to load it."""
    kind = "discriminator (a scalar score for every token)" if critic else "student"
    said = config.get("architectures")
    architecture = said[0] if isinstance(said, list) and said else "?"
    loader = "AutoModelForTokenClassification" if critic else "AutoModelForCausalLM"
    rows = [
        ("architecture", architecture),
        ("weights", f"{config.get('dtype') or config.get('torch_dtype')}, {human_bytes(nbytes)}"),
        ("run", lineage.get("run")),
        ("step", lineage.get("step")),
        ("stage", lineage.get("stage")),
        ("config hash", lineage.get("config_hash")),
        ("merged from", f"{lineage.get('kind')} shards of {lineage.get('world_size', '?')} ranks"),
        ("adapter", lineage.get("adapter")),
        ("trained from", lineage.get("base")),
        ("written by", f"gad {__version__}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value not in (None, ""))
    values = [(k, v) for k, v in dict(lineage.get("metrics") or {}).items() if isinstance(v, (int, float))]
    measured = "\n".join(f"| {name} | {value:.4g} |" for name, value in values)
    metrics = f"\n## At this step\n\n| metric | value |\n|---|---|\n{measured}\n" if measured else ""
    tag = "token-classification" if critic else "text-generation"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {tag}\ntags: [gad, distillation]\n---\n\n"
        f"# {lineage.get('run') or 'model'}: {kind}\n\n| | |\n|---|---|\n{table}\n{metrics}\n"
        f'```python\nfrom transformers import {loader}\n\nmodel = {loader}.from_pretrained(".")\n```\n'
    )


def lineage_json(lineage: Mapping[str, Any]) -> str:
    """gad_lineage.json: the same for programs."""
    return json.dumps(dict(lineage) | {"gad_version": __version__}, indent=1, sort_keys=True) + "\n"


def adapter_config(lineage: Mapping[str, Any], base: str, rank: int, alpha: float, modules: list[str],
                   *, critic: bool, rslora: bool, saved: list[str]) -> str:  # fmt: skip
    """adapter_config.json of a peft folder."""
    config = {
        "peft_type": "LORA",
        "task_type": "TOKEN_CLS" if critic else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": rslora,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
        "modules_to_save": saved or None,
        "revision": lineage.get("base_revision"),
    }
    return json.dumps(config, indent=2) + "\n"
