"""Page headers of a parquet column, read without decoding: how large its pages will be (torch-free).

A file of 13 KB may declare pages of 400 MB, and decoders allocate what is declared. The footer does not tell
page sizes, the headers before each page do (Thrift compact protocol, parquet-format's `PageHeader`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

MAX_HEADER_BYTES = 1 << 20
DICTIONARY_PAGE = 2

# Field ids of PageHeader and of the headers nested in it.
TYPE, UNCOMPRESSED, COMPRESSED, DATA, DICTIONARY, DATA_V2 = 1, 2, 3, 5, 7, 8
NUM_VALUES = 1


class PageError(ValueError):
    """A page header that cannot be: the file is corrupt."""


@dataclass(frozen=True)
class ChunkPages:
    """What one column chunk's pages declare. All sizes in bytes, after decompression."""

    largest_page: int
    mean_value_bytes: float  # largest of the pages' means
    largest_entry: int  # longest dictionary entry, or 0 without a dictionary


class _Reader:
    """Thrift compact protocol, as much of it as a page header uses."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        value = self.data[self.at]
        self.at += 1
        return value

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return value
            shift += 7
            if shift > 63:
                raise PageError("an integer of more than 64 bits in a page header")

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def skip(self, n: int) -> None:
        self.at += n
        if self.at > len(self.data):
            raise IndexError

    def value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self.byte()
        if kind in (4, 5, 6):
            return self.zigzag()
        if kind == 7:
            return self.skip(8)
        if kind == 8:
            return self.skip(self.varint())
        if kind == 12:
            return self.struct(depth + 1)
        raise PageError(f"a field of kind {kind} in a page header")

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > 4:
            raise PageError("a page header nested too deeply")
        fields: dict[int, Any] = {}
        field_id = 0
        while head := self.byte():
            field_id = field_id + (head >> 4) if head >> 4 else self.zigzag()
            fields[field_id] = self.value(head & 0x0F, depth)
        return fields


def _read_header(fd: int, offset: int, end: int) -> tuple[dict[int, Any], int]:
    """The page header at `offset` and its length; grows the read when long statistics need it."""
    size = 512
    while True:
        data = os.pread(fd, min(size, end - offset), offset)
        reader = _Reader(data)
        try:
            return reader.struct(), reader.at
        except IndexError:
            if size >= MAX_HEADER_BYTES or len(data) < size:
                raise PageError("a page header runs past its column") from None
            size *= 8


def _largest_entry(page: bytes, codec: str, size: int) -> int:
    """Longest byte string in a PLAIN dictionary page; `size` where it cannot be told."""
    if codec == "UNCOMPRESSED":
        plain = page
    elif codec in ("SNAPPY", "GZIP", "ZSTD", "BROTLI"):
        try:
            plain = pa.Codec(codec.lower()).decompress(page, decompressed_size=size, asbytes=True)
        except (OSError, pa.ArrowException):
            raise PageError("a dictionary page that does not decompress") from None
    else:
        return size
    largest = at = 0
    while at + 4 <= len(plain):
        length = int.from_bytes(plain[at : at + 4], "little")
        largest = max(largest, length)
        at += 4 + length
    return min(largest, size)


def chunk_pages(fd: int, column: Any, entry_matters_from: int) -> ChunkPages:
    """Walk one column chunk's page headers.

    `column` is pyarrow's ColumnChunkMetaData. A dictionary page is decoded for its longest entry only if it
    holds at least `entry_matters_from` bytes. Raises PageError for headers that cannot be.
    """
    start = column.data_page_offset
    if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < start:
        start = column.dictionary_page_offset
    end = start + column.total_compressed_size
    if start < 4 or column.total_compressed_size < 0 or end > os.fstat(fd).st_size:
        raise PageError("a column lies outside the file")
    largest = entry = 0
    mean = 0.0
    offset, seen = start, 0
    while offset < end and seen < column.num_values:
        header, length = _read_header(fd, offset, end)
        plain, packed = header.get(UNCOMPRESSED, -1), header.get(COMPRESSED, -1)
        if plain < 0 or packed < 0 or offset + length + packed > end:
            raise PageError("a page's declared size cannot be")
        if header.get(TYPE) == DICTIONARY_PAGE:
            entry = plain
            if plain >= entry_matters_from and column.physical_type == "BYTE_ARRAY" and plain <= 1 << 27:
                entry = _largest_entry(os.pread(fd, packed, offset + length), column.compression, plain)
        else:
            values = (header.get(DATA) or header.get(DATA_V2) or {}).get(NUM_VALUES, 0)
            if values < 0:
                raise PageError("a page declares fewer than 0 values")
            seen += values
            mean = max(mean, plain / max(values, 1))
        largest = max(largest, plain)
        offset += length + packed
    return ChunkPages(largest, mean, entry)
