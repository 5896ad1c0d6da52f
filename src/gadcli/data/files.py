"""Which files are meant, and whether each is readable and holds the two columns (torch-free)."""

from __future__ import annotations

import difflib
import glob
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gadcli.data.findings import Finding, printable
from gadcli.errors import DataError, ResourceError

PARQUET_SUFFIXES = (".parquet", ".pq")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
MAX_LINE_BYTES = 16 << 20  # parsed, 3 bytes of `[],` are 64 in memory
PROBE_LINES = 64
# A file that unfolds to over a thousand times its size, and to more than this, is a bomb and no corpus:
# dictionary encoding already removes repeats, and the best compressors reach 20x on prose.
BOMB_RATIO, BOMB_BYTES = 1000, 64 << 20


@dataclass(frozen=True)
class FileInfo:
    """A readable file. `rows` is None for jsonl (not counted yet); `types` name how the columns are stored."""

    path: str
    kind: str  # parquet | jsonl
    rows: int | None
    size: int
    columns: tuple[str, ...]
    types: tuple[str, str]


def expand(patterns: list[str] | tuple[str, ...]) -> list[str]:
    """Files named by paths, folders (searched to the bottom) and globs, each pattern's matches in sorted order.

    Raises DataError if a pattern matches nothing.
    """
    found: list[str] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = _inside(path)
        elif path.exists():
            matches = [str(path)]
        else:
            globbed = [Path(m) for m in sorted(glob.glob(str(path), recursive=True))]
            # Spark writes folders called x.parquet; `**` matches them and the files in them.
            each = (
                _inside(m) if m.is_dir() and m.suffix in PARQUET_SUFFIXES else [str(m)] * m.is_file() for m in globbed
            )
            matches = list(dict.fromkeys(chain.from_iterable(each)))
        if not matches:
            kinds = ", ".join(PARQUET_SUFFIXES + JSONL_SUFFIXES)
            raise DataError(f"{pattern}: no such file, folder with data, or match", f"looked for {kinds}")
        found += matches
    if not found:
        raise DataError("no data files given", "name parquet or jsonl files, folders or globs")
    return found


def _inside(folder: Path) -> list[str]:
    return [str(p) for p in sorted(folder.rglob("*")) if _is_data(p)]


def _is_data(path: Path) -> bool:
    return path.is_file() and path.suffix in PARQUET_SUFFIXES + JSONL_SUFFIXES and not path.name.startswith((".", "_"))


def inspect(path: str, prompt_key: str, response_key: str | None) -> FileInfo | list[Finding]:
    """The file's kind, rows and columns, or what makes it unusable. Reads the footer or the first lines only.
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
        size = status.st_size
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        return [Finding("file_unreadable", path, f"cannot be opened: {error.strerror}")]
    if size == 0:
        return [Finding("file_unreadable", path, "is 0 bytes long")]
    if magic == b"PAR1" or path.endswith(PARQUET_SUFFIXES):
        return _inspect_parquet(path, size, prompt_key, response_key)
    return _inspect_jsonl(path, size, prompt_key, response_key)


def missing_column(path: str, key: str, setting: str, columns: list[str]) -> Finding:
    """The finding for an absent column: the columns there are, and the nearest name."""
    names = printable(", ".join(columns[:12])) + (", …" if len(columns) > 12 else "")
    near = difflib.get_close_matches(key, columns, n=1, cutoff=0.5)
    advice = f"; did you mean {setting}={printable(near[0])}?" if near else ""
    return Finding("column_missing", path, f"has no column {key!r}; columns: {names or 'none'}{advice}", field=key)


def _inspect_parquet(path: str, size: int, prompt_key: str, response_key: str | None) -> FileInfo | list[Finding]:
    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
            unfolded = sum(metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups))
            rows = metadata.num_rows
            counted = sum(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:120]
        return [Finding("file_unreadable", path, f"is not a readable parquet file: {reason}")]
    if unfolded > BOMB_BYTES and unfolded > BOMB_RATIO * size:
        raise ResourceError(
            f"{path}: {size:,} bytes declare {unfolded:,} bytes of data: a decompression bomb",
            "check where the file comes from; write it again from the source if it is meant to be so",
        )
    if rows < 0 or rows != counted:
        return [Finding("file_unreadable", path, f"footer says {rows} rows, its row groups {counted}")]
    if rows == 0:
        return [Finding("file_empty", path, "has 0 rows")]
    findings = []
    types = []
    for key, setting, allowed in (
        (prompt_key, "data.prompt_key", _holds_messages),
        (response_key, "data.response_key", _holds_text),
    ):
        if key is None:
            continue
        if key not in schema.names:
            findings.append(missing_column(path, key, setting, schema.names))
        elif schema.names.count(key) > 1:
            findings.append(Finding("column_type", path, f"has the column {key!r} more than once", field=key))
        elif not allowed(schema.field(key).type):
            kind = str(schema.field(key).type)[:60]
            findings.append(Finding("column_type", path, f"column {key!r} is {kind}, which holds no text", field=key))
        else:
            types.append(str(schema.field(key).type))
    if findings:
        return findings
    return FileInfo(path, "parquet", rows, size, tuple(schema.names), (types[0], types[-1]))


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pa.JsonType):  # DuckDB's JSON columns
        kind = kind.storage_type
    return is_text(kind) or is_bytes(kind) or pa.types.is_null(kind)


def _holds_messages(kind: pa.DataType) -> bool:
    return _holds_text(kind) or (is_list(kind) and (pa.types.is_struct(kind.value_type)))


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def _inspect_jsonl(path: str, size: int, prompt_key: str, response_key: str | None) -> FileInfo | list[Finding]:
    """Looks at the first lines: if none of them is an object, the file is no jsonl."""
    columns: dict[str, None] = {}
    objects = lines = 0
    for line in json_lines(path):
        value = parse_line(line)
        if isinstance(value, dict):
            objects += 1
            columns.update(dict.fromkeys(str(k) for k in value))
        lines += 1
        if lines >= PROBE_LINES:
            break
    if lines == 0:
        return [Finding("file_empty", path, "has 0 rows")]
    if objects == 0:
        return [Finding("file_unreadable", path, f"is neither parquet nor lines of JSON objects{_looks_like(path)}")]
    missing = [
        missing_column(path, key, setting, list(columns))
        for key, setting in ((prompt_key, "data.prompt_key"), (response_key, "data.response_key"))
        if key is not None and key not in columns
    ]
    return missing or FileInfo(path, "jsonl", None, size, tuple(columns), ("json", "json"))


def _looks_like(path: str) -> str:
    """What a file that is no data seems to be, where the cure is known."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith((b"\x1f\x8b", b"(\xb5/\xfd", b"BZh", b"PK")):
        return "; it is compressed: unpack it first"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return "; it is one JSON list: write one object a line"
    return ""


def json_lines(path: str) -> Iterator[bytes | None]:
    """Lines that are not blank, as bytes; None in place of a line over MAX_LINE_BYTES."""
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield None
            elif not line.isspace():
                yield line


def parse_line(line: bytes | None) -> object:
    """The JSON value of a line; ValueError's message (a str subclass would hide it) is returned as JsonFault."""
    if line is None:
        return JsonFault(f"a line of over {MAX_LINE_BYTES >> 20} MB")
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return JsonFault("not valid UTF-8", utf8=True)
    except (ValueError, RecursionError) as error:
        return JsonFault(f"not valid JSON ({str(error)[:60]})")


@dataclass(frozen=True)
class JsonFault:
    """Why a piece of JSON could not be read."""

    message: str
    utf8: bool = False
