"""A cleaned copy of checked rows: parquet with the same other columns, and beside it what was dropped (torch-free)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gadcli.data.arrays import indexes
from gadcli.data.files import FileInfo
from gadcli.data.rows import RowBatch
from gadcli.errors import ConfigError, ResourceError

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]))


def dropped_path(out: Path) -> Path:
    return out.with_suffix(".dropped.jsonl")


def row_table(batch: RowBatch, rows: Any, keys: tuple[str, str], teachers: list[str]) -> pa.Table:
    """Good rows in the one encoding we write: list<struct<role, content>> and large_string."""
    conversations = pa.array(batch.conversations(rows), MESSAGES)
    return pa.table({keys[0]: conversations, keys[1]: pa.array(teachers, pa.large_string())})


class RowWriter:
    """Writes rows to a temporary file beside `out`, renamed by `commit`; without it nothing is left behind.

    Other columns are kept where every file has them in the same type; `left_out` names the rest.
    """

    def __init__(self, out: Path, infos: list[FileInfo], keys: tuple[str, str]) -> None:
        if out.exists():
            raise ConfigError(f"{out}: exists already", "choose another -o")
        self.out, self.keys = out, keys
        self.part = out.with_name(f".{out.name}.{os.getpid()}.part")
        self.extras = _common_extras(infos, keys)
        every = {c for i in infos for c in i.columns} - set(keys)
        self.left_out = sorted(every - {f.name for f in self.extras})
        self.rows = 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.part.touch()
        except OSError as error:
            raise ConfigError(f"{self.out}: cannot be written: {error.strerror}", "choose another -o") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:  # fmt: skip
        if self._writer is not None:
            self._writer.close()
        self.part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ResourceError(f"{self.out}: {error.strerror}", "free disk space, then run again") from None

    def add(self, batch: RowBatch, rows: Any, teachers: list[str] | None = None) -> None:
        """Some rows of a batch, optionally with other answers."""
        table = row_table(batch, rows, self.keys, batch.teacher_texts(rows) if teachers is None else teachers)
        for column in self.extras:
            if batch.extras is not None:
                values = batch.extras.column(batch.extras.schema.get_field_index(column.name))
                table = table.append_column(column, values.take(indexes(rows)))
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.part, table.schema, compression="zstd")
        self._writer.write_table(table)
        self.rows += len(rows)

    def commit(self) -> None:
        if self._writer is not None and self.rows:
            self._writer.close()
            self._writer = None
            os.replace(self.part, self.out)


class CleanWriter(RowWriter):
    """A RowWriter of good rows that also keeps what was dropped, in `dropped_path(out)`."""

    def __init__(self, out: Path, infos: list[FileInfo], keys: tuple[str, str]) -> None:
        super().__init__(out, infos, keys)
        if dropped_path(out).exists():
            raise ConfigError(f"{dropped_path(out)}: exists already", "choose another -o")
        self.dropped = 0
        self.dropped_part = self.part.with_suffix(".dropped")

    def __enter__(self) -> Self:
        super().__enter__()
        # Halves of surrogate pairs, which jsonl may hold, come out as JSON's own escapes.
        self._dropped = open(self.dropped_part, "w", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:  # fmt: skip
        self._dropped.close()
        self.dropped_part.unlink(missing_ok=True)
        super().__exit__(kind, error, trace)

    def write(self, batch: RowBatch, trimmed: dict[int, str]) -> None:
        """Good rows, and those in `trimmed` (by their index in the batch) with a shorter answer."""
        usable = ~batch.bad
        usable[list(trimmed)] = True
        rows = np.flatnonzero(usable).astype(np.int64)
        teachers = [trimmed.get(i, t) for i, t in zip(rows.tolist(), batch.teacher_texts(rows), strict=True)]
        self.add(batch, rows, teachers)
        self._write_dropped(batch, usable)

    def _write_dropped(self, batch: RowBatch, usable: Any) -> None:
        """One line a dropped row: where it stood, why, and the row itself."""
        reasons: dict[int, list[str]] = {}
        for finding in batch.findings:
            if finding.row is not None and finding.level == "error":
                reasons.setdefault(finding.row - batch.first_row, []).append(f"{finding.reason}: {finding.message}")
        for i in np.flatnonzero(~usable).tolist():
            row: Any = None
            if batch.extras is not None:
                row = {n: _shown(batch.extras.column(j)[i]) for j, n in enumerate(batch.extras.schema.names)}
            elif batch.records is not None:
                row = batch.records[i]
            entry = {"file": batch.file, "row": batch.first_row + i, "reasons": reasons.get(i, []), "data": row}
            self._dropped.write(json.dumps(entry, ensure_ascii=False, default=repr) + "\n")
            self.dropped += 1

    def commit(self) -> None:
        if self.rows:
            self._dropped.close()
            os.replace(self.dropped_part, dropped_path(self.out))
        super().commit()


def _shown(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return repr(value.as_buffer().to_pybytes()) if pa.types.is_string(value.type) else "not valid UTF-8"


def _common_extras(infos: list[FileInfo], keys: tuple[str, str]) -> list[pa.Field]:
    if not infos or any(i.kind != "parquet" for i in infos):
        return []
    schemas = [pq.read_schema(i.path) for i in infos]
    first = [f.remove_metadata() for f in schemas[0] if f.name not in keys and schemas[0].names.count(f.name) == 1]
    return [f for f in first if all(f.name in s.names and s.field(f.name).type == f.type for s in schemas[1:])]
