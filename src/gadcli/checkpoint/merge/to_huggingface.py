"""`gad merge`: one checkpoint of one model to a Hugging Face folder: planned, streamed, verified, then renamed."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadcli.checkpoint.hf_folder import INDEX, read_json
from gadcli.checkpoint.hub_files import BASE_TENSORS, CONFIG, dump, is_tied, read_base_tensors
from gadcli.checkpoint.manifest import check_disk, human_bytes
from gadcli.checkpoint.merge import assets
from gadcli.checkpoint.merge.base import base_tensors
from gadcli.checkpoint.merge.expected import compare, compare_with_base, expected_shapes
from gadcli.checkpoint.merge.ours import read_ours
from gadcli.checkpoint.merge.plan import FLOATS, MergePlan, make_plan, saved_module
from gadcli.checkpoint.merge.source import LoraInfo, Source
from gadcli.checkpoint.merge.tensors import Files, check_storage, unchecked_storages
from gadcli.checkpoint.merge.verl import is_verl, read_verl
from gadcli.checkpoint.merge.write import read_back, write_all
from gadcli.checkpoint.safe_unpickle import DTYPES
from gadcli.errors import CheckpointError, ConfigError, ResourceError, is_full_disk
from gadcli.files import fsync_path

OWN = "own"  # each tensor's own dtype
DEFAULT_SHARD = 5_000_000_000
_SLACK = 32 << 20

# progress(phase, done bytes, total bytes)
Progress = Callable[[str, int, int], None]


@dataclass
class MergeOptions:
    """How to merge. dtype: torch's name; None is the base's where it is known, OWN keeps each tensor's.

    probe: compare logits through transformers; probe_vllm: and its greedy text with vLLM's.
    go_on: keep what a run that starts from the result needs to know.
    """

    base: Path | None = None
    base_name: str = ""
    dtype: str | None = None
    max_shard_bytes: int = DEFAULT_SHARD
    verify: bool = True
    probe: bool = False
    keep_adapter: bool = False
    trust: bool = False
    lora_alpha: float | None = None
    go_on: bool = False
    probe_vllm: bool = False


@dataclass
class MergeReport:
    """What was (or with dry_run would be) written."""

    out: Path
    files: dict[str, int]
    tensors: int
    nbytes: int
    notes: list[str]
    verified: list[str]


def _quiet(_phase: str, _done: int, _total: int) -> None:
    pass


def read_source(folder: Path, *, trust: bool = False) -> Source:
    """The checkpoint in `folder`, whichever of the two layouts it has; CheckpointError if neither."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder", "gad merge runs/NAME/global_step_N/actor -o DIR")
    if (folder / ".metadata").is_symlink() or (folder / ".metadata").exists():
        return read_ours(folder, trust=trust)
    if is_verl(folder):
        return read_verl(folder)
    raise CheckpointError(
        f"{folder}: neither DCP shards (.metadata) nor verl's model_world_size_W_rank_R.pt",
        "name a global_step_N/actor or global_step_N/critic folder",
    )


def to_huggingface(
    folder: Path,
    out: Path,
    options: MergeOptions | None = None,
    *,
    dry_run: bool = False,
    progress: Progress = _quiet,
) -> MergeReport:
    """Merges `folder` (one model's shards, ours or verl's) into the new folder `out`.

    Nothing appears at `out` unless all of it is written, fsynced and (verify) read back: names and shapes against the
    config, every tensor's bytes against the shards'. Raises CheckpointError (damaged, foreign, target exists),
    ResourceError (disk), ConfigError (options).
    """
    options = options or MergeOptions()
    if options.dtype not in (None, OWN, *FLOATS):
        raise ConfigError(f"--dtype {options.dtype}: not a floating dtype", f"one of: {', '.join(FLOATS)}")
    if (options.probe or options.probe_vllm) and options.keep_adapter:
        raise ConfigError("--probe compares a fused model: there is none with --keep-adapter", "leave one of them out")
    if options.max_shard_bytes < 1:
        raise ConfigError("--max-shard-size must be at least a byte", "--max-shard-size 5GB")
    _refuse_existing(out)
    source = read_source(folder, trust=options.trust)
    source.tensors.update(base_tensors(source, options.base))
    config = read_json(assets.config_file(source.assets, options.base))
    files = Files()
    try:
        lora = _lora(source, options)
        fuse = not (options.keep_adapter and source.has_lora)
        if options.keep_adapter and not source.has_lora:
            raise ConfigError(f"{folder}: has no LoRA adapter to keep", "leave out --keep-adapter")
        plan = make_plan(source, config, files, dtype=options.dtype, max_shard_bytes=options.max_shard_bytes,
                         fuse=fuse, lora=lora)  # fmt: skip
        verified: list[str] = []
        if options.verify and fuse:
            verified += _check_names(plan, source)
        side = _side_files(source, plan, options, fuse, lora)
        report = MergeReport(out, {f.name: f.nbytes for f in plan.files}, len(plan.tensors), plan.nbytes, plan.notes,
                             verified)  # fmt: skip
        report.files |= {name: len(t.encode()) if isinstance(t, str) else t.stat().st_size for name, t in side.items()}
        if not dry_run:
            parent = _existing_parent(out)
            check_disk(parent, sum(report.files.values()) + _SLACK, f"{out.name}", "free some space, or another -o DIR")
            _write(source, plan, side, files, options, out, progress, verified)
        return report
    finally:
        files.close()


