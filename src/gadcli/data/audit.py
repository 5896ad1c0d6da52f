"""`gad data check`: every fault of a set of files in one pass, repeats and overlap, and a cleaned copy (torch-free)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import numpy as np

from gadcli.chat.thinking import AnswerReader
from gadcli.chat.tokenize import ChatTokenizer
from gadcli.data.check import Progress, account, add_duplicates, failure, open_files, scan_rows
from gadcli.data.duplicates import DuplicateCounter, hashes
from gadcli.data.read.chunks import CHUNK_ROWS
from gadcli.data.read.files import FileInfo
from gadcli.data.read.findings import Finding, Summary
from gadcli.data.read.rows import Row, RowBatch
from gadcli.data.template_check import template_findings
from gadcli.data.tokens import TOKENISED_ROWS, Answer, Limits, Style, limit, tokenise
from gadcli.data.writing import CleanWriter
from gadcli.errors import DataError

EXAMPLES = 1000  # findings written for repeats and overlap; all of them are counted


@dataclass
class CheckSpec:
    """What `audit` is asked: columns, an optional tokenizer with limits, an optional cleaned copy."""

    keys: tuple[str, str] = ("content", "teacher_response")
    tokenizer: ChatTokenizer | None = None
    limits: Limits | None = None
    style: Style = Style()
    reads: str = "all"  # of an answer by the discriminator, for `masks`
    strict: bool = False
    on_bad_row: str = "error"
    batch_size: int = 1
    fix: str = ""  # "", drop or trim
    out: Path | None = None
    val: list[str] = field(default_factory=list)


def audit(
    patterns: list[str], spec: CheckSpec, sink: IO[str] | None = None, progress: Progress | None = None
) -> Summary:
    """Check all files; findings stream to `sink` as JSONL. Never raises for what is in the data (see
    `verdict`); ConfigError for a template that nothing can be trained with.

    Memory is bounded: hashes for repeats and overlap go to disk beyond some million rows.
    """
    summary = Summary(sink=sink)
    if spec.tokenizer is not None:
        summary.add(template_findings(spec.tokenizer))
    infos = open_files(patterns, spec.keys, summary)
    with ExitStack() as stack:
        repeats = stack.enter_context(DuplicateCounter())
        prompts = stack.enter_context(DuplicateCounter()) if spec.val else None
        writer = None
        if spec.fix and spec.out is not None:
            writer = stack.enter_context(CleanWriter(spec.out, infos, spec.keys))
        _scan(infos, spec, summary, progress, repeats, prompts, writer)
        add_duplicates(summary, repeats, EXAMPLES)
        if prompts is not None:
            _overlap(spec, summary, prompts)
        if writer is not None:
            summary.left_out = writer.left_out
            writer.commit()
    return summary


def _scan(
    infos: list[FileInfo],
    spec: CheckSpec,
    summary: Summary,
    progress: Progress | None,
    repeats: DuplicateCounter,
    prompts: DuplicateCounter | None,
    writer: CleanWriter | None,
) -> None:
    """The pass itself."""
    most = TOKENISED_ROWS if spec.tokenizer else CHUNK_ROWS
    for batch in scan_rows(infos, summary, progress, with_extras=writer is not None, most_rows=most):
        trimmed: list[Row] = []
        if spec.tokenizer is not None:
            tokens = tokenise(spec.tokenizer, batch, spec.style)
            if spec.limits is not None:
                limit(tokens, spec.limits)
                if spec.fix == "trim":
                    trimmed = _trim(tokens.rows, batch, spec.tokenizer, spec.limits)
        account(batch, summary)
        summary.truncated += len(trimmed)
        good = batch.good()
        ids = np.fromiter((row.row_id for row in good), np.int64, len(good))
        repeats.add(hashes(row.whole_json() for row in good), ids)
        if prompts is not None:
            prompts.add(hashes(row.prompt_json() for row in good), ids)
        if writer is not None:
            writer.write(batch, sorted(good + trimmed, key=lambda row: row.row_id))


def _trim(rows: list[Row], batch: RowBatch, tokenizer: ChatTokenizer, limits: Limits) -> list[Row]:
    """Those of `rows` whose only fault is an answer's length, with answers cut at a token's end so that EOS fits."""
    faults: dict[int, set[str]] = {}
    for finding in batch.findings:
        if finding.level == "error" and finding.row is not None:
            faults.setdefault(finding.row - batch.first_row + batch.first_id, set()).add(finding.reason)
    trimmed = [
        replace(row, answers=[_cut(answer, tokenizer, limits.max_response) for answer in row.answers])
        for row in rows
        if faults.get(row.row_id) == {"teacher_too_long"}
    ]
    return [row for row in trimmed if all(row.answers)]


def _cut(text: str, tokenizer: ChatTokenizer, most: int) -> str:
    """As much of an answer as fits `most` tokens with its EOS; empty if nothing does."""
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    if len(encoding) < most:
        return text
    for keep in range(most - 1, 0, -1):
        shorter = text[: encoding.offsets[keep - 1][1]]
        # A prefix may tokenize into more pieces than it had inside the whole: look again, and cut deeper.
        if shorter.strip() and len(tokenizer.encode_behind(shorter)) < most:
            return shorter
    return ""


def _overlap(spec: CheckSpec, summary: Summary, prompts: DuplicateCounter) -> None:
    """Prompts of the held-out files that training has too."""
    aside = Summary()
    count = 0
    with DuplicateCounter() as held:
        for batch in scan_rows(open_files(spec.val, spec.keys, aside, "val"), aside):
            good = batch.good()
            held.add(hashes(row.prompt_json() for row in good), np.arange(len(good)))
        if aside.file_errors:
            summary.add(f for group in aside.examples.values() for f in group)
        for rows in prompts.shared_with(held):
            for row in rows[: max(0, EXAMPLES - count)].tolist():
                file, at = summary.place(row)
                summary.add([Finding("overlap", file, "this prompt is in the held-out files too", row=at)])
            count += len(rows)
    if count:
        summary.counts["overlap"] = count


def verdict(summary: Summary, spec: CheckSpec) -> DataError | None:
    """The error `gad data check` ends with, or None."""
    truncation = spec.limits.truncation if spec.limits else "error"
    error = failure(summary, on_bad_row=spec.on_bad_row, truncation=truncation, strict=spec.strict)
    if error is None and summary.kept < spec.batch_size:
        return DataError(
            f"{summary.kept:,} rows are fewer than one batch of {spec.batch_size}: there would be no step",
            f"data.train_batch_size={max(summary.kept, 1)}, or more rows",
        )
    return error


@dataclass(frozen=True)
class Mask:
    """A row's tokens as texts, and what is done with each: "prompt" (given), "trained", "unread" (trained, but no
    discriminator reads it) or "other" (another speaker's turn between trained ones, `data.turns=each`)."""

    pieces: list[tuple[str, str]]
    tokens: Counter[str]
    remarks: list[str]


def masks(patterns: list[str], spec: CheckSpec, n: int) -> Iterator[Mask]:
    """The first n good rows, each with its first answer and the end token, and what was noticed about the row."""
    if spec.tokenizer is None:
        return
    summary = Summary()
    for batch in scan_rows(open_files(patterns, spec.keys, summary), summary, most_rows=64):
        tokens = tokenise(spec.tokenizer, batch, spec.style)
        for row, prompt, answers in zip(tokens.rows, tokens.prompts, tokens.answers, strict=True):
            if n <= 0:
                return
            n -= 1
            at = batch.first_row + row.row_id - batch.first_id
            remarks = [f"{f.reason}: {f.message}" for f in batch.findings if f.row == at]
            unread = AnswerReader(spec.reads, spec.tokenizer.decode).hidden(prompt, answers[0].ids)
            yield _mask(spec.tokenizer.backend, prompt, answers[0], unread, remarks)


def _mask(backend: Any, prompt: list[int], answer: Answer, unread: list[tuple[int, int]], remarks: list[str]) -> Mask:
    kinds = ["trained"] * len(answer.ids)
    for start, end in unread:
        kinds[start:end] = ["unread"] * (end - start)
    for start, end in answer.untrained:
        kinds[start:end] = ["other"] * (end - start)
    kinds = ["prompt"] * len(prompt) + kinds
    pieces: list[tuple[str, str]] = []
    for kind, group in groupby(zip(kinds, [*prompt, *answer.ids], strict=True), key=itemgetter(0)):
        pieces += [(kind, piece) for piece in _pieces(backend, [i for _, i in group])]
    return Mask(pieces, Counter(kinds), remarks)


def _pieces(backend: Any, ids: list[int]) -> list[str]:
    """Each token's text; tokens that share one character come as one piece."""
    pieces, held = [], []
    for i in ids:
        held.append(i)
        text = backend.decode(held, skip_special_tokens=False)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(held) >= 4:
            pieces.append(text)
            held = []
    return pieces + ([backend.decode(held, skip_special_tokens=False)] if held else [])


def summary_json(summary: Summary) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "total": summary.total,
        "kept": summary.kept,
        "dropped": summary.dropped,
        "trimmed": summary.truncated,
        "file_errors": summary.file_errors,
        "columns_left_out": summary.left_out,
        "counts": dict(summary.counts),
        "examples": {r: [json.loads(f.to_json()) for f in fs] for r, fs in summary.examples.items()},
    }
