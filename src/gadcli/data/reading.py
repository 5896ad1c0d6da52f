"""Files as a stream of chunks: memory is bounded by the chunk, never by the file, whatever the file declares.

Torch-free. The footer's sizes give the number of rows decoded at once; while Arrow decodes, the process may grow by a
fixed allowance only. Where that is not enough (long texts that a dictionary repeats), fewer rows are decoded at once.
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
from gadcli.data.rows import RawChunk
from gadcli.errors import ResourceError

CHUNK_ROWS = 8192
CHUNK_BYTES = 4 << 20  # what a chunk should hold
DECODE_ALLOWANCE = 192 << 20  # memory that decoding a chunk may take before it is tried with fewer rows
LAST_ALLOWANCE = 768 << 20  # and for one row: DuckDB writes pages of up to 100 MB, everyone else of about 1 MB


def read_chunks(
    info: FileInfo, columns: tuple[str, str], with_extras: bool = False, most_rows: int = CHUNK_ROWS
) -> Iterator[RawChunk | Finding]:
    """The file's rows in order, as chunks of at most `most_rows`; a Finding stands where a row group cannot be decoded.

    Raises ResourceError where a row does not fit in memory.
    """
    if info.kind == "jsonl":
        yield from _read_jsonl(info, columns, most_rows, with_extras)
        return
    try:
        # Pre-buffering would hold a row group's columns whole.
        with pq.ParquetFile(info.path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file:
            first_row = 0
            for group in range(file.metadata.num_row_groups):
                yield from _read_group(file, info, columns, group, first_row, with_extras, most_rows)
                first_row += file.metadata.row_group(group).num_rows
    except (pa.ArrowException, OSError) as error:
        yield Finding("file_unreadable", info.path, f"cannot be read: {_short(error)}")


def _read_group(
    file: pq.ParquetFile, info: FileInfo, columns: tuple[str, str], group: int, first_row: int, with_extras: bool,
    most_rows: int,
) -> Iterator[RawChunk | Finding]:  # fmt: skip
    row, rows = first_row, file.metadata.row_group(group).num_rows
    try:
        for batch in _batches(file, info.path, group, None if with_extras else list(columns), most_rows):
            for start, length in _slices(batch):
                part = batch.slice(start, length)
                content, teacher = (part.column(part.schema.get_field_index(c)) for c in columns)
                yield RawChunk(info.path, group, row, content, teacher, part if with_extras else None)
                row += length
    except (pa.ArrowException, OSError, ValueError) as error:
        yield Finding("page_corrupt", info.path, f"row group {group} cannot be decoded: {_short(error)}", group)
        return
    if row - first_row != rows:
        message = f"row group {group} declares {rows - row + first_row} more rows than it holds"
        yield Finding("page_corrupt", info.path, message, group)


def _batches(
    file: pq.ParquetFile, path: str, group: int, columns: list[str] | None, most_rows: int
) -> Iterator[pa.RecordBatch]:
    """A row group decoded within the allowance: a sixteenth of the rows at once whenever they need more.

    The footer gives the mean size of a row, so most groups need one attempt.
    """
    metadata = file.metadata.row_group(group)  # its columns are not asked: pyarrow aborts on some damaged footers
    size = max(1, min(most_rows, max(16, CHUNK_BYTES * metadata.num_rows // max(metadata.total_byte_size, 1))))
    done = 0
    while True:
        batches = file.iter_batches(batch_size=size, row_groups=[group], columns=columns, use_threads=False)
        seen = 0
        try:
            while True:
                with bounded_memory(DECODE_ALLOWANCE if size > 1 else LAST_ALLOWANCE):
                    batch = next(batches, None)
                    if batch is None:
                        return
                    for column in batch.columns:
                        check_dictionaries(column)
                seen += batch.num_rows
                if seen > done:
                    yield batch.slice(batch.num_rows - (seen - done))
                    done = seen
        except MemoryError:
            if size == 1:
                message = f"{path}, row group {group}: decoding row {done} of it takes over {LAST_ALLOWANCE >> 20} MB"
                raise ResourceError(f"{message}: a decompression bomb", "check where the file comes from") from None
            size = max(1, size // 16)


def _slices(batch: pa.RecordBatch) -> Iterator[tuple[int, int]]:
    """Starts and lengths of parts that hold about CHUNK_BYTES each."""
    step = max(1, CHUNK_BYTES * batch.num_rows // max(batch.nbytes, 1))
    return ((start, min(step, batch.num_rows - start)) for start in range(0, batch.num_rows, step))


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


@contextmanager
def bounded_memory(allowance: int) -> Iterator[None]:
    """Let the process grow by `allowance` bytes and no further; beyond it MemoryError, not the OOM killer.

    A footer bounds what a column holds, but not how often its rows repeat a long dictionary entry, and it may lie.
    Only Linux counts anonymous memory against RLIMIT_DATA; elsewhere this changes nothing.
    """
    if not os.path.exists("/proc/self/statm"):
        yield
        return
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[5]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + allowance
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
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
