"""What a run starts from, looked at without loading anything: data files and rows, fingerprints, models and parents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gadcli.checkpoint.manifest import MANIFEST, step_of
from gadcli.checkpoint.resolve_model import check_model
from gadcli.config.modelinfo import local_model_dir
from gadcli.config.schema import DataConfig, GadConfig
from gadcli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from gadcli.data.read.files import FileInfo

WHOLE_FILE_BYTES = 64 << 20
EDGE_BYTES = 1 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "vocab.json")


@dataclass(frozen=True)
class DataLook:
    """The files a run reads, and what was chosen or guessed among them; the rows to train on, before any is dropped,
    or None while no file is named, and the teacher's answers in them (one per row, but for lists of answers)."""

    train_files: list[Path]
    val_files: list[Path]
    train_rows: int | None
    notes: list[str]
    train_answers: int | None = None


def look_at(data: DataConfig) -> DataLook:
    """Find the files, look into each, count rows.

    Raises DataError (3) for what is missing, unreadable or without the columns.
    """
    if not data.train_files:
        return DataLook([], [], None, [])
    from gadcli.data.read.choose import Choice, choose_files

    chosen = choose_files(data.train_files)
    held_out = choose_files(data.val_files, "val") if data.val_files else Choice()
    train, val = chosen.files, held_out.files
    notes = [f"{place}: {note}" for place, note in chosen.notes + held_out.notes]
    notes += [f"{path} is in data.train_files and data.val_files" for path in sorted({*train} & {*val})]
    counts = {path: count_rows(path, data, notes) for path in dict.fromkeys([*train, *val])}
    rows, answers = (sum(counts[path][i] for path in train) for i in (0, 1))
    if not val and rows:  # held out of the training files: their share of the answers is not known before they are read
        left = rows - min(data.val_rows, rows)
        rows, answers = left, answers * left // rows
    return DataLook([Path(path) for path in train], [Path(path) for path in val], rows, notes, answers)


def count_rows(path: str, data: DataConfig, notes: list[str]) -> tuple[int, int]:
    """Rows of one file and answers in them; its guessed format goes to `notes`. DataError names what makes it
    unusable."""
    from gadcli.data.read.files import inspect
    from gadcli.data.read.findings import Summary
    from gadcli.data.read.records import UNREADABLE, read_records

    info = inspect(path, data.prompt_key, data.response_key)
    if isinstance(info, list):
        summary = Summary()
        summary.add(info)
        raise DataError(
            "\n".join(finding.where() + " " + finding.message for finding in info[:2]),
            next(iter(summary.hints()), None),
        )
    if info.format.note:
        notes.append(f"{path}: {info.format.note}")
    try:
        if info.rows is not None:
            return info.rows, max(info.rows, listed_answers(info))
        rows = answers = 0
        for record, _ in read_records(path, info.kind):
            found = record.get(info.format.answer) if isinstance(record, dict) else None
            rows, answers = rows + 1, answers + (len(found) if isinstance(found, list) else 1)
        return rows, answers
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read to its end: {error}", "write or copy the file again") from None


def listed_answers(info: FileInfo) -> int:
    """Texts in a Parquet file's column of lists, by its footer; 0 where the column holds single texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = info.format.answer
    if info.kind != "parquet" or info.schema is None or name not in info.schema.names:
        return 0
    kind = info.schema.field(name).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or pa.types.is_nested(kind.value_type):
        return 0
    footer = pq.read_metadata(info.path)
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    columns = [group.column(j) for group in groups for j in range(group.num_columns)]
    return sum(column.num_values for column in columns if column.path_in_schema.startswith(f"{name}."))


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file; of a large one, sha256 over its size, first and last MiB (a parquet's footer)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        digest = hashlib.sha256(str(size).encode())
        digest.update(file.read(EDGE_BYTES))
        file.seek(-EDGE_BYTES, os.SEEK_END)
        digest.update(file.read(EDGE_BYTES))
    return {"bytes": size, "sha256": digest.hexdigest(), "sampled": True}


def check_model_path(path: str, *, role: str = "actor", dry_run: bool = False) -> None:
    """ConfigError (2) for what is not there or holds no model, CheckpointError (4) for a model or checkpoint that is
    damaged or unsafe. A hub name is the worker's to find; a config.json alone is enough for a plan."""
    local = Path(path).expanduser()
    looks_local = local.is_absolute() or path.startswith(("~", ".")) or path.count("/") > 1 or path.endswith(".gguf")
    if path and looks_local and not local.exists():
        raise ConfigError(f"model {path}: no such file or folder", nearest(local))
    if local.is_file() and local.name == "config.json":
        if not dry_run:
            raise ConfigError(f"model {path}: a config.json alone has no weights", "--dry-run plans with it")
        return
    if local.is_file() and local.suffix.lower() != ".gguf":
        raise ConfigError(f"model {path}: a file that is no .gguf", "--model takes a model's folder, or a .gguf file")
    check_model(path, role=role)


def nearest(path: Path) -> str:
    """What there is instead of a path that is not: the entries of the first folder above it that exists."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))[:8]
    return f"{parent} holds {', '.join(names) or 'nothing'}"


def model_lineage(path: str) -> dict[str, Any]:
    """What a model path stands for: the run and step it came from, and its tokenizer's fingerprint where known."""
    said: dict[str, Any] = {"path": path}
    folder = local_model_dir(path)
    local = Path(path).expanduser()
    step = step_of(local.parent) if local.is_dir() else None
    if step is not None:
        said |= {"run": str(local.parent.parent), "step": step, "manifest": _manifest_hash(local.parent)}
    if folder is not None:
        digest = hashlib.sha256()
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                digest.update(name.encode() + (folder / name).read_bytes())
        said["tokenizer_sha256"] = digest.hexdigest()
    return said


def _manifest_hash(checkpoint: Path) -> str | None:
    manifest = checkpoint / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None


def make_lineage(config: GadConfig, files: Iterable[Path]) -> dict[str, Any]:
    """lineage.json of a new run."""
    parents = {"actor": model_lineage(config.actor.model.path)}
    if config.trainer.critic_warmup >= 0 and config.critic.model.path:
        parents["critic"] = model_lineage(config.critic.model.path)
    return {
        "stage": config.stage,
        "preset": config.preset,
        "parents": parents,
        "data": {str(path): fingerprint(path) for path in files},
    }
