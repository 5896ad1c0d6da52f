"""The manifest of a checkpoint (files, sizes, sha256), and which checkpoint of a run to use. Knows no torch.

A `global_step_N` folder appears by one rename after every file and MANIFEST.json are on disk, so a folder with that
name and a manifest is whole unless the disk or somebody damaged it later; `verify` tells.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from gadcli.errors import CheckpointError, ResourceError
from gadcli.files import write_atomic

MANIFEST = "MANIFEST.json"
LATEST = "latest"
FORMAT = 1
TRAINER_STATE = "trainer/trainer.json"
_STEP = re.compile(r"global_step_(\d+)\Z")
_UNFINISHED = re.compile(r"global_step_(\d+)\.tmp\Z")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    size: int
    sha256: str


@dataclass
class Manifest:
    """MANIFEST.json; `files` maps paths relative to the checkpoint (posix) to size in bytes and sha256."""

    step: int
    stage: str
    config_hash: str
    world_size: int
    models: list[str]
    files: dict[str, FileEntry]
    metrics: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT
    gad_version: str = ""
    created: float = field(default_factory=time.time)


def step_folder(run_dir: Path, step: int) -> Path:
    """Where step `step` of a run is kept."""
    return run_dir / f"global_step_{step}"


def step_of(path: Path) -> int | None:
    """N of a folder named global_step_N, else None."""
    match = _STEP.match(path.name)
    return int(match.group(1)) if match else None


def hash_file(path: Path) -> FileEntry:
    """Size and sha256 of a regular file, read in pieces."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    size = 0
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
            size += count
    return FileEntry(size, digest.hexdigest())