def _check_names(plan: MergePlan, source: Source) -> list[str]:
    """Names and shapes against the config, and with dtypes against the base's own files where those are known."""
    wanted = expected_shapes(plan.config, critic=plan.critic, model=plan.model)
    found = {t.name: t.source.shape for t in plan.weights}
    if is_tied(plan.config) and not plan.critic:  # some files hold a tied head all the same
        found.pop("lm_head.weight", None)
    compare(found, wanted)
    base = read_base_tensors(source.assets)
    if not base:
        return ["names and shapes"]
    stored = {t.name: (DTYPES[t.dtype][0], t.shape) for t in plan.tensors}
    said, notes = compare_with_base(stored, base, plan.config, critic=plan.critic)
    plan.notes.extend(notes)
    return [said]


def merge_models(
    folders: Mapping[str, Path],
    out: Path,
    options: MergeOptions | None = None,
    *,
    dry_run: bool = False,
    progress: Progress = _quiet,
) -> list[MergeReport]:
    """Several models of one step to `out/<name>`, all or nothing; a single one (named "") to `out` itself."""
    if list(folders) == [""]:
        return [to_huggingface(folders[""], out, options, dry_run=dry_run, progress=progress)]
    _refuse_existing(out)
    if dry_run:
        return [to_huggingface(f, out / n, options, dry_run=True) for n, f in folders.items()]
    with _temporary(out) as folder:
        reports = [to_huggingface(f, folder / n, options, progress=progress) for n, f in folders.items()]
        fsync_path(folder)
        _refuse_existing(out)
        os.rename(folder, out)
        fsync_path(out.parent)
    for report in reports:
        report.out = out / report.out.name
    return reports


def _refuse_existing(out: Path) -> None:
    if out.is_symlink() or out.exists():
        raise CheckpointError(f"{out} exists: not overwritten", "give another -o DIR, or move it away")


def _existing_parent(out: Path) -> Path:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _lora(source: Source, options: MergeOptions) -> LoraInfo | None:
    if not source.has_lora:
        return None
    if options.lora_alpha is not None:
        return LoraInfo(options.lora_alpha)
    if source.lora is None:
        raise CheckpointError(
            f"{source.folder}: holds a LoRA adapter, but its alpha is not recorded",
            "--lora-alpha A (it is in the config)",
        )
    return source.lora


def _side_files(
    source: Source, plan: MergePlan, options: MergeOptions, fuse: bool, lora: LoraInfo | None
) -> dict[str, str | Path]:
    """Name -> text to write or file to copy, for everything but the weights."""
    lineage = dict(source.lineage)
    base = options.base_name or str(plan.config.get("_name_or_path") or lineage.get("base") or "")
    if base:
        lineage["base"] = base
    if source.has_lora:
        lineage["adapter"] = "LoRA, fused" if fuse else "LoRA, kept apart"
    side: dict[str, str | Path] = dict(asset_names(source, options, plan))
    if fuse:
        own = assets.config_file(source.assets, options.base)
        side[CONFIG] = own if read_json(own) == plan.config else dump(plan.config).decode()
        if options.go_on and source.assets and (source.assets / BASE_TENSORS).is_file():
            side[BASE_TENSORS] = source.assets / BASE_TENSORS
        index = plan.index_json()
        if index is not None:
            side[INDEX] = index + "\n"
    else:
        assert lora is not None
        side["adapter_config.json"] = _adapter_config(source, plan, lineage, base, lora)
    side[assets.LINEAGE] = assets.lineage_json(lineage)
    side["README.md"] = assets.model_card(lineage, plan.config, plan.nbytes, critic=plan.critic)
    return side


