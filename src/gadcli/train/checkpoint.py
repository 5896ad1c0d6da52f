"""Saves and loads a run's checkpoint with DCP: written beside, hashed, fsynced, committed by one rename.

    global_step_N/
      actor/ critic/      DCP shards of the model (keys are Hugging Face names) + huggingface/ (config, tokenizer)
      trainer/            actor_optim/ critic_optim/ (DCP), trainer.json, rng_rank_R.safetensors
      MANIFEST.json       size and sha256 of every file above
    latest                N of the newest commit; written last, for people and scripts (we list the folders instead)

Every call is collective over the process group where there is one. If one rank fails, every rank raises.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor

from gadcli import __version__
from gadcli.checkpoint.dcp_metadata import DcpIndex, read_dcp_index
from gadcli.checkpoint.manifest import (
    LATEST,
    TRAINER_STATE,
    FileEntry,
    Manifest,
    check_disk,
    hash_file,
    human_bytes,
    read_manifest,
    step_folder,
    verify,
    write_manifest,
)
from gadcli.checkpoint.retention import check_keep_last, prune, remove_leftovers
from gadcli.distributed.together import FAILURES, current_group, on_rank0, rank_and_world, together
from gadcli.errors import CheckpointError, GadError, ResourceError, is_full_disk
from gadcli.files import fsync_path, write_atomic

_SLACK = 64 << 20  # bytes asked for beyond the tensors: zip headers, config, tokenizer, the file system's own


def _local_bytes(tree: Any, rank: int) -> int:
    """Bytes that this rank writes for a state dict: its shards, and on rank 0 what all ranks hold alike."""
    if isinstance(tree, DTensor):
        local = tree.to_local()
        return local.numel() * local.element_size()
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size() if rank == 0 else 0
    if isinstance(tree, Mapping):
        return sum(_local_bytes(v, rank) for v in tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(_local_bytes(v, rank) for v in tree)
    return 0


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    stage: str,
    config_hash: str,
    models: Mapping[str, Mapping[str, torch.Tensor]],
    optims: Mapping[str, Mapping[str, Any]],
    trainer: Mapping[str, Any],
    rng: Mapping[str, torch.Tensor],
    assets: Mapping[str, Callable[[Path], None]],
    metrics: Mapping[str, float] | None,
    keep_last: int = 2,
    keep_best: str = "",
) -> Path:
    """Commits `run_dir/global_step_<step>` and prunes older ones; returns its path. Collective.

    models, optims: "actor"/"critic" -> DCP-ready state dict (DTensors or plain tensors; keys of models are HF names).
    trainer: plain JSON. rng: this rank's generator states. metrics: the val metrics keep_best chooses by.
    assets: "actor"/"critic" -> a function that fills the folder given to it, `<name>/huggingface` (it exists);
        called on rank 0 only.
    Raises CheckpointError if the folder exists (never overwritten), ResourceError when the disk is or runs full.
    """
    final = step_folder(run_dir, step)
    folder = final.with_name(final.name + ".tmp")
    need = sum(together(lambda: _local_bytes([models, optims], rank_and_world()[0])))
    on_rank0(lambda: _prepare(run_dir, final, folder, need + _SLACK, keep_last))
    try:
        _write_states(folder, models, optims)
        together(lambda: _write_rank_files(folder, trainer, rng, assets))
        files = _hash_and_sync(folder)
        manifest = Manifest(
            step, stage, config_hash, rank_and_world()[1], sorted(models), files, dict(metrics or {}),
            gad_version=__version__,
        )  # fmt: skip
        on_rank0(lambda: _commit(run_dir, folder, final, manifest))
    except FAILURES as error:
        if rank_and_world()[0] == 0:
            shutil.rmtree(folder, ignore_errors=True)  # its bytes are wanted back when the disk is full
        translated = _translated(error, final, need + _SLACK)
        if translated is None:
            raise
        raise translated from error
    on_rank0(lambda: prune(run_dir, keep_last, keep_best))
    return final


def _prepare(run_dir: Path, final: Path, folder: Path, need: int, keep_last: int) -> None:
    check_keep_last(keep_last)
    run_dir.mkdir(parents=True, exist_ok=True)
    if final.exists():
        raise CheckpointError(f"{final} exists: a checkpoint is never overwritten", "resume it, or move it away")
    remove_leftovers(run_dir)
    check_disk(
        run_dir, need, f"checkpoint {final.name}",
        "free some space or move the output (trainer.output_dir=…); checkpoints already committed are intact",
    )  # fmt: skip
    folder.mkdir()


def _translated(error: BaseException, final: Path, need: int) -> GadError | None:
    """What the user is told: a full disk (DCP wraps it), DCP's own failure, or None to let `error` through."""
    # torch's zip writer hides the OSError of a short write behind a RuntimeError about positions.
    hidden = ("unexpected pos", "file write failed", "PytorchStreamWriter failed")
    hit = any(is_full_disk(part) or any(words in str(part) for words in hidden) for part in _chain(error))
    if not hit and isinstance(error, CheckpointException):
        reasons = "; ".join(str(wrapped[0]) for wrapped in error.failures.values())
        return CheckpointError(f"{final} was not saved: {reasons[:200]}", "the one before it is intact")
    if not hit:
        return None
    run_dir = final.parent
    free = shutil.disk_usage(run_dir).free
    return ResourceError(
        f"disk full while saving in {run_dir}: need {human_bytes(need)}, have {human_bytes(free)}",
        "free some space and --resume; the last committed checkpoint is intact",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it wraps (DCP gathers those of all ranks) and what each was raised in the handling of."""
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            for wrapped in error.failures.values():
                yield from _chain(wrapped[0])
        error = error.__cause__ or error.__context__


def _write_states(folder: Path, models: Mapping[str, Any], optims: Mapping[str, Any]) -> None:
    for name, state in models.items():
        _dcp_save(folder / name, dict(state))
    for name, state in optims.items():
        _dcp_save(folder / "trainer" / f"{name}_optim", dict(state))


def _dcp_save(folder: Path, state: dict[str, Any]) -> None:
    writer = dcp.FileSystemWriter(folder, sync_files=True, overwrite=False)
    with _single_process_is_fine():
        dcp.save(state, storage_writer=writer, process_group=current_group(), no_dist=rank_and_world()[1] == 1)


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """Without DCP's warning that there is no process group: one process is what the user asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _write_rank_files(
    folder: Path,
    trainer: Mapping[str, Any],
    rng: Mapping[str, torch.Tensor],
    assets: Mapping[str, Callable[[Path], None]],
) -> None:
    rank, _ = rank_and_world()
    (folder / "trainer").mkdir(exist_ok=True)
    if rng:
        tensors = {name: value.detach().cpu().contiguous() for name, value in rng.items()}
        save_file(tensors, folder / "trainer" / f"rng_rank_{rank}.safetensors")
    if rank == 0:
        (folder / TRAINER_STATE).write_text(json.dumps(dict(trainer), indent=1, sort_keys=True) + "\n")
        for name, write in assets.items():
            target = folder / name / "huggingface"
            target.mkdir(parents=True)
            write(target)


