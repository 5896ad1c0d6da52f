"""Prompts without answers: the rows `gad data collect` asks a teacher about (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from gadcli.data.files import expand, inspect
from gadcli.data.findings import Finding
from gadcli.data.reading import read_chunks
from gadcli.data.rows import Message, RawChunk, normalise_prompts
from gadcli.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """One prompt, and where it stands."""

    file: str
    row: int
    messages: list[Message]


def read_prompts(patterns: list[str], key: str) -> Iterator[Prompt | Finding]:
    """The prompts of files in order; a Finding for each row that holds none.

    A column of plain text gives one user message a row. Raises DataError for a file that cannot be read at all.
    """
    for path in expand(patterns):
        info = inspect(path, key, None)
        if isinstance(info, list):
            raise DataError(f"{path}: {info[0].message}", "--prompt-key names the column of prompts")
        for chunk in read_chunks(info, (key, key)):
            if isinstance(chunk, Finding):
                yield chunk
                continue
            batch = normalise_prompts(_texts_as_messages(chunk), key)
            yield from batch.findings
            good = batch.good()
            for i, messages in zip(good.tolist(), batch.conversations(good), strict=True):
                yield Prompt(path, chunk.first_row + i, messages)


def _texts_as_messages(chunk: RawChunk) -> RawChunk:
    """Text that is no JSON list stands for one user message."""
    values = chunk.content
    if isinstance(values, pa.Array):
        if isinstance(values.type, pa.JsonType):
            values = values.storage
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            return chunk
        if not _valid_text(values):
            return chunk
        values = values.to_pylist()
    turned = [
        [{"role": "user", "content": v}] if isinstance(v, str) and v.strip() and not v.lstrip().startswith("[") else v
        for v in values
    ]
    return RawChunk(chunk.file, chunk.row_group, chunk.first_row, turned, turned)


def _valid_text(values: pa.Array) -> bool:
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True
