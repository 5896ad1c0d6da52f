"""One streaming pass over files: every bad file and row found, tokenised if asked, nothing kept (torch-free).

`gad data check`, `gad data analyze-tokens` and the training loader all consume `scan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gadcli.data.duplicates import DuplicateCounter
from gadcli.data.read.choose import choose_files
from gadcli.data.read.chunks import CHUNK_ROWS, read_chunks
from gadcli.data.read.files import FileInfo, inspect
from gadcli.data.read.findings import Finding, Summary
from gadcli.data.read.rows import RowBatch, normalise, prompts_are_plain
from gadcli.errors import DataError

Progress = Callable[[int, int | None], None]
LENGTH_REASONS = ("teacher_too_long", "prompt_too_long", "row_too_long")


def open_files(
    patterns: Sequence[str], keys: tuple[str, str], summary: Summary, split: str = "train"
) -> list[FileInfo]:
    """The readable ones of the files that are meant; faults go to the summary (1, 18, 20, 24), and what was guessed."""
    infos = []
    choice = choose_files(patterns, split)
    summary.add(Finding("files_chosen", place, note) for place, note in choice.notes)
    for path in choice.files:
        info = inspect(path, *keys)
        if isinstance(info, FileInfo):
            infos.append(info)
            if info.format.note:
                summary.add([Finding("read_as", path, info.format.note)])
        else:
            summary.add(info)
    typed = [(i, i.schema) for i in infos if i.schema is not None]
    for info, schema in typed[1:]:
        first = typed[0][1]
        for key in (info.format.prompt, info.format.answer):
            if key in first.names and key in schema.names and (here := schema.field(key).type) != first.field(key).type:
                other = f"in {typed[0][0].path} {str(first.field(key).type)[:60]}"
                message = f"column {key!r} is {str(here)[:60]}, {other}"
                summary.add([Finding("schema_differs", info.path, message, field=key)])
    return infos


def scan_rows(
    infos: list[FileInfo],
    summary: Summary,
    progress: Progress | None = None,
    with_extras: bool = False,
    most_rows: int = CHUNK_ROWS,
) -> Iterator[RowBatch]:
    """Batches of all files in order, with findings so far inside them (not yet in the summary: see `account`)."""
    total = sum(i.rows for i in infos if i.rows is not None) if all(i.rows is not None for i in infos) else None
    first_id = 0
    for info in infos:
        read, plain = 0, None
        summary.starts.append((first_id, info.path))
        for chunk in read_chunks(info, with_extras, most_rows):
            if isinstance(chunk, Finding):
                summary.add([chunk])
                continue
            if plain is None and (plain := prompts_are_plain(chunk, info.format)):
                message = f"read as plain text: each {info.format.prompt} is one user turn"
                summary.add([Finding("read_as", info.path, message)])
            batch = normalise(chunk, first_id + chunk.first_row, info.format, bool(plain))
            read = chunk.first_row + len(batch)
            yield batch
            if progress is not None:
                progress(first_id + read, total)
        first_id += info.rows if info.rows is not None else read


def account(batch: RowBatch, summary: Summary) -> None:
    """Add a finished batch to the summary."""
    summary.total += len(batch)
    summary.dropped += batch.bad
    summary.add(batch.findings)


def add_duplicates(summary: Summary, rows: DuplicateCounter, examples: int) -> None:
    """Findings for some of the repeated rows; all of them are counted."""
    count, found = rows.result(examples)
    for row, earlier in found:
        (file, at), (first_file, first_at) = summary.place(row), summary.place(earlier)
        summary.add([Finding("duplicate", file, f"repeats row {first_at} of {first_file}", row=at)])
    if count:
        summary.counts["duplicate"] = count


def failure(summary: Summary, *, on_bad_row: str, truncation: str, strict: bool) -> DataError | None:
    """The error that ends a run over this data, if any: at most four lines, the first fault of each kind."""
    allowed: tuple[str, ...] = LENGTH_REASONS if truncation == "drop" else ()
    fatal = [
        f
        for reason, examples in summary.examples.items()
        for f in examples[:1]
        if (f.level == "error" and reason not in allowed and not (on_bad_row == "drop" and f.row is not None))
        or (f.level == "warn" and strict)
    ]
    if not fatal and summary.kept == 0:
        return DataError(f"all {summary.total:,} rows were dropped", "gad data check FILES shows why")
    if not fatal:
        return None
    parts = [f"{f.where()}: {f.message} ({summary.counts[f.reason]:,} such)" for f in fatal[:2]]
    more = f"; and {len(fatal) - 2} other kinds" if len(fatal) > 2 else ""
    rows = [f.row for f in fatal if f.row is not None]
    advice = "; data.on_bad_row=drop leaves bad rows out" if rows and not strict else ""
    return DataError("; ".join(parts) + more, f"gad data check FILES lists every fault{advice}")
