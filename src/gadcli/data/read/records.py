"""Files of text or Arrow as records (column → value), whatever they are packed in (torch-free).

One table says what a file is; every kind of text is read as UTF-8 and streams.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from gadcli.data.read.formats import Fault, Record, parse_json

MAX_LINE_BYTES = 16 << 20  # parsed, 3 bytes of `[],` are 64 in memory
READ_BYTES = 1 << 20
UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, EOFError, zlib.error, lzma.LZMAError, csv.Error)

# First bytes of a packed file, and what opens it.
PACKED: dict[bytes, Callable[[str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"(\xb5/\xfd": lambda path: io.BufferedReader(pa.input_stream(path, compression="zstd")),
}
ARROW_FILE, ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"


def kind_of(path: str) -> str:
    """parquet | arrow | csv | list (one JSON list) | lines (a JSON object per line), by content and then by name."""
    with open(path, "rb") as file:
        magic = file.read(8)
    suffixes = [s.lower() for s in Path(path).suffixes]
    if magic.startswith(b"PAR1") or suffixes[-1:] in ([".parquet"], [".pq"]):
        return "parquet"
    if magic.startswith((ARROW_FILE, ARROW_STREAM)):
        return "arrow"
    if {".csv", ".tsv"} & set(suffixes[-2:]):
        return "csv"
    with open_utf8(path) as stream:
        return "list" if stream.read(64).lstrip().startswith(b"[") else "lines"


def arrow_batches(path: str) -> Iterator[pa.RecordBatch]:
    """The record batches of Arrow's file or stream format, mapped into memory."""
    with pa.memory_map(path) as source:
        if source.read(6) == ARROW_FILE:
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            yield from pa.ipc.open_stream(source)


class _Recoded(io.RawIOBase):
    """UTF-16 text as UTF-8 bytes."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text = text

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.text.read(max(1, len(buffer) // 4)).encode("utf-8", "surrogatepass")
        buffer[: len(data)] = data
        return len(data)


def open_utf8(path: str) -> BinaryIO:
    """The file's bytes, unpacked, as UTF-8 without a byte-order mark."""
    with open(path, "rb") as file:
        magic = file.read(6)
    unpack = next((opener for start, opener in PACKED.items() if magic.startswith(start)), None)
    stream = unpack(path) if unpack else open(path, "rb")  # noqa: SIM115 - closed by the caller
    start = stream.peek(3)[:3]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return io.BufferedReader(_Recoded(io.TextIOWrapper(stream, "utf-16", newline="")))
    if start == codecs.BOM_UTF8:
        stream.read(3)
    return cast(BinaryIO, stream)


def read_records(path: str, kind: str) -> Iterator[tuple[Record | Fault, int]]:
    """The records of a file of kind lines, list or csv, each with its length; a Fault stands for a line that is none.

    Raises one of UNREADABLE where the rest cannot be read.
    """
    with open_utf8(path) as stream:
        yield from {"lines": _lines, "list": _list, "csv": _csv}[kind](stream)


def _lines(stream: BinaryIO) -> Iterator[tuple[Record | Fault, int]]:
    while line := stream.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield Fault("content_json", f"a line of over {MAX_LINE_BYTES >> 20} MB"), 0
        elif not line.isspace():
            record = _record(parse_json(line, "content", "a line is"))
            if isinstance(record, Fault):
                record = replace(record, text=line.decode("utf-8", "backslashreplace").strip())
            yield record, len(line)


def _list(stream: BinaryIO) -> Iterator[tuple[Record | Fault, int]]:
    """The items of one JSON list, parsed one by one as the text arrives."""
    text, parse = io.TextIOWrapper(stream, "utf-8", newline=""), json.JSONDecoder().raw_decode
    between, held, at = re.compile(r"[\s,]*"), text.read(READ_BYTES).lstrip()[1:], 0
    while True:
        at = cast(re.Match[str], between.match(held, at)).end()
        if held.startswith("]", at):
            return
        try:
            value, end = parse(held, at)
        except (ValueError, RecursionError) as error:
            more = text.read(READ_BYTES)
            if not more or len(held) - at > MAX_LINE_BYTES:
                raise ValueError(f"the JSON list breaks off: {str(error)[:60]}") from None
            held, at = held[at:] + more, 0
            continue
        yield _record(value), end - at
        at = end


def _csv(stream: BinaryIO) -> Iterator[tuple[Record | Fault, int]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    text = io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline="")  # a wrong byte costs its row alone
    header = text.readline()
    separator = max(",;\t", key=header.count)
    names = next(csv.reader([header], delimiter=separator), [])
    for values in csv.reader(text, delimiter=separator):
        if len(values) == len(names):
            yield dict(zip(names, values, strict=True)), sum(map(len, values))
        elif values:
            yield Fault("content_json", f"{len(values)} fields where the header has {len(names)}"), 0


def _record(value: Any) -> Record | Fault:
    if isinstance(value, dict | Fault):
        return value
    return Fault("content_json", f"a {type(value).__name__}, not an object")
