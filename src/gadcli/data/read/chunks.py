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

from gadcli.data.read.files import FileInfo
from gadcli.data.read.findings import Finding
from gadcli.data.read.formats import Fault, Record
from gadcli.data.read.records import UNREADABLE, arrow_batches, read_records
from gadcli.data.read.rows import Chunk
from gadcli.errors import ResourceError

CHUNK_ROWS = 8192
CHUNK_BYTES = 4 << 20  # what a chunk should hold
DECODE_ALLOWANCE = 192 << 20  # memory that decoding a chunk may take before it is tried with fewer rows
# For one row at a time: most pages hold about 1 MB, but DuckDB's 100 MB, and pyarrow's 1,024 rows of any length. What a
# file may honestly need is a few times its row group; a bomb's group is far larger than its file.
LAST_ALLOWANCE = 768 << 20
HONEST_RATIO, MOST_ALLOWANCE = 50, 3 << 30


def read_chunks(info: FileInfo, with_extras: bool = False, most_rows: int = CHUNK_ROWS) -> Iterator[Chunk | Finding]:
    """The file's rows in order, as chunks of at most `most_rows`; a Finding stands where a part cannot be decoded.

    Raises ResourceError where a row does not fit in memory.
    """
    read = {"parquet": _read_parquet, "arrow": _read_arrow}.get(info.kind, _read_records)
    try:
        yield from read(info, with_extras, most_rows)
    except UNREADABLE as error:
        yield Finding("file_unreadable", info.path, f"cannot be read: {_short(error)}")


def _read_parquet(info: FileInfo, with_extras: bool, most_rows: int) -> Iterator[Chunk | Finding]:
    wanted = None if with_extras else [c for c in info.format.columns if c in info.columns]
    # Pre-buffering would hold a row group's columns whole.
    with pq.ParquetFile(info.path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file:
        first_row = 0
        for group in range(file.metadata.num_row_groups):
            row, rows = first_row, file.metadata.row_group(group).num_rows
            try:
                for batch in _batches(file, info.path, group, wanted, most_rows):
                    for chunk in _chunks(info, batch, group, row, with_extras, most_rows):
                        yield chunk
                        row += len(chunk.records)
                if row - first_row != rows:
                    raise ValueError(f"{rows - row + first_row} of {rows} declared rows are missing")
            except (pa.ArrowException, OSError, ValueError) as error:
                yield Finding("page_corrupt", info.path, f"row group {group} cannot be decoded: {_short(error)}", group)
            first_row += rows


def _read_arrow(info: FileInfo, with_extras: bool, most_rows: int) -> Iterator[Chunk]:
    row = 0
    for batch in arrow_batches(info.path):
        batch.validate(full=True)  # offsets are as the file has them
        yield from _chunks(info, without_dictionaries(batch), None, row, with_extras, most_rows)
        row += batch.num_rows


def _read_records(info: FileInfo, with_extras: bool, most_rows: int) -> Iterator[Chunk]:
    held: list[Record | Fault] = []
    row = size = 0
    for record, length in read_records(info.path, info.kind):
        held.append(record)
        size += length
        if len(held) >= most_rows or size >= CHUNK_BYTES:
            yield Chunk(info.path, None, row, held)
            row, held, size = row + len(held), [], 0
    if held:
        yield Chunk(info.path, None, row, held)


def last_allowance(file_bytes: int, group_bytes: int) -> int:
    """Bytes that decoding one row of a row group may take, from the sizes of the file and of the unfolded group."""
    honest = group_bytes < HONEST_RATIO * file_bytes
    return min(MOST_ALLOWANCE, max(LAST_ALLOWANCE, 3 * group_bytes if honest else 0))


def _chunks(
    info: FileInfo, batch: pa.RecordBatch, group: int | None, row: int, with_extras: bool, most_rows: int
) -> Iterator[Chunk]:
    """A record batch in parts of about CHUNK_BYTES, as Python values of the columns that the format reads."""
    step = min(most_rows, max(1, CHUNK_BYTES * batch.num_rows // max(batch.nbytes, 1)))
    names = [name for name in info.format.columns if name in batch.schema.names]
    for start in range(0, batch.num_rows, step):
        part = batch.slice(start, step)
        columns = [_values(part.column(name)) for name in names]
        records: list[Record | Fault] = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        yield Chunk(info.path, group, row + start, records, part if with_extras else None)


def _values(array: pa.Array) -> list[Any]:
    """Python values; a Fault in place of those that hold text which is not UTF-8 (parquet readers do not check)."""
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in array]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Fault("content_utf8", "a message is not valid UTF-8")


def without_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Without dictionaries, whose repeats would be counted once and unfold later.

    Raises ArrowInvalid where a value points outside its dictionary: Arrow reads damaged indexes as they are.
    """
    fields = [field.with_type(_plain_type(field.type)) for field in batch.schema]
    if all(old.type == new.type for old, new in zip(batch.schema, fields, strict=True)):
        return batch
    batch.validate(full=True)
    return batch.cast(pa.schema(fields))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain_type(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain_type(kind.value_type)))
    return kind


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _batches(
    file: pq.ParquetFile, path: str, group: int, columns: list[str] | None, most_rows: int
) -> Iterator[pa.RecordBatch]:
    """A row group decoded within the allowance: a sixteenth of the rows at once whenever they need more.

    The footer gives the mean size of a row, so most groups need one attempt.
    """
    metadata = file.metadata.row_group(group)  # its columns are not asked: pyarrow aborts on some damaged footers
    size = max(1, min(most_rows, max(16, CHUNK_BYTES * metadata.num_rows // max(metadata.total_byte_size, 1))))
    last = last_allowance(os.path.getsize(path), metadata.total_byte_size)
    done = 0
    while True:
        batches = file.iter_batches(batch_size=size, row_groups=[group], columns=columns, use_threads=False)
        seen = 0
        try:
            while True:
                with bounded_memory(DECODE_ALLOWANCE if size > 1 else last):
                    batch = next(batches, None)
                    if batch is None:
                        return
                    batch = without_dictionaries(batch)
                seen += batch.num_rows
                if seen > done:
                    yield batch.slice(batch.num_rows - (seen - done))
                    done = seen
        except MemoryError:
            if size == 1:
                message = f"{path}, row group {group}: decoding row {done} of it takes over {last >> 20} MB"
                raise ResourceError(
                    f"{message}: a decompression bomb, or pages of that size",
                    "if you trust the file, write it again with smaller pages: "
                    "pyarrow.parquet.write_table(…, write_batch_size=64)",
                ) from None
            size = max(1, size // 16)


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