def human_bytes(count: int) -> str:
    """1234567 -> '1.2 MB' (powers of 1000, as `df -H` and disk makers count)."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def check_disk(folder: Path, need: int, what: str, hint: str) -> None:
    """ResourceError (exit 6) 'need X, have Y' unless `folder`'s file system has `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ResourceError(f"disk full: {what} in {folder}: need {human_bytes(need)}, have {human_bytes(free)}", hint)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """MANIFEST.json of a finished folder, on disk when this returns."""
    write_atomic(folder / MANIFEST, json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n", durable=True)


def safe_relative(name: object, where: str) -> str:
    """`name` if it is a plain relative path that stays inside its folder; CheckpointError otherwise."""
    if isinstance(name, str) and name and "\\" not in name and "\0" not in name:
        parts = PurePosixPath(name).parts
        if parts and not name.startswith("/") and ".." not in parts:
            return name
    raise CheckpointError(f"{where}: names the file {str(name)[:80]!r} outside its folder: refused")


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises CheckpointError when missing or not one of ours."""
    source = path / MANIFEST
    try:
        raw = json.loads(source.read_bytes())
        files = {
            safe_relative(name, str(source)): FileEntry(int(entry["size"]), str(entry["sha256"]))
            for name, entry in raw["files"].items()
        }
        known = {key: raw[key] for key in ("step", "stage", "config_hash", "world_size", "models")}
        manifest = Manifest(
            **known,
            files=files,
            metrics=dict(raw["metrics"]),
            format=raw["format"],
            gad_version=raw["gad_version"],
            created=raw["created"],
        )
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no {MANIFEST}: not a checkpoint of gad, or one that was never finished",
            "use an earlier global_step_N; for a folder of DCP files from elsewhere: gad merge --trust-checkpoint",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source}: not readable: {str(error)[:100]}", "use another checkpoint") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{source}: format {manifest.format!r}, this gad reads {FORMAT}", "update gad")
    typed = (
        isinstance(manifest.step, int) and isinstance(manifest.world_size, int) and isinstance(manifest.models, list)
    )
    if not typed or not all(isinstance(m, str) for m in manifest.models):
        raise CheckpointError(f"{source}: step, world_size or models of the wrong type", "use another checkpoint")
    return manifest


def _check_sizes(path: Path, wanted: Mapping[str, FileEntry]) -> None:
    for name, entry in wanted.items():
        file = path / name
        resolved = path.resolve()
        if not file.is_symlink() and not file.exists():
            raise CheckpointError(f"{file}: missing ({MANIFEST} lists it)", "use another checkpoint, or copy it again")
        if file.is_symlink() or not file.is_file() or not file.resolve().is_relative_to(resolved):
            raise CheckpointError(f"{file}: a link or no plain file: refused", "copy the checkpoint with plain files")
        size = file.stat().st_size
        if size != entry.size:
            raise CheckpointError(
                f"{file}: {size:,} bytes, {MANIFEST} says {entry.size:,}: cut or replaced",
                "use another checkpoint, or copy it again",
            )


def verify(
    path: Path,
    only: Iterable[str] | None = None,
    *,
    deep: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Checks a checkpoint against its manifest and returns it; CheckpointError names the first bad file.

    only: prefixes of paths to check ("actor/", "trainer/trainer.json"); None checks everything.
    deep: sha256 of every byte; else sizes and presence only.
    progress: called with the bytes of each file that was hashed.
    """
    manifest = read_manifest(path)
    step = step_of(path)
    if step is not None and step != manifest.step:
        raise CheckpointError(f"{path}: its manifest is of step {manifest.step}: renamed or mixed", "use another one")
    prefixes = None if only is None else tuple(only)
    wanted = {n: e for n, e in manifest.files.items() if prefixes is None or n.startswith(prefixes)}
    _check_sizes(path, wanted)
    if deep:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for name, found in zip(wanted, pool.map(lambda n: _hash_or_fail(path / n), wanted), strict=True):
                if found != wanted[name]:
                    raise CheckpointError(
                        f"{path / name}: sha256 differs from {MANIFEST}: the file is damaged",
                        "use another checkpoint, or copy it again",
                    )
                if progress is not None:
                    progress(found.size)
    return manifest


def _hash_or_fail(file: Path) -> FileEntry:
    try:
        return hash_file(file)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}", "use another checkpoint") from error


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest step first (by name and presence of a manifest; not verified)."""
    if not run_dir.is_dir():
        return []
    found = [p for p in run_dir.iterdir() if step_of(p) is not None and p.is_dir()]
    return sorted((p for p in found if (p / MANIFEST).is_file()), key=lambda p: step_of(p) or 0)


def latest_valid(run_dir: Path, on_skip: Callable[[str], None], *, deep: bool = True) -> Path | None:
    """The newest checkpoint that passes `verify`; `on_skip` gets one line for every newer one that does not.

    Unfinished saves (global_step_N.tmp, or a folder without a manifest) newer than the answer are told too.
    """
    if not run_dir.is_dir():
        return None
    candidates: dict[int, str] = {}
    chosen: Path | None = None
    for path in run_dir.iterdir():
        unfinished = _UNFINISHED.match(path.name)
        if unfinished:
            candidates[int(unfinished.group(1))] = f"{path}: unfinished (stopped while saving)"
    for path in sorted((p for p in run_dir.iterdir() if step_of(p) is not None), key=lambda p: -(step_of(p) or 0)):
        try:
            verify(path, deep=deep)
        except CheckpointError as error:
            candidates[step_of(path) or 0] = error.message
            continue
        chosen = path
        break
    floor = -1 if chosen is None else step_of(chosen) or 0
    using = "there is no older one" if chosen is None else f"using {chosen.name}"
    for step in sorted((s for s in candidates if s > floor), reverse=True):
        on_skip(f"skipped {candidates[step]}; {using}")
    return chosen


def read_trainer(path: Path) -> dict[str, Any]:
    """The trainer's own state (schedule, data cursor …) of a checkpoint, as it was given to save_checkpoint."""
    verify(path, [TRAINER_STATE])
    try:
        state = json.loads((path / TRAINER_STATE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / TRAINER_STATE}: not JSON", "use another checkpoint") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / TRAINER_STATE}: holds no JSON object", "use another checkpoint")
    return state
