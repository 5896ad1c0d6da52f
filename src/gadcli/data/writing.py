"""A cleaned copy of checked rows: parquet with the same other columns, and beside it what was dropped (torch-free)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from gadcli.data.read.files import FileInfo
from gadcli.data.read.formats import Fault
from gadcli.data.read.rows import Message, Row, RowBatch
from gadcli.errors import ConfigError, ResourceError

TURN = [("role", pa.string()), ("content", pa.large_string())]
MESSAGES = pa.list_(pa.struct(TURN))
MORE = ("name", "reasoning_content", "tool_call_id", "tool_calls")  # of a message; tool calls are stored as JSON
FULL_MESSAGES = pa.list_(pa.struct([*TURN, *((key, pa.large_string()) for key in MORE)]))


def dropped_path(out: Path) -> Path:
    return out.with_suffix(".dropped.jsonl")


def is_simple(row: Row) -> bool:
    """Whether a row is one answer to messages of nothing but role and content, as most are."""
    return row.tools is None and len(row.answers) == 1 and all(len(message) == 2 for message in row.messages)


def row_table(rows: list[Row], keys: tuple[str, str], simple: bool) -> pa.Table:
    """Rows in one of the two encodings we write: list<struct<role, content>> and large_string, or with room for
    what messages may hold beside these, several answers and tools."""
    if simple:
        messages = pa.array([row.messages for row in rows], MESSAGES)
        return pa.table({keys[0]: messages, keys[1]: pa.array([row.teacher for row in rows], pa.large_string())})
    columns = {
        keys[0]: pa.array([[_as_texts(message) for message in row.messages] for row in rows], FULL_MESSAGES),
        keys[1]: pa.array([row.answers for row in rows], pa.list_(pa.large_string())),
        "tools": pa.array([json.dumps(row.tools) if row.tools else None for row in rows], pa.large_string()),
    }
    return pa.table(columns)


def _as_texts(message: Message) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in message.items()}


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
        every = {c for i in infos for c in i.columns if c not in i.format.columns} - set(keys)
        self.left_out = sorted(every - {f.name for f in self.extras})
        self.rows = 0
        self.simple = True
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

    def add(self, batch: RowBatch, rows: list[Row]) -> None:
        """Some rows of a batch, as they are or with other answers."""
        if self.simple and not all(map(is_simple, rows)):
            self._widen()
        table = row_table(rows, self.keys, self.simple)
        if self.extras and batch.chunk is not None and batch.chunk.extras is not None:
            kept = batch.chunk.extras.take(pa.array([row.row_id - batch.first_id for row in rows], pa.int64()))
            for column in self.extras:
                table = table.append_column(column, kept.column(column.name))
        self._write(table)
        self.rows += len(rows)

    def _write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.part, table.schema, compression="zstd")
        self._writer.write_table(table)

    def _widen(self) -> None:
        """Write the rows so far again, in the encoding that has room for those to come."""
        self.simple = False
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        old = self.part.with_suffix(".simple")
        os.replace(self.part, old)
        try:
            with pq.ParquetFile(old) as file:
                for batch in file.iter_batches():
                    records = batch.select(self.keys).to_pylist()
                    table = row_table([Row(0, r[self.keys[0]], [r[self.keys[1]]]) for r in records], self.keys, False)
                    for column in self.extras:
                        table = table.append_column(column, batch.column(column.name))
                    self._write(table)
        finally:
            old.unlink()

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

    def write(self, batch: RowBatch, rows: list[Row]) -> None:
        """`rows` are kept, some perhaps with a shorter answer. Each other row gives a line: where it stood, why it was
        dropped, and the row itself."""
        self.add(batch, rows)
        kept = {row.row_id - batch.first_id for row in rows}
        reasons: dict[int, list[str]] = {}
        for finding in batch.findings:
            if finding.row is not None and finding.level == "error":
                reasons.setdefault(finding.row - batch.first_row, []).append(f"{finding.reason}: {finding.message}")
        for i in sorted(set(range(len(batch))) - kept):
            entry = {"file": batch.file, "row": batch.first_row + i, "reasons": reasons.get(i, []),
                     "data": _shown(batch, i)}  # fmt: skip
            self._dropped.write(json.dumps(entry, ensure_ascii=False, default=repr) + "\n")
            self.dropped += 1

    def commit(self) -> None:
        if self.rows:
            self._dropped.close()
            os.replace(self.dropped_part, dropped_path(self.out))
        super().commit()


def _shown(batch: RowBatch, i: int) -> Any:
    """The row as the file has it."""
    assert batch.chunk is not None
    if batch.chunk.extras is None:
        record = batch.chunk.records[i]
        return record.text if isinstance(record, Fault) else record
    extras = batch.chunk.extras
    return {name: _value(extras.column(j)[i]) for j, name in enumerate(extras.schema.names)}


def _value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return repr(value.as_buffer().to_pybytes()) if pa.types.is_string(value.type) else "not valid UTF-8"


def _common_extras(infos: list[FileInfo], keys: tuple[str, str]) -> list[pa.Field]:
    """Columns that no format reads and every file has in the same type."""
    schemas = [i.schema for i in infos if i.schema is not None]
    if not schemas or len(schemas) < len(infos):
        return []
    used = {*keys, "tools", *(c for i in infos for c in i.format.columns)}
    first = [f.remove_metadata() for f in schemas[0] if f.name not in used and schemas[0].names.count(f.name) == 1]
    return [f for f in first if all(f.name in s.names and s.field(f.name).type == f.type for s in schemas[1:])]
