"""GGUF files (llama.cpp's format, usually quantised) to a Hugging Face folder in float32."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from pathlib import Path

from gadcli.errors import CheckpointError, ResourceError

WEIGHTS_FILE = "model.safetensors"
GGUF_MAGIC = b"GGUF"


def convert_gguf(gguf: Path, out: Path) -> None:
    """Dequantise a .gguf file into a folder that transformers and vLLM load: weights, tokenizer, chat template.

    float32, since that is what a CPU trains in and what loses nothing of the dequantised values; 4 bytes a
    parameter. The folder appears by a rename, complete or not at all; if another process made it meanwhile,
    theirs stays. Raises CheckpointError for a file that is no GGUF, ResourceError without room on the disk.
    """
    _check_file(gguf)
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_space(gguf, out.parent)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _convert(gguf, unfinished)
        with contextlib.suppress(OSError):
            if not (out / WEIGHTS_FILE).exists():
                unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if not (out / WEIGHTS_FILE).exists():
        raise CheckpointError(f"{out}: something else is in the way of the converted model", f"remove {out}")


def _convert(gguf: Path, folder: Path) -> None:
    from transformers.utils import logging

    source, name = str(gguf.parent), gguf.name
    bars_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    # One of its bars ignores that switch: keep it out of log files, and let a person watch it.
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            _load_and_save(source, name, folder)
    finally:
        if bars_shown:
            logging.enable_progress_bar()
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which keeps a shared cache from being shared


def _load_and_save(source: str, name: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    # The tokenizer's metadata is the better witness for what ends a turn.
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_file(gguf: Path) -> None:
    if not gguf.is_file():
        raise CheckpointError(f"{gguf}: no such file", "give the path of a .gguf file")
    with gguf.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise CheckpointError(f"{gguf}: is not a GGUF file", "give a .gguf file or a Hugging Face folder")


def _check_space(gguf: Path, folder: Path) -> None:
    needed = 8 * gguf.stat().st_size  # 4 bits -> 32 bits
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{folder}: {free / 1e9:.1f} GB free, converting {gguf.name} may need {needed / 1e9:.1f} GB",
            "free some space, or point GAD_CACHE at another disk",
        )
