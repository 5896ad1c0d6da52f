"""Whether a file is readable, and which of the known formats its rows are in (torch-free)."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from gadcli.data.read.findings import Finding, printable
from gadcli.data.read.formats import Fault, Format, choose_format
from gadcli.data.read.records import UNREADABLE, arrow_batches, kind_of, read_records
from gadcli.errors import ResourceError

PROBE_ROWS = 64
# A file that unfolds to over a thousand times its size, and to more than this, is a bomb and no corpus:
# dictionary encoding already removes repeats, and the best compressors reach 20x on prose.
BOMB_RATIO, BOMB_BYTES = 1000, 64 << 20


@dataclass(frozen=True)
class FileInfo:
    """A readable file: its kind (see `records.KINDS`), and how its rows are laid out.

    `rows` is None where they are not counted yet; `schema` is that of parquet and Arrow files.
    """

    path: str
    kind: str
    rows: int | None
    size: int
    columns: tuple[str, ...]
    format: Format
    schema: pa.Schema | None = None


def inspect(path: str, prompt_key: str, response_key: str | None) -> FileInfo | list[Finding]:
    """The file's kind, columns and format, or what makes it unusable. Reads the footer or the first rows only.
    Without a `response_key`, only prompts are looked for.

    Raises ResourceError for a file that would unfold out of all proportion.
    """
    try:
        path.encode()
    except UnicodeEncodeError:  # pyarrow cannot open it, and no report could be written about it
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        return [Finding("file_unreadable", shown, "has a name that is not valid UTF-8: rename it")]
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe that no one writes to would wait for ever
            return [Finding("file_unreadable", path, "is a pipe or device: files are read more than once")]
        if status.st_size == 0:
            return [Finding("file_unreadable", path, "is 0 bytes long")]
        kind = kind_of(path)
        look = {"parquet": _look_at_parquet, "arrow": _look_at_arrow}.get(kind, _look_at_records)
        found = look(path, kind, status.st_size)
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        return [Finding("file_unreadable", path, f"cannot be read: {reason}")]
    if isinstance(found, Finding):
        return [found]
    rows, columns, schema = found
    form = choose_format(columns, prompt_key, response_key)
    if form is None:
        keys = ((prompt_key, "data.prompt_key"), (response_key, "data.response_key"))
        return [missing_column(path, key, name, columns) for key, name in keys if key and key not in columns]
    findings = [f for f in (_column_fault(path, schema, form.prompt, True),
                            _column_fault(path, schema, form.answer, False)) if f]  # fmt: skip
    return findings or FileInfo(path, kind, rows, status.st_size, tuple(columns), form, schema)


Look = tuple[int | None, list[str], pa.Schema | None]  # rows, columns, schema


def _look_at_parquet(path: str, kind: str, size: int) -> Look | Finding:
    with pq.ParquetFile(path) as file:
        metadata, schema = file.metadata, file.schema_arrow
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        unfolded, counted = sum(g.total_byte_size for g in groups), sum(g.num_rows for g in groups)
        rows = metadata.num_rows
    if unfolded > BOMB_BYTES and unfolded > BOMB_RATIO * size:
        raise ResourceError(
            f"{path}: {size:,} bytes declare {unfolded:,} bytes of data: a decompression bomb",
            "check where the file comes from; write it again from the source if it is meant to be so",
        )
    if rows < 0 or rows != counted:
        return Finding("file_unreadable", path, f"footer says {rows} rows, its row groups {counted}")
    return (rows, schema.names, schema) if rows else Finding("file_empty", path, "has 0 rows")


def _look_at_arrow(path: str, kind: str, size: int) -> Look | Finding:
    rows, schema = 0, None
    for batch in arrow_batches(path):
        rows, schema = rows + batch.num_rows, batch.schema
    return (rows, schema.names, schema) if schema and rows else Finding("file_empty", path, "has 0 rows")


def _look_at_records(path: str, kind: str, size: int) -> Look | Finding:
    """Looks at the first rows: if none of them is an object, this is no data."""
    columns: dict[str, None] = {}
    seen = objects = 0
    for record, _ in islice(read_records(path, kind), PROBE_ROWS):
        seen += 1
        if not isinstance(record, Fault):
            objects += 1
            columns.update(dict.fromkeys(record))
    if seen == 0:
        return Finding("file_empty", path, "has 0 rows")
    if objects == 0:
        return Finding(
            "file_unreadable", path, f"holds no rows: neither parquet, Arrow, CSV nor JSON{_looks_like(path)}"
        )
    return None, list(columns), None


def _looks_like(path: str) -> str:
    """What a file that is no data seems to be, where the fix is known."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"PK"):
        return "; it is a zip archive or a spreadsheet: unpack it, or save it as CSV, first"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return "; it seems to be JSON over several lines: `jq -c . FILE > FILE.jsonl` writes one object per line"
    return ""


def missing_column(path: str, key: str, setting: str, columns: Collection[str]) -> Finding:
    """The finding for an absent column: the columns there are, and the nearest name."""
    shown = list(islice(columns, 12))
    names = printable(", ".join(shown)) + (", …" if len(columns) > 12 else "")
    near = difflib.get_close_matches(key, columns, n=1, cutoff=0.5)
    advice = f"; did you mean {setting}={printable(near[0])}?" if near else ""
    return Finding("column_missing", path, f"has no column {key!r}; columns: {names or 'none'}{advice}", field=key)


def _column_fault(path: str, schema: pa.Schema | None, key: str, messages: bool) -> Finding | None:
    """What is wrong with a column's type, if anything."""
    if schema is None or key not in schema.names:
        return None
    if schema.names.count(key) > 1:
        return Finding("column_type", path, f"has the column {key!r} more than once", field=key)
    kind = schema.field(key).type
    if _holds_text(kind) or _is_list(kind) or (pa.types.is_struct(kind) and not messages):
        return None
    return Finding("column_type", path, f"column {key!r} is {str(kind)[:60]}, which holds no text", field=key)


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pa.JsonType):  # DuckDB's JSON columns
        kind = kind.storage_type
    t = pa.types
    text = t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind) or t.is_null(kind)
    return text or t.is_binary(kind) or t.is_large_binary(kind) or t.is_binary_view(kind) or (
        t.is_fixed_size_binary(kind)
    )  # fmt: skip


def _is_list(kind: pa.DataType) -> bool:
    """Of structs or texts: numbers hold neither messages nor answers."""
    if not hasattr(kind, "value_type") or pa.types.is_dictionary(kind):
        return False
    return pa.types.is_struct(kind.value_type) or _holds_text(kind.value_type)
