"""One streaming pass over files: every bad file and row found, tokenised if asked, nothing kept (torch-free).

`gad data check`, `gad data analyze-tokens` and the training loader all consume `scan`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from tokenizers import Encoding

from gadcli.data.arrays import truths
from gadcli.data.files import FileInfo, expand, inspect
from gadcli.data.findings import Finding, Summary, excerpt, printable
from gadcli.data.reading import CHUNK_ROWS, read_chunks
from gadcli.data.rows import RowBatch, normalise
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
    rows: Ints
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
            self.rows[mask],
            self.prompts.keep(kept),
            [self.answers[i] for i in kept],
            self.prompt_lengths[mask],
            self.answer_lengths[mask],
        )


def inspect_all(paths: list[str], keys: tuple[str, str], summary: Summary) -> list[FileInfo]:
    """Every file's footer or first lines; faults go to the summary (1, 18, 20, 24). Returns the readable ones."""
    infos = []
    for path in paths:
        info = inspect(path, *keys)
        if isinstance(info, FileInfo):
            infos.append(info)
        else:
            summary.add(info)
    parquet = [i for i in infos if i.kind == "parquet"]
    for info in parquet[1:]:
        for key, first, here in zip(keys, parquet[0].types, info.types, strict=True):
            if here != first:
                message = f"column {key!r} is {here[:60]}, in {parquet[0].path} {first[:60]}"
                summary.add([Finding("schema_differs", info.path, message, field=key)])
    return infos


def scan_rows(
    infos: list[FileInfo],
    keys: tuple[str, str],
    summary: Summary,
    progress: Progress | None = None,
    with_extras: bool = False,
    most_rows: int = CHUNK_ROWS,
) -> Iterator[RowBatch]:
    """Batches of all files in order, with findings so far inside them (not yet in the summary: see `account`)."""
    total = sum(i.rows for i in infos if i.rows is not None) if all(i.rows is not None for i in infos) else None
    first_id = 0
    for info in infos:
        read = 0
        for chunk in read_chunks(info, keys, with_extras, most_rows):
            if isinstance(chunk, Finding):
                summary.add([chunk])
                continue
            batch = normalise(chunk, first_id + chunk.first_row, keys)
            read = chunk.first_row + len(batch)
            yield batch
            if progress is not None:
                progress(first_id + read, total)
        first_id += info.rows if info.rows is not None else read


def account(batch: RowBatch, summary: Summary) -> None:
    """Add a finished batch to the summary."""
    summary.total += len(batch)
    summary.dropped += int(batch.bad.sum())
    summary.add(batch.findings)


def tokenise(tokenizer: ChatTokenizer, batch: RowBatch, keys: tuple[str, str]) -> TokenBatch:
    """Template and tokenizer over a batch's good rows; flags what the template refuses and EOS-only answers (5)."""
    good = batch.good()
    encoder = tokenizer.prompts
    plans: list[Plan] = []
    texts: list[list[str]] = []
    refused: dict[int, str] = {}
    for i, (roles, contents) in zip(good.tolist(), batch.turns(good), strict=True):
        try:
            plan = encoder.plan(roles)
            texts.append(encoder.texts(plan, roles, contents))
            plans.append(plan)
        except TemplateRefusal as error:
            refused[i] = printable(str(error))
    if refused:
        mask = np.zeros(len(batch), bool)
        mask[list(refused)] = True
        batch.flag(mask, "template_refuses", lambda i: refused[i], keys[0])
        good = batch.good()
    prompts = encoder.encode(plans, texts)
    answers = tokenizer.encode_answers(batch.teacher_texts(good))
    tokens = TokenBatch(
        batch,
        good,
        prompts,
        answers,
        prompts.lengths(),
        np.fromiter(map(len, answers), np.int64, len(answers)) + 1,
    )
    # Only short answers are worth a look, and most are not: EOS texts come as one token each.
    short = np.flatnonzero(tokens.answer_lengths < 9).tolist()
    if empty := [j for j in short if set(answers[j].ids) <= {tokenizer.eos_id}]:
        mask = np.zeros(len(batch), bool)
        mask[good[empty]] = True
        batch.flag(mask, "teacher_eos_only", "teacher's answer is only the end-of-answer token", keys[1])
        left = np.ones(len(good), bool)
        left[empty] = False
        tokens = tokens.keep(left)
    return tokens


def limit(tokens: TokenBatch, limits: Limits, keys: tuple[str, str]) -> tuple[TokenBatch, int]:
    """Flag what is over the limits (4, 13, 14) and leave the rest; under `left` and `right`, also count what will
    be cut. The lengths returned are those before cutting."""
    batch, cutting = tokens.batch, limits.truncation in ("left", "right")
    long_prompt = tokens.prompt_lengths > limits.max_prompt
    long_answer = tokens.answer_lengths > limits.max_response
    prompt = np.minimum(tokens.prompt_lengths, limits.max_prompt)
    answer = np.minimum(tokens.answer_lengths, limits.max_response)
    over = prompt + answer > limits.max_model_len
    cut = 0
    wrong = np.zeros(len(tokens.rows), bool)
    if cutting:
        cut = int(((long_prompt | long_answer) & ~over).sum())
    else:
        over = tokens.prompt_lengths + tokens.answer_lengths > limits.max_model_len
        _flag(
            batch,
            tokens,
            long_prompt,
            "prompt_too_long",
            keys[0],
            lambda p, a: f"prompt is {p} tokens, max_prompt_length {limits.max_prompt}",
        )
        _flag(
            batch,
            tokens,
            long_answer,
            "teacher_too_long",
            keys[1],
            lambda p, a: f"teacher's answer is {a} tokens with EOS, max_response_length {limits.max_response}",
        )
        wrong = long_prompt | long_answer
    _flag(
        batch,
        tokens,
        over & ~wrong,
        "row_too_long",
        keys[0],
        lambda p, a: f"prompt {p} + answer {a} = {p + a} tokens, max_model_len {limits.max_model_len}",
    )
    return tokens.keep(~(wrong | over)), cut


def _flag(
    batch: RowBatch,
    tokens: TokenBatch,
    wrong: npt.NDArray[np.bool_],
    reason: str,
    where: str,
    message: Callable[[int, int], str],
) -> None:
    """A row over two limits gets two findings."""
    for j in np.flatnonzero(wrong).tolist():
        i = int(tokens.rows[j])
        text = message(int(tokens.prompt_lengths[j]), int(tokens.answer_lengths[j]))
        batch.findings.append(batch.finding(i, reason, text, where))
        batch.bad[i] = True


class SpecialText:
    """Finds the text of special tokens inside messages and answers (15): it would be read as control tokens."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self.pattern = "|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)) or None

    def check(self, batch: RowBatch, keys: tuple[str, str]) -> None:
        if self.pattern is None:
            return
        for array, where in ((batch.texts, keys[0]), (batch.teachers, keys[1])):
            hits = np.flatnonzero(truths(pc.match_substring_regex(array, self.pattern)))
            if not len(hits):
                continue
            rows = np.searchsorted(batch.starts, hits, side="right") - 1 if array is batch.texts else hits
            for i, hit in dict(zip(rows.tolist(), hits.tolist(), strict=True)).items():
                message = "contains the text of a special token"
                batch.findings.append(batch.finding(i, "special_text", message, where, excerpt(array[hit].as_py())))


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


def open_files(patterns: list[str], keys: tuple[str, str], summary: Summary) -> list[FileInfo]:
    """`expand` and `inspect_all` in one."""
    return inspect_all(expand(patterns), keys, summary)
