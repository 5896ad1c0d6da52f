"""Prompts without answers: the rows `gad data collect` asks a teacher about (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gadcli.data.check import scan_rows
from gadcli.data.read.choose import expand
from gadcli.data.read.files import inspect
from gadcli.data.read.findings import Finding, Summary
from gadcli.data.read.rows import Message
from gadcli.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """One prompt, and where it stands."""

    file: str
    row: int
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def read_prompts(patterns: list[str], key: str) -> Iterator[Prompt | Finding]:
    """The prompts of files in order; a Finding for each row that holds none.

    A column of plain text gives one user message for each row. Raises DataError for a file that cannot be read at all.
    """
    for path in expand(patterns, split=""):  # a teacher may answer every split
        info = inspect(path, key, None)
        if isinstance(info, list):
            raise DataError(f"{path}: {info[0].message}", "--prompt-key names the column of prompts")
        parts = Summary()
        for batch in scan_rows([info], parts):
            yield from batch.findings
            for row in batch.good():
                yield Prompt(path, batch.first_row + row.row_id - batch.first_id, row.messages, row.tools)
        yield from (f for found in parts.examples.values() for f in found if f.level == "error")
