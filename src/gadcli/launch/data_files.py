"""A first look at a run's data: which files, how many rows. Reads footers and counts lines; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gadcli.config.schema import DataConfig
from gadcli.errors import DataError

if TYPE_CHECKING:
    from gadcli.data.read.files import FileInfo


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
