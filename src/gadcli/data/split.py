"""`gad data split`: train and held-out files by content hash, so that equal prompts stay together (torch-free)."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from gadcli.data.check import Progress, account, failure, open_files, scan_rows
from gadcli.data.duplicates import hashes
from gadcli.data.read.findings import Summary
from gadcli.data.writing import RowWriter
from gadcli.errors import DataError


def split(
    patterns: list[str], keys: tuple[str, str], shares: dict[str, float], folder: Path, progress: Progress | None = None
) -> tuple[dict[str, int], list[str]]:
    """Write `<folder>/train.parquet` and one file a held-out share; returns the rows of each, and the columns
    that the parts do not carry.

    `shares`: name → share of the prompts (below 1), or number of them (1 and above). A row's place depends on its
    prompt alone: adding rows later moves no other row under shares. Raises DataError for bad rows.
    """
    counted = {name: int(share) for name, share in shares.items() if share >= 1}
    edges = _edges(patterns, keys, shares, counted)
    summary = Summary()
    infos = open_files(patterns, keys, summary)
    names = [*shares, "train"]
    with ExitStack() as stack:
        writers = {n: stack.enter_context(RowWriter(folder / f"{n}.parquet", infos, keys)) for n in names}
        for batch in scan_rows(infos, summary, progress, with_extras=True):
            account(batch, summary)
            rows = batch.good()
            found = hashes(row.prompt_json() for row in rows)
            parts = np.searchsorted(np.array(edges, np.uint64), found, side="right").tolist()
            for i, name in enumerate(names):
                writers[name].add(batch, [row for row, part in zip(rows, parts, strict=True) if part == i])
        error = failure(summary, on_bad_row="error", truncation="error", strict=False)
        if error is not None:
            raise DataError(error.message, "gad data check FILES --fix drop -o FILE writes the good rows alone")
        empty = [n for n in names if writers[n].rows == 0]
        if empty:
            raise DataError(f"{empty[0]} would have no rows", "ask for other shares, or give more rows")
        for writer in writers.values():
            writer.commit()
        return {n: writers[n].rows for n in names}, writers["train"].left_out


def _edges(patterns: list[str], keys: tuple[str, str], shares: dict[str, float], counted: dict[str, int]) -> list[int]:
    """Where each held-out part ends on the line of hashes: parts lie side by side from 0."""
    edges: list[int] = []
    if not counted:
        total = 0.0
        for share in shares.values():
            total += share
            edges.append(min(int(total * 2**64), 2**64 - 1))
        return edges
    if len(counted) != len(shares):
        raise DataError("give all held-out parts as shares, or all as numbers", "--val 0.02 --test 0.02")
    wanted = sum(counted.values())
    best = np.empty(0, np.uint64)
    aside = Summary()
    for batch in scan_rows(open_files(patterns, keys, aside), aside):
        best = np.unique(np.concatenate([best, hashes(row.prompt_json() for row in batch.good())]))[: wanted + 1]
    if len(best) <= wanted:
        raise DataError(
            f"{len(best):,} different prompts cannot give {wanted:,} held-out ones and a rest", "ask for fewer"
        )
    at = 0
    for number in counted.values():
        at += number
        edges.append(int(best[at]))
    return edges
