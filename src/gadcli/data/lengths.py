"""Token lengths in bounded memory: exact percentiles, what a limit cuts, which limit to take (torch-free)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gadcli.chat.tokenize import ChatTokenizer
from gadcli.data.check import Progress, account, open_files, scan_rows
from gadcli.data.read.findings import Summary
from gadcli.data.template_check import template_findings
from gadcli.data.tokens import TOKENISED_ROWS, tokenise

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
FIELDS = ("prompt", "teacher", "both")
DENSE = 1 << 17  # lengths below have a counter each; longer ones are rare and kept in a dict
MULTIPLE = 16  # limits in steps of 16 tokens: the block size of vLLM's KV cache and of tensor-core tiles
COVER = 99.0


@dataclass
class Lengths:
    """How often each length occurs. Adding is exact and order-free; a million rows or a billion cost the same."""

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(DENSE, np.int64))
    longer: Counter[int] = field(default_factory=Counter)

    def add(self, lengths: npt.NDArray[np.int64]) -> None:
        dense = lengths[lengths < DENSE]
        if len(dense):
            found = np.bincount(dense)
            self.counts[: len(found)] += found
        self.longer.update(lengths[lengths >= DENSE].tolist())

    def merge(self, other: Lengths) -> None:
        self.counts += other.counts
        self.longer.update(other.longer)

    @property
    def rows(self) -> int:
        return int(self.counts.sum()) + sum(self.longer.values())

    @property
    def tokens(self) -> int:
        return int((self.counts * np.arange(DENSE)).sum()) + sum(n * c for n, c in self.longer.items())

    @property
    def longest(self) -> int:
        if self.longer:
            return max(self.longer)
        present = np.flatnonzero(self.counts)
        return int(present[-1]) if len(present) else 0

    @property
    def shortest(self) -> int:
        present = np.flatnonzero(self.counts)
        return int(present[0]) if len(present) else min(self.longer, default=0)

    def over(self, limit: int) -> int:
        """Rows longer than `limit`."""
        dense = int(self.counts[limit + 1 :].sum()) if limit < DENSE else 0
        return dense + sum(c for n, c in self.longer.items() if n > limit)

    def percentile(self, p: float) -> int:
        """Nearest rank: the smallest length that at least p percent of rows do not exceed."""
        rank = max(1, math.ceil(p / 100 * self.rows - 1e-9))
        at = int(np.searchsorted(np.cumsum(self.counts), rank))
        if at < DENSE:
            return at
        seen = int(self.counts.sum())
        for length in sorted(self.longer):
            seen += self.longer[length]
            if seen >= rank:
                return length
        return 0

    def histogram(self, bins: int = 12) -> list[tuple[int, int, int]]:
        """(from, to inclusive, rows) of up to `bins` equal bins up to P99.9, and one for the rest."""
        if self.rows == 0:
            return []
        low, high = self.shortest, max(self.percentile(99.9), self.shortest)
        width = max(1, math.ceil((high - low + 1) / bins))
        out = []
        for start in range(low, high + 1, width):
            end = min(start + width - 1, high)
            out.append((start, end, self.over(start - 1) - self.over(end)))
        if self.longest > high:
            out.append((high + 1, self.longest, self.over(high)))
        return out

    def to_json(self) -> dict[str, Any]:
        rows = self.rows
        stats: dict[str, Any] = {"count": rows, "tokens": self.tokens, "mean": self.tokens / rows if rows else 0.0}
        stats["min"] = self.shortest
        stats |= {f"p{p:g}": self.percentile(p) if rows else 0 for p in PERCENTILES}
        return stats | {"max": self.longest, "histogram": self.histogram()}


@dataclass
class Analysis:
    """Lengths of each field over all files and per file, and what the same pass found wrong."""

    fields: dict[str, Lengths]
    files: dict[str, dict[str, Any]]
    summary: Summary


def analyse(
    patterns: Iterable[str], keys: tuple[str, str], tokenizer: ChatTokenizer, progress: Progress | None = None
) -> Analysis:
    """Tokenise every good row once and count: `prompt` (template and generation prompt included), `teacher` (each
    answer, EOS included), `both` (each answer with its prompt)."""
    summary = Summary()
    summary.add(template_findings(tokenizer))
    infos = open_files(list(patterns), keys, summary)
    fields = {name: Lengths() for name in FIELDS}
    files: dict[str, dict[str, Any]] = {}
    for batch in scan_rows(infos, summary, progress, most_rows=TOKENISED_ROWS):
        tokens = tokenise(tokenizer, batch)
        account(batch, summary)
        prompts, answers = tokens.prompt_lengths, tokens.answer_lengths
        fields["prompt"].add(prompts)
        fields["teacher"].add(answers)
        fields["both"].add(np.repeat(prompts, tokens.answers_per_row) + answers)
        file = files.setdefault(batch.file, {"rows": 0, "dropped": 0, "prompt_tokens": 0, "teacher_tokens": 0,
                                             "longest_prompt": 0, "longest_teacher": 0})  # fmt: skip
        file["rows"] += len(batch)
        file["dropped"] += batch.bad
        file["prompt_tokens"] += int(prompts.sum())
        file["teacher_tokens"] += int(answers.sum())
        file["longest_prompt"] = max(file["longest_prompt"], int(prompts.max(initial=0)))
        file["longest_teacher"] = max(file["longest_teacher"], int(answers.max(initial=0)))
    return Analysis(fields, files, summary)


@dataclass(frozen=True)
class Suggestion:
    """Limits that keep 99 % of the rows, and why not more."""

    max_prompt_length: int
    max_response_length: int
    max_model_len: int
    rows_cut: dict[str, int]
    reasons: list[str]

    def limits(self) -> dict[str, int]:
        """As config keys."""
        return {
            "data.max_prompt_length": self.max_prompt_length,
            "data.max_response_length": self.max_response_length,
            "rollout.max_model_len": self.max_model_len,
        }


def round_up(length: int) -> int:
    return max(MULTIPLE, math.ceil(length / MULTIPLE) * MULTIPLE)


def suggest(fields: dict[str, Lengths]) -> Suggestion:
    """P99 of each field, rounded up to the next multiple of 16; `max_model_len` is their sum."""
    prompt, teacher = (round_up(fields[f].percentile(COVER)) for f in ("prompt", "teacher"))
    rows = max(fields["teacher"].rows, 1)
    saved = fields["teacher"].over(teacher) - fields["teacher"].over(3 * teacher)
    p50 = max(fields["teacher"].percentile(50), 1)
    reasons = [
        f"max_response_length {teacher}: P99 of the teacher is {fields['teacher'].percentile(COVER)}, "
        f"rounded up to a multiple of {MULTIPLE}",
        f"why not 3x ({3 * teacher}): it would keep {saved / rows:.2%} more rows, but a student that has not "
        f"learnt to stop would run to {3 * teacher} tokens where the teacher's median is {p50}: up to 3x the "
        "rollout time and KV cache, and a discriminator that can tell the two by length alone",
        f"max_prompt_length {prompt}: P99 of the prompt is {fields['prompt'].percentile(COVER)}, "
        f"rounded up to a multiple of {MULTIPLE}; max_model_len is the sum",
    ]
    cut = {"prompt": fields["prompt"].over(prompt), "teacher": fields["teacher"].over(teacher)}
    return Suggestion(prompt, teacher, prompt + teacher, cut, reasons)


def limit_table(lengths: Lengths, current: int | None, suggested: int) -> list[tuple[int, str, int, float]]:
    """(limit, label, rows cut, share kept) for round limits around the data, the current one, the suggestion."""
    low, high = lengths.percentile(50), lengths.longest
    marks = {2**k: "" for k in range(4, 21) if low <= 2**k < 2 * max(high, 1)}
    marks[3 * suggested] = "3x the suggestion"
    marks[suggested] = "suggested"
    if current is not None:
        marks[current] = "suggested, and current" if current == suggested else "current"
    rows = max(lengths.rows, 1)
    return [(m, marks[m], lengths.over(m), 1 - lengths.over(m) / rows) for m in sorted(marks)]


def steps(rows: int, batch_size: int, tokens: int) -> dict[str, Any]:
    """What one epoch costs: full batches, rows left over, teacher-forced tokens a step."""
    per_epoch = rows // batch_size
    return {
        "batch_size": batch_size,
        "steps_per_epoch": per_epoch,
        "rows_left_over": rows - per_epoch * batch_size,
        "tokens_per_step": round(tokens / rows * batch_size) if rows else 0,
    }


def fit(fields: dict[str, Lengths], max_prompt: int, max_response: int, suggestion: Suggestion) -> list[str]:
    """How a preset's limits suit this data, one sentence each; those that start with `!` do not."""
    out = []
    for name, key, limit, wanted in (
        ("prompt", "max_prompt_length", max_prompt, suggestion.max_prompt_length),
        ("teacher", "max_response_length", max_response, suggestion.max_response_length),
    ):
        rows = max(fields[name].rows, 1)
        cut = fields[name].over(limit)
        covers = f"{key} {limit} covers {100 * (1 - cut / rows):.4g} % ({cut:,} rows cut)"
        if cut / rows > 1 - COVER / 100:
            out.append(f"! {covers}: too short for this data; {wanted} covers 99 %")
        elif limit >= 3 * wanted:
            out.append(f"! {covers}: {limit / wanted:.1f}x what this data needs ({wanted})")
        else:
            out.append(covers)
    return out
