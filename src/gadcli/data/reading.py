"""Files as a stream of chunks: memory is bounded by the chunk, never by the file, whatever the file declares.

Torch-free. What a parquet file declares is looked at before anything is decoded, the number of rows a chunk
takes follows from it, and while Arrow decodes, the process may grow by a fixed allowance only.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gadcli.data.arrays import whole_numbers
from gadcli.data.files import FileInfo, JsonFault, json_lines, parse_line
from gadcli.data.findings import Finding
from gadcli.data.parquet_pages import Column, PageError, chunk_pages, read_columns
from gadcli.data.rows import RawChunk
from gadcli.errors import ResourceError

CHUNK_ROWS = 8192
CHUNK_BYTES = 4 << 20  # what a chunk should hold of the two columns
WORST_CHUNK_BYTES = 64 << 20  # what it may hold if every value were the longest one declared
MAX_PAGE_BYTES = 128 << 20  # DuckDB writes pages of up to 100 MB, everyone else of about 1 MB
DECODE_ALLOWANCE = 768 << 20


def read_chunks(
    info: FileInfo, columns: tuple[str, str], with_extras: bool = False, most_rows: int = CHUNK_ROWS
) -> Iterator[RawChunk | Finding]:
    """The file's rows in order, as chunks of at most `most_rows`; a Finding stands where a row group cannot be decoded.

    Raises ResourceError where a page or a row would not fit in memory.
    """
    if info.kind == "jsonl":
        yield from _read_jsonl(info, columns, most_rows, with_extras)
        return
    try:
        with pq.ParquetFile(info.path, buffer_size=1 << 20, page_checksum_verification=True) as file:
            first_row = 0
            wanted = tuple(file.schema_arrow.names) if with_extras else columns
            pages = read_columns(info.path, wanted)
            if len(pages) != file.metadata.num_row_groups:
                raise PageError("the footer's row groups cannot be read")
            for group in range(file.metadata.num_row_groups):
                yield from _read_group(file, info, columns, group, first_row, with_extras, most_rows, pages[group])
                first_row += file.metadata.row_group(group).num_rows
    except (pa.ArrowException, OSError, PageError) as error:
        yield Finding("file_unreadable", info.path, f"cannot be read: {_short(error)}")


def _read_group(
    file: pq.ParquetFile, info: FileInfo, columns: tuple[str, str], group: int, first_row: int, with_extras: bool,
    most_rows: int,
    pages: list[Column],
) -> Iterator[RawChunk | Finding]:  # fmt: skip
    row = first_row
    wanted = None if with_extras else list(columns)
    try:
        size = min(chunk_rows(info.path, group, file.metadata.row_group(group).num_rows, pages), most_rows)
        batches = file.iter_batches(batch_size=size, row_groups=[group], columns=wanted, use_threads=False)
        while True:
            with bounded_memory(f"{info.path}, row group {group}"):
                batch = next(batches, None)
            if batch is None:
                break
            for column in batch.columns:
                check_dictionaries(column)
            content, teacher = (batch.column(batch.schema.get_field_index(c)) for c in columns)
            yield RawChunk(info.path, group, row, content, teacher, batch if with_extras else None)
            row += batch.num_rows
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError, PageError) as error:
        yield Finding("page_corrupt", info.path, f"row group {group} cannot be decoded: {_short(error)}", group)
        return
    missing = file.metadata.row_group(group).num_rows - (row - first_row)
    if missing:
        message = f"row group {group} declares {missing} more rows than it holds"
        yield Finding("page_corrupt", info.path, message, group)


def check_dictionaries(array: pa.Array) -> None:
    """Raises ArrowInvalid where a value points outside its dictionary: Arrow reads damaged indexes as they are."""
    if pa.types.is_dictionary(array.type):
        at = whole_numbers(array.indices.cast(pa.int64()), null=0)
        if len(at) > array.null_count and not (at.min() >= 0 and at.max() < len(array.dictionary)):
            raise pa.ArrowInvalid("a value points outside its dictionary")
    elif pa.types.is_struct(array.type):
        for i in range(array.type.num_fields):
            check_dictionaries(array.field(i))
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        check_dictionaries(array.values)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def chunk_rows(path: str, group: int, rows: int, columns: list[Column]) -> int:
    """How many rows of a row group may be decoded at once. Raises ResourceError if a page is too large."""
    size, worst = 0, 0.0
    with open(path, "rb") as raw:
        for column in columns:
            pages = chunk_pages(raw.fileno(), column, entry_matters_from=WORST_CHUNK_BYTES // CHUNK_ROWS)
            if pages.largest_page > MAX_PAGE_BYTES:
                raise ResourceError(
                    f"{path}: row group {group}, column {column.path}: a page of {pages.largest_page:,} bytes, packed "
                    f"into {column.packed_bytes:,}: a decompression bomb",
                    f"pages may hold {MAX_PAGE_BYTES:,} bytes; write the file again if it is meant to be so",
                )
            size += column.plain_bytes
            worst += column.num_values / max(rows, 1) * max(pages.mean_value_bytes, pages.largest_entry)
    by_size = CHUNK_BYTES * max(rows, 1) // max(size, 1)
    by_worst = int(WORST_CHUNK_BYTES / max(worst, 1.0))
    return max(1, min(CHUNK_ROWS, max(by_size, 16), by_worst))


@contextmanager
def bounded_memory(what: str) -> Iterator[None]:
    """Let the process grow by DECODE_ALLOWANCE and no further; beyond it ResourceError, not the OOM killer.

    Headers bound what a page holds, but not how often one row may repeat a long dictionary entry.
    Only Linux counts anonymous memory against RLIMIT_DATA; elsewhere this changes nothing.
    """
    if not os.path.exists("/proc/self/statm"):
        yield
        return
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[5]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + DECODE_ALLOWANCE
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    except MemoryError:
        message = f"{what}: decoding a few rows takes over {DECODE_ALLOWANCE >> 20} MB: a decompression bomb"
        raise ResourceError(message, "check where the file comes from") from None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _read_jsonl(info: FileInfo, columns: tuple[str, str], most_rows: int, with_records: bool) -> Iterator[RawChunk]:
    content: list[Any] = []
    teacher: list[Any] = []
    records: list[Any] = []
    first_row, held = 0, 0
    for line in json_lines(info.path):
        value = parse_line(line)
        if isinstance(value, dict):
            content.append(value.get(columns[0]))
            teacher.append(value.get(columns[1]))
        else:
            fault = value if isinstance(value, JsonFault) else JsonFault(f"a {type(value).__name__}, not an object")
            content.append(fault)
            teacher.append(fault)
        if with_records:
            records.append(value if isinstance(value, dict) else (line or b"").decode("utf-8", "backslashreplace"))
        held += len(line or b"")
        if len(content) >= most_rows or held >= CHUNK_BYTES:
            yield RawChunk(info.path, None, first_row, content, teacher, None, records or None)
            first_row += len(content)
            content, teacher, records, held = [], [], [], 0
    if content:
        yield RawChunk(info.path, None, first_row, content, teacher, None, records or None)
