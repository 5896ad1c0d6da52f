"""Footer and page headers of a parquet file, read without decoding: how large its pages will be (torch-free).

A file of 13 KB may declare pages of 400 MB, and decoders allocate what is declared. The footer does not tell
page sizes, the headers before each page do (Thrift compact protocol, parquet-format's `PageHeader`).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

MAX_HEADER_BYTES = 1 << 20
LENGTH = struct.Struct("<I")
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


@dataclass(frozen=True)
class Column:
    """One column chunk, from the footer: where its pages lie, and what they should hold."""

    path: str
    start: int
    packed_bytes: int
    plain_bytes: int
    num_values: int
    byte_array: bool
    codec: str


class _Reader:
    """Thrift compact protocol, as much of it as parquet's headers use. Structs come as {field id: value}."""

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
                raise PageError("an integer of more than 64 bits in a header")

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise IndexError
        self.at += n
        return self.data[self.at - n : self.at]

    def value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self.byte()
        if kind in (4, 5, 6):
            return self.zigzag()
        if kind == 7:
            return self.take(8)
        if kind == 8:
            return self.take(self.varint())
        if kind in (9, 10):
            return self.items(depth)
        if kind == 12:
            return self.struct(depth + 1)
        raise PageError(f"a field of kind {kind} in a header")

    def items(self, depth: int) -> list[Any]:
        head = self.byte()
        size, kind = head >> 4, head & 0x0F
        if size == 15:
            size = self.varint()
        if size > len(self.data) - self.at:
            raise IndexError
        return [self.byte() == 1 if kind in (1, 2) else self.value(kind, depth) for _ in range(size)]

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > 10:
            raise PageError("a header nested too deeply")
        fields: dict[int, Any] = {}
        field_id = 0
        while head := self.byte():
            field_id = field_id + (head >> 4) if head >> 4 else self.zigzag()
            fields[field_id] = self.value(head & 0x0F, depth)
        return fields


CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")
BYTE_ARRAY = 6


def read_columns(path: str, wanted: tuple[str, ...]) -> list[list[Column]]:
    """For each row group, the leaf columns below the `wanted` top-level ones, from our own reading of the footer.

    pyarrow has the same in `metadata.row_group(g).column(j)`, but that call ends the whole process (an exception
    that no one catches in C++) on a footer whose level histograms are damaged. Raises PageError.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 8, 0))
        length = int.from_bytes(file.read(4), "little")
        if length > size - 12:
            raise PageError("the footer is longer than the file")
        file.seek(size - 8 - length)
        footer = file.read(length)
    try:
        groups = _Reader(footer).struct().get(4, [])
        return [[_column(c[3]) for c in group[1] if c[3][3][0].decode() in wanted] for group in groups]
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise PageError("the footer's columns cannot be read") from None


def _column(meta: dict[int, Any]) -> Column:
    """From ColumnMetaData: 1 type, 3 path, 4 codec, 5 values, 6 and 7 sizes, 9 and 11 offsets of the pages."""
    start, dictionary = meta[9], meta.get(11, 0)
    if 0 < dictionary < start:
        start = dictionary
    path = ".".join(part.decode() for part in meta[3])
    return Column(path, start, meta[7], meta[6], meta[5], meta[1] == BYTE_ARRAY, CODECS[meta[4]])


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
    largest, at, end, length_at = 0, 0, len(plain) - 4, LENGTH.unpack_from  # a tight loop: one turn an entry
    while at <= end:
        (length,) = length_at(plain, at)
        if length > largest:
            largest = length
        at += 4 + length
    return min(largest, size)


def chunk_pages(fd: int, column: Column, entry_matters_from: int) -> ChunkPages:
    """Walk one column chunk's page headers.

    A dictionary page is decoded for its longest entry only if it holds at least `entry_matters_from` bytes.
    Raises PageError for headers that cannot be.
    """
    start, end = column.start, column.start + column.packed_bytes
    if start < 4 or column.packed_bytes < 0 or column.num_values < 0 or end > os.fstat(fd).st_size:
        raise PageError("a column lies outside the file")
    largest = entry = 0
    mean = 0.0
    offset, seen = start, 0
    while offset < end and seen < column.num_values:
        header, length = _read_header(fd, offset, end)
        plain, packed = header.get(UNCOMPRESSED, -1), header.get(COMPRESSED, -1)
        if not isinstance(plain, int) or not isinstance(packed, int):
            raise PageError("a page's declared size is no number")
        if plain < 0 or packed < 0 or offset + length + packed > end:
            raise PageError("a page's declared size cannot be")
        if header.get(TYPE) == DICTIONARY_PAGE:
            entry = plain
            if plain >= entry_matters_from and column.byte_array and plain <= 1 << 27:
                entry = _largest_entry(os.pread(fd, packed, offset + length), column.codec, plain)
        else:
            values = _num_values(header)
            seen += values
            mean = max(mean, plain / max(values, 1))
        largest = max(largest, plain)
        offset += length + packed
    return ChunkPages(largest, mean, entry)


def _num_values(header: dict[int, Any]) -> int:
    nested = header.get(DATA) or header.get(DATA_V2)
    values = nested.get(NUM_VALUES, 0) if isinstance(nested, dict) else 0
    if not isinstance(values, int) or values < 0:
        raise PageError("a page declares an impossible number of values")
    return values