def asset_names(source: Source, options: MergeOptions, plan: MergePlan) -> dict[str, Path]:
    """Tokenizer, templates and generation config to copy."""
    return assets.asset_files(source.assets, options.base, critic=plan.critic)


def _adapter_config(source: Source, plan: MergePlan, lineage: dict[str, Any], base: str, lora: LoraInfo) -> str:
    if not base:
        raise ConfigError("--keep-adapter: which base model is the adapter for?", "--base MODEL")
    if len(plan.files) > 1:
        raise ConfigError("an adapter is one file: --max-shard-size is too small for it", "leave it out")
    ranks = {t.shape[0] for n, t in source.tensors.items() if n.endswith(".lora_A.default.weight")}
    if len(ranks) != 1:
        raise CheckpointError(f"{source.folder}: adapters of ranks {sorted(ranks)}: not supported", "fuse it instead")
    modules = sorted({n.split(".lora_")[0].rsplit(".", 1)[-1] for n in source.tensors if ".lora_A." in n})
    saved = sorted({saved_module(n) for n in source.tensors} - {""})
    return assets.adapter_config(lineage, base, ranks.pop(), lora.alpha, modules, critic=plan.critic,
                                 rslora=lora.rslora, saved=saved)  # fmt: skip


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, gone again unless it was renamed; leftovers of killed merges are removed too."""
    # The host is part of the name: on a shared disk another machine's process ids say nothing here.
    stem = f".{out.name}.tmp-{os.uname().nodename}-"
    folder = out.parent / f"{stem}{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f"{glob.escape(stem)}*"):
            pid = left.name.removeprefix(stem)
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(left, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        if is_full_disk(error):
            raise
        raise ConfigError(f"{out}: cannot be made: {error.strerror}", "another -o DIR") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(source: Source, plan: MergePlan, side: dict[str, str | Path], files: Files, options: MergeOptions,
           out: Path, progress: Progress, verified: list[str]) -> None:  # fmt: skip
    with _temporary(out) as folder, _disk_errors(out, plan.nbytes):
        if options.verify:
            _check_shards(source, files)
        for name, content in side.items():
            if isinstance(content, Path):
                assets.copy_durably(content, folder / name)
            else:
                assets.write_text(folder / name, content)
        written = write_all(plan, files, folder, _counter("write", plan.nbytes, progress), check=options.verify)
        if options.verify:
            read_back(plan, written, folder, _counter("verify", plan.nbytes, progress))
            verified += ["every tensor read back", "shards undamaged"]
        if options.probe:
            from gadcli.checkpoint.merge.probe import probe

            verified.append(probe(source, plan, folder, files))
        if options.probe_vllm and not plan.critic:
            from gadcli.checkpoint.merge.probe_vllm import probe_vllm

            verified.append(probe_vllm(folder))
        fsync_path(folder)
        _refuse_existing(out)
        os.rename(folder, out)
        fsync_path(out.parent)


def _check_shards(source: Source, files: Files) -> None:
    """sha256 of the manifest, and the CRCs of what the writing will not read whole. CheckpointError for damage."""
    if source.integrity is not None:
        source.integrity()
    for at in unchecked_storages(list(source.tensors.values())).values():
        check_storage(files, at)


def _counter(phase: str, total: int, progress: Progress) -> Callable[[int], None]:
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(phase, done, total)

    return add


@contextmanager
def _disk_errors(out: Path, need: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        free = shutil.disk_usage(_existing_parent(out)).free
        raise ResourceError(
            f"disk full while writing {out}: need {human_bytes(need)}, have {human_bytes(free)}",
            "free some space, or another -o DIR; nothing was left behind",
        ) from error
