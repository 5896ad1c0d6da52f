"""Turns what --model and --reward-model take into a Hugging Face folder; what needs converting is converted once.

Conversions go to `$GAD_CACHE` (default ~/.cache/gad), named by the content they came from, made in a temporary
folder under a lock and renamed, so that ranks and runs that ask at once share one conversion. No torch here.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from gadcli.checkpoint.embedded_model import EMBEDDED, embedded_or
from gadcli.checkpoint.hf_folder import check_folder, read_json
from gadcli.checkpoint.hub_files import trained_files
from gadcli.checkpoint.manifest import MANIFEST, latest_valid, read_manifest, step_of, verify
from gadcli.checkpoint.other_folders import name_folder
from gadcli.config.machine import cache_folder
from gadcli.errors import CheckpointError, ConfigError, ResourceError
from gadcli.files import locked

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?\Z")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_VERL_SHARDS = "model_world_size_*_rank_*.pt"
# Part of a conversion's name: raise it when the converter's output changes.
_CONVERTER = "2"

Say = Callable[[str], None]


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def resolve_model(path: str, *, role: str = "actor", say: Say = _to_stderr) -> Path:
    """An HF folder for `path`: an HF folder (checked, returned as is), hub name, `.gguf` file, a checkpoint's
    `global_step_N/actor|critic`, `global_step_N` or a run's folder (its newest checkpoint), verl's rank files, or
    `embedded` (the demo's student).

    role: "actor" or "critic": which model is meant where `path` holds both.
    Raises ConfigError for what is not there, CheckpointError for what cannot or must not be used.
    """
    if not path:
        raise ConfigError("no model given", "--model takes a hub name, an HF folder, a .gguf file or a checkpoint")
    local = Path(embedded_or(path)).expanduser()
    if local.is_file():
        if local.suffix.lower() == ".gguf":
            return _from_gguf(local.absolute(), say)
        raise ConfigError(f"{local}: a file that is no .gguf", "--model takes a model's folder, or a .gguf file")
    if local.is_dir():
        return _from_folder(local.absolute(), role, say)
    return _from_hub(path)


def check_model(path: str, *, role: str = "actor") -> None:
    """Raises what `resolve_model` would for a local `path`, without converting, loading or asking a hub."""
    local = Path(path).expanduser()
    if path and path != EMBEDDED and local.is_dir():
        found = locate(local.absolute(), role, lambda _: None)
        if (found / "config.json").exists():
            # What a save copies is read now: a run that could not be saved is refused before it starts.
            trained_files(found, critic=role == "critic", ends=[])


def _from_folder(folder: Path, role: str, say: Say) -> Path:
    found = locate(folder, role, say)
    return found if (found / "config.json").exists() else _merged(found, say)


def locate(folder: Path, role: str, say: Say) -> Path:
    """The HF folder (checked) or the folder of one model's shards that `folder` stands for.

    Raises ConfigError for folders that hold no model, naming what they are.
    """
    if next(folder.glob(_VERL_SHARDS), None) is not None:
        return folder
    if (folder / MANIFEST).is_file():
        return _model_of(folder, role)
    if (folder / ".metadata").is_file() and (folder.parent / MANIFEST).is_file():
        verify(folder.parent, [f"{folder.name}/"], deep=False)
        return folder
    if (folder / "config.json").is_symlink() or (folder / "config.json").exists():
        name_folder(folder)
        check_folder(folder)
        return folder
    newest = latest_valid(folder, say, deep=False)  # the merge checks the model's bytes; the optimiser's are not read
    if newest is not None:
        say(f"{folder.name}: using {newest.name}/{role}")
        return _model_of(newest, role)
    latest = folder / "latest_checkpointed_iteration.txt"
    if next(folder.glob(f"{role}/{_VERL_SHARDS}"), None) or (latest.is_file() and any(folder.glob("global_step_*"))):
        return _verl_model(folder, role)
    name_folder(folder)
    raise ConfigError(f"{folder}: no config.json and no checkpoint in it", "--model takes a model's folder")


def _model_of(checkpoint: Path, role: str) -> Path:
    have = read_manifest(checkpoint).models
    if role not in have:
        raise CheckpointError(f"{checkpoint}: holds no {role} (it has: {', '.join(have)})", "name another checkpoint")
    return checkpoint / role


def _verl_model(folder: Path, role: str) -> Path:
    latest = folder / "latest_checkpointed_iteration.txt"
    if latest.is_file():
        step = latest.read_text().strip()
        if not step.isdigit():
            raise CheckpointError(f"{latest}: {step[:40]!r} is no step", "name the global_step_N folder itself")
        folder = folder / f"global_step_{step}"
    model = folder / role
    if next(model.glob(_VERL_SHARDS), None) is None:
        raise CheckpointError(f"{model}: no {_VERL_SHARDS}", "name the folder that holds the rank files")
    return model


def _from_hub(name: str) -> Path:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".gguf", "/"))
    if looks_local or not _HUB_NAME.match(name):
        raise ConfigError(f"model {name}: no such file or folder", "check the path; hub names look like org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(name, allow_patterns=_HUB_FILES)
    except HFValidationError as error:
        raise ConfigError(f"model {name}: neither a folder nor a hub name", str(error).splitlines()[0]) from error
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"model {name}: no such folder, not in the local hub cache, and the hub cannot be reached",
            "give a local folder, or download it first: hf download " + name,
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise ConfigError(
            f"model {name}: the hub answers {status}", "check the name; for a gated model: hf auth login"
        ) from error
    check_folder(Path(found))
    return Path(found)


def _fingerprint(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256(_CONVERTER.encode())
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _folder_key(folder: Path) -> str:
    """What a checkpoint's content is known by: its manifest (hashes of every file), else names, sizes and times."""
    manifest = folder.parent / MANIFEST
    if manifest.is_file():
        return _fingerprint(iter([manifest.read_bytes(), folder.name.encode()]))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    stats = [(p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return _fingerprint(repr(s).encode() for s in [str(folder.resolve()), *stats])


def _converted(name: str, convert: Callable[[Path], None], say: Say, what: str) -> Path:
    """The cached conversion `name`, made by `convert(target)` if it is not there yet."""
    target = cache_folder() / "models" / name
    if (target / "config.json").is_file():
        return target
    with locked(target.with_name(target.name + ".lock")):
        if not (target / "config.json").is_file():
            say(f"converting {what} (once) into {target}")
            for left in target.parent.glob(f".{glob.escape(name)}.tmp-*"):  # of a conversion that was killed
                shutil.rmtree(left, ignore_errors=True)
            convert(target)
    check_folder(target)
    return target


def _merged(folder: Path, say: Say) -> Path:
    from gadcli.checkpoint.merge.to_huggingface import OWN, MergeOptions, to_huggingface

    step = step_of(folder.parent)
    label = "-".join([*([folder.parent.parent.name] if step is not None else []), *([f"step{step}"] if step else [])])
    name = f"{_plain(label or folder.parent.name)}-{_plain(folder.name)}-{_folder_key(folder)}"

    def convert(target: Path) -> None:
        try:
            to_huggingface(folder, target, MergeOptions(dtype=OWN, go_on=True))
        except CheckpointError as error:
            if not (error.hint or "").startswith("--"):  # a flag of `gad merge`, which the caller has not
                raise
            hint = f"first: gad merge {folder} -o DIR, with {error.hint}; then name DIR"
            raise CheckpointError(error.message, hint) from error

    return _converted(name, convert, say, str(folder))


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)[:60]


def _from_gguf(file: Path, say: Say) -> Path:
    stat = file.stat()
    key = _fingerprint(repr(v).encode() for v in (str(file.resolve()), stat.st_size, stat.st_mtime_ns))

    def convert(target: Path) -> None:
        # In a process of its own: the caller (the parent of a run) stays free of torch and of its memory.
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        command = [sys.executable, "-m", "gadcli.checkpoint.merge.gguf", str(file), str(temporary)]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode != 0 or not (temporary / "config.json").is_file():
                if "No space left on device" in done.stdout:
                    raise ResourceError(f"{target}: disk full while converting {file.name}", "GAD_CACHE=another disk")
                last = (done.stdout.strip().splitlines() or ["no output"])[-1]
                raise CheckpointError(f"{file}: not converted: {last[:200]}", "is it a whole .gguf of a known model?")
            read_json(temporary / "config.json")
            os.rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    return _converted(f"{_plain(file.stem)}-{key}", convert, say, file.name)