def _owner(relative: str, world: int) -> int:
    """Which rank hashes a file: the one that wrote it, so that the work is spread and the bytes are in its cache."""
    name = relative.rsplit("/", 1)[-1]
    for prefix, suffix in (("__", ".distcp"), ("rng_rank_", ".safetensors")):
        if name.startswith(prefix) and name.endswith(suffix):
            number = name[len(prefix) : -len(suffix)].split("_")[0]
            return int(number) % world if number.isdigit() else 0
    return 0


def _hash_and_sync(folder: Path) -> dict[str, FileEntry]:
    rank, world = rank_and_world()

    def mine() -> dict[str, FileEntry]:
        found = {}
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder).as_posix()
            if path.is_file() and _owner(relative, world) == rank:
                fsync_path(path)
                found[relative] = hash_file(path)
        return found

    merged: dict[str, FileEntry] = {}
    for part in together(mine):
        merged.update(part)
    return merged


def _commit(run_dir: Path, folder: Path, final: Path, manifest: Manifest) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_dir()):
        fsync_path(path)
    write_manifest(folder, manifest)
    if final.exists():
        raise CheckpointError(f"{final} appeared while saving: another run writes here", "give this run its own name")
    os.rename(folder, final)
    fsync_path(run_dir)
    write_atomic(run_dir / LATEST, f"{manifest.step}\n", durable=True)


