"""A first look at a run's data: which files, how many rows. Reads footers and counts lines; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gadcli.config.schema import DataConfig
from gadcli.errors import DataError


@dataclass(frozen=True)
class DataLook:
    """The files a run reads, and what was chosen or guessed among them; the rows to train on, before any is dropped,
    or None while no file is named."""

    train_files: list[Path]
    val_files: list[Path]
    train_rows: int | None
    notes: list[str]


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
    rows = sum(counts[path] for path in train)
    if not val:
        rows -= min(data.val_rows, rows)  # held out of the training files
    return DataLook([Path(path) for path in train], [Path(path) for path in val], rows, notes)


def count_rows(path: str, data: DataConfig, notes: list[str]) -> int:
    """Rows of one file, whose guessed format goes to `notes`; DataError names what makes it unusable."""
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
        return info.rows if info.rows is not None else sum(1 for _ in read_records(path, info.kind))
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read to its end: {error}", "write or copy the file again") from None
