"""One streaming pass over files: every bad file and row found, tokenised if asked, nothing kept (torch-free).

`gad data check`, `gad data analyze-tokens` and the training loader all consume `scan`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from gadcli.data.files import FileInfo, expand, inspect
from gadcli.data.findings import Finding, Summary, excerpt, printable
from gadcli.data.reading import CHUNK_ROWS, read_chunks
from gadcli.data.rows import Row, RowBatch, normalise, prompts_are_plain
from gadcli.data.segments import EncodedPrompts, Plan
from gadcli.data.template import TemplateRefusal
from gadcli.data.tokenize import ChatTokenizer
from gadcli.errors import DataError

Ints = npt.NDArray[np.int64]
Progress = Callable[[int, int | None], None]
# Encodings take about 120 bytes a token, so rows are tokenised in smaller batches than they are read in.
TOKENISED_ROWS = 2048
LENGTH_REASONS = ("teacher_too_long", "prompt_too_long", "row_too_long")


@dataclass(frozen=True)
class Limits:
    """Token limits, and what exceeds them gets (`data.truncation`). EOS counts as one token of the answer."""

    max_prompt: int
    max_response: int
    max_model_len: int
    truncation: str = "error"


@dataclass
class TokenBatch:
    """A RowBatch's good rows, tokenised. Lengths are in tokens; `answer_lengths` include the EOS."""

    batch: RowBatch
    rows: list[Row]
    prompts: EncodedPrompts
    answers: list[Encoding]
    prompt_lengths: Ints
    answer_lengths: Ints

    def keep(self, mask: npt.NDArray[np.bool_]) -> TokenBatch:
        if mask.all():
            return self
        kept = np.flatnonzero(mask).tolist()
        return TokenBatch(
            self.batch,
            [self.rows[i] for i in kept],
            self.prompts.keep(kept),
            [self.answers[i] for i in kept],
            self.prompt_lengths[mask],
            self.answer_lengths[mask],
        )


def open_files(patterns: list[str], keys: tuple[str, str], summary: Summary) -> list[FileInfo]:
    """The readable ones of the files that are meant; faults go to the summary (1, 18, 20, 24), and what was guessed."""
    infos = []
    for path in expand(patterns):
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


def tokenise(tokenizer: ChatTokenizer, batch: RowBatch) -> TokenBatch:
    """Template and tokenizer over a batch's good rows; flags what the template refuses and EOS-only answers (5)."""
    encoder = tokenizer.prompts
    plans: list[Plan] = []
    texts: list[list[str]] = []
    for row in batch.good():
        try:
            roles, contents = [m["role"] for m in row.messages], [m["content"] for m in row.messages]
            plan = encoder.plan(tuple(roles))
            texts.append(encoder.texts(plan, roles, contents))
            plans.append(plan)
        except TemplateRefusal as error:
            batch.reject(row, "template_refuses", printable(str(error)), batch.format.prompt)
    rows = batch.good()
    prompts = encoder.encode(plans, texts)
    answers = tokenizer.encode_answers([row.teacher for row in rows])
    lengths = np.fromiter(map(len, answers), np.int64, len(answers)) + 1
    tokens = TokenBatch(batch, rows, prompts, answers, prompts.lengths(), lengths)
    left = np.ones(len(rows), bool)
    for j in np.flatnonzero(lengths < 9).tolist():  # only short answers are worth a look, and most are not
        if set(answers[j].ids) <= {tokenizer.eos_id}:
            batch.reject(
                rows[j], "teacher_eos_only", "teacher's answer is only the end-of-answer token", batch.format.answer
            )
            left[j] = False
    return tokens.keep(left)


def limit(tokens: TokenBatch, limits: Limits) -> tuple[TokenBatch, int]:
    """Flag what is over the limits (4, 13, 14) and leave the rest; under `left` and `right`, also count what will
    be cut. The lengths returned are those before cutting."""
    batch, cutting = tokens.batch, limits.truncation in ("left", "right")
    form, kept, cut = batch.format, np.ones(len(tokens.rows), bool), 0
    for j, (row, p, a) in enumerate(
        zip(tokens.rows, tokens.prompt_lengths.tolist(), tokens.answer_lengths.tolist(), strict=True)
    ):
        faults = []
        both = min(p, limits.max_prompt) + min(a, limits.max_response) if cutting else p + a
        if not cutting and p > limits.max_prompt:
            faults.append(
                ("prompt_too_long", f"prompt is {p} tokens, max_prompt_length {limits.max_prompt}", form.prompt)
            )
        if not cutting and a > limits.max_response:
            message = f"teacher's answer is {a} tokens with EOS, max_response_length {limits.max_response}"
            faults.append(("teacher_too_long", message, form.answer))
        if not faults and both > limits.max_model_len:
            message = f"prompt {p} + answer {a} = {p + a} tokens, max_model_len {limits.max_model_len}"
            faults.append(("row_too_long", message, form.prompt))
        for fault in faults:
            batch.reject(row, *fault)
        kept[j] = not faults
        cut += cutting and not faults and (p > limits.max_prompt or a > limits.max_response)
    return tokens.keep(kept), cut


class SpecialText:
    """Finds the text of special tokens inside messages and answers (15): it would be read as control tokens."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self.pattern = re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)) or "(?!)")

    def check(self, batch: RowBatch) -> None:
        for row in batch.good():
            parts = [(m["content"], batch.format.prompt) for m in row.messages]
            for text, where in [*parts, *((answer, batch.format.answer) for answer in row.answers)]:
                if self.pattern.search(text):
                    batch.warn(row, "special_text", "contains the text of a special token", where, excerpt(text))
                    break


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