class _SafeReader(dcp.FileSystemReader):
    """DCP's reader with the metadata rebuilt from the checked index: DCP itself never unpickles the file."""

    def __init__(self, folder: Path, index: DcpIndex) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries: dict[str, Any] = {name: BytesStorageMetadata() for name in self._index.records}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for name, at in self._index.records.items():
            storage[MetadataIndex(name)] = _StorageInfo(at.file, at.offset, at.length)
        for name, tensor in self._index.tensors.items():
            properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
            chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
            entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
            for chunk in tensor.chunks:
                at = chunk.stored
                storage[MetadataIndex(name, chunk.offsets)] = _StorageInfo(at.file, at.offset, at.length)
        meta = StorageMeta(load_id=self.load_id)
        return Metadata(entries, planner_data=self._index.paths, storage_data=storage, storage_meta=meta)


class _SafePlanner(DefaultLoadPlanner):
    """DCP's planner, but non-tensor records are loaded with weights_only (DCP's own unpickles anything)."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, map_location="cpu", weights_only=True)
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        buffer.seek(0)
        super().load_bytes(read_item, buffer)


def load_checkpoint(path: Path, name: str, state: dict[str, Any]) -> Manifest:
    """Fills `state` ({"model": sd, "optim": sd}, either may be absent) in place from any world size. Collective.

    Tensors are loaded into the given ones (DTensors take their own shard); plain values (param_groups) are replaced.
    Sizes and the DCP metadata are checked against the manifest here; call `manifest.verify` or `latest_valid` first
    for the sha256 of every byte. Raises CheckpointError for what is missing, unexpected, of another shape or dtype.
    """
    folders = {"model": path / name, "optim": path / "trainer" / f"{name}_optim"}
    manifest = on_rank0(lambda: verify(path, deep=False))
    for part, values in state.items():
        folder = folders[part]
        prefix = folder.relative_to(path).as_posix() + "/"
        if f"{prefix}.metadata" not in manifest.files:
            have = ", ".join(manifest.models) or "nothing"
            raise CheckpointError(f"{path}: holds no {name} {part} (it has: {have})", "another stage's checkpoint?")
        on_rank0(lambda p=prefix: verify(path, [f"{p}.metadata"]))  # type: ignore[misc]
        files = [f.removeprefix(prefix) for f in manifest.files if f.startswith(prefix)]
        index = read_dcp_index(folder, files)
        _check_fit(folder, index, values)
        try:
            with _single_process_is_fine():
                dcp.load(values, storage_reader=_SafeReader(folder, index), planner=_SafePlanner(),
                         no_dist=rank_and_world()[1] == 1)  # fmt: skip
        except CheckpointException as error:
            reasons = "; ".join(str(wrapped[0]) for wrapped in error.failures.values())
            raise CheckpointError(f"{folder}: {reasons[:200]}", "use another checkpoint, or copy it again") from error
    return manifest


def _check_fit(folder: Path, index: DcpIndex, values: dict[str, Any]) -> None:
    flat, _ = flatten_state_dict(values)
    saved = set(index.tensors) | set(index.records)
    for kind, names in (("missing from", set(flat) - saved), ("left over in", saved - set(flat))):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
            raise CheckpointError(
                f"{folder}: {len(names)} entries {kind} the checkpoint: {shown}",
                "the model or its LoRA or optimiser settings differ from those it was saved with",
            )
    for key, tensor in flat.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        at = index.tensors.get(key)
        have = None if at is None else (at.shape, at.dtype)
        want = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if have != want:
            raise CheckpointError(f"{folder}: {key} is {have} in the checkpoint and {want} in the model", "same model?")


def load_rng(path: Path) -> dict[str, torch.Tensor] | None:
    """This rank's generator states; None when the checkpoint was saved at another world size."""
    rank, world = rank_and_world()
    if read_manifest(path).world_size != world:
        return None
    name = f"trainer/rng_rank_{rank}.safetensors"
    manifest = verify(path, [name])
    if name not in manifest.files:
        return None
    try:
        return load_file(path / name)
    except SafetensorError as error:
        raise CheckpointError(f"{path / name}: not a safetensors file: {error}", "use another checkpoint") from error
