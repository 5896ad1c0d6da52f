"""Rows as token ids: prompts as the sampler is given them, answers as they stand behind these (torch-free)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gadcli.chat.in_context import AnswerFault, Example, example, without_ends
from gadcli.chat.template import TemplateRefusal
from gadcli.chat.tokenize import ChatTokenizer
from gadcli.config.schema import GadConfig
from gadcli.data.read.findings import excerpt, printable
from gadcli.data.read.rows import Row, RowBatch

Ints = npt.NDArray[np.int64]
Spans = tuple[tuple[int, int], ...]
TOKENISED_ROWS = 2048  # rows tokenised at once: their ids take about 40 bytes per token


@dataclass(frozen=True)
class Limits:
    """Token limits, and what exceeds them gets (`data.truncation`). EOS counts as one token of the answer."""

    max_prompt: int
    max_response: int
    max_model_len: int
    truncation: str = "error"


@dataclass(frozen=True)
class Style:
    """What a stage makes of a row: `data.turns`, and whether a teacher may leave out the reasoning that a prompt opens
    (`critic.reads=answer`, where no stage trains the student on the teacher's text)."""

    turns: str = "last"
    hidden_thinking: bool = False

    @staticmethod
    def of(cfg: GadConfig) -> Style:
        """What a stage trains on."""
        hidden = cfg.critic.reads == "answer" and cfg.actor.objective in ("policy", "best_of_n")
        return Style(cfg.data.turns if cfg.stage == "seqkd" else "last", hidden)


@dataclass(frozen=True)
class Answer:
    """One answer behind its prompt: ids with the end token last, the text they stand for, and the spans of ids that are
    not trained on (`data.turns=each`: other speakers' turns)."""

    ids: list[int]
    text: str
    untrained: Spans = ()

    @property
    def longest_turn(self) -> int:
        """Tokens of the longest stretch that is trained, the end token included."""
        edges = [0, *(edge for span in self.untrained for edge in span), len(self.ids)]
        return max(end - start for start, end in zip(edges[::2], edges[1::2], strict=True))


@dataclass
class TokenBatch:
    """The good rows of a RowBatch: each one's prompt and its answers."""

    batch: RowBatch
    rows: list[Row] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    answers: list[list[Answer]] = field(default_factory=list)

    @property
    def prompt_lengths(self) -> Ints:
        """Tokens of each row's prompt [rows]."""
        return np.fromiter(map(len, self.prompts), np.int64, len(self.prompts))

    @property
    def answers_per_row(self) -> Ints:
        return np.fromiter(map(len, self.answers), np.int64, len(self.answers))

    @property
    def answer_lengths(self) -> Ints:
        """Tokens of each answer, the end token included [answers of all rows]."""
        return np.fromiter((len(a.ids) for found in self.answers for a in found), np.int64)

    def keep(self, rows: list[int]) -> TokenBatch:
        return TokenBatch(
            self.batch, [self.rows[j] for j in rows], [self.prompts[j] for j in rows], [self.answers[j] for j in rows]
        )


def tokenise(tokens: ChatTokenizer, batch: RowBatch, style: Style = Style()) -> TokenBatch:
    """Template and tokenizer over a batch's good rows. Rows that cannot be trained on are rejected with the reason;
    what was noticed about others is a finding too."""
    special = SpecialText(tokens)
    rows: list[Row] = []
    texts: list[tuple[str, list[Example]]] = []
    for row in batch.good():
        special.check(batch, row)
        found = _texts(tokens, batch, row, style)
        if found is not None:
            rows.append(row)
            texts.append(found)
    out = TokenBatch(batch, prompts=tokens.encode([prompt for prompt, _ in texts]))
    wholes = iter(tokens.encode([prompt + one.answer for prompt, examples in texts for one in examples]))
    for row, (_, examples), prompt in zip(rows, texts, out.prompts, strict=True):
        answers = [_answer(tokens, prompt, one, next(wholes)) for one in examples]
        for n, (one, (_, merges)) in enumerate(zip(examples, answers, strict=True)):
            for reason, message in [*one.remarks, *([("border_merges", MERGES)] if merges else [])]:
                batch.warn(row, reason, message, answer_field(batch, row, n))
        out.rows.append(row)
        out.answers.append([answer for answer, _ in answers])
    return every_turn(tokens, out) if style.turns == "each" else out


MERGES = "the answer's first token would merge with the prompt's last: it is tokenised behind the prompt's end"


def _answer(tokens: ChatTokenizer, prompt: list[int], one: Example, whole: list[int]) -> tuple[Answer, bool]:
    """The answer's ids, and whether the whole text's tokens run across the prompt's end."""
    merges = whole[: len(prompt)] != prompt
    ids = tokens.encode_behind(one.answer) if merges else whole[len(prompt) :]
    return Answer([*ids, tokens.end_id], one.text), merges


def _texts(tokens: ChatTokenizer, batch: RowBatch, row: Row, style: Style) -> tuple[str, list[Example]] | None:
    """A row's prompt and the examples of its answers; None where the row is rejected."""
    try:
        prompt = tokens.prompt_text(row.messages, row.tools)
    except TemplateRefusal as refusal:
        batch.reject(row, refusal.reason, printable(str(refusal)), batch.format.prompt)
        return None
    examples = []
    for n, text in enumerate(row.answers):
        answer = {"role": "assistant", "content": text}
        try:
            examples.append(
                example(tokens, prompt, row.messages, row.tools, answer, hidden_thinking=style.hidden_thinking)
            )
        except AnswerFault as fault:
            batch.reject(row, fault.reason, printable(fault.message), answer_field(batch, row, n))
            return None
    return prompt, examples


def answer_field(batch: RowBatch, row: Row, n: int) -> str:
    """How findings name a row's n-th answer."""
    return batch.format.answer if len(row.answers) == 1 else f"{batch.format.answer}[{n}]"


def every_turn(tokens: ChatTokenizer, found: TokenBatch) -> TokenBatch:
    """`data.turns=each`: the prompt is what stands before the first assistant turn, all that follows is the answer, and
    of that other speakers' turns are not trained on. Rejects rows whose earlier turns the template writes otherwise
    once the chat goes on: no sampler would meet them so."""
    out = TokenBatch(found.batch)
    for row, prompt, answers in zip(found.rows, found.prompts, found.answers, strict=True):
        try:
            earlier = [_turn(tokens, row, k) for k in _assistant_turns(row)]
        except (AnswerFault, TemplateRefusal) as fault:
            out.batch.reject(row, fault.reason, printable(str(fault)), out.batch.format.prompt)
            continue
        wholes = [[*prompt, *answer.ids] for answer in answers]
        if any(whole[:end] != [*given, *said] for whole in wholes for given, said, end in earlier):
            message = "the chat template writes an earlier assistant turn otherwise once the chat goes on"
            out.batch.reject(row, "turn_rewritten", message, out.batch.format.prompt)
            continue
        starts = [len(given) for given, _, _ in earlier] + [len(prompt)]
        ends = [end for _, _, end in earlier]
        untrained = tuple((end - starts[0], start - starts[0]) for end, start in zip(ends, starts[1:], strict=True))
        out.rows.append(row)
        out.prompts.append(wholes[0][: starts[0]])
        out.answers.append([Answer(w[starts[0] :], a.text, untrained) for w, a in zip(wholes, answers, strict=True)])
    return out


def _assistant_turns(row: Row) -> Iterator[int]:
    return (k for k, message in enumerate(row.messages) if k and message["role"] == "assistant")


def _turn(tokens: ChatTokenizer, row: Row, k: int) -> tuple[list[int], list[int], int]:
    """Message k as if it were the answer: its prompt's ids, its own with the end token, and where it ends."""
    before = row.messages[:k]
    prompt = tokens.prompt_text(before, row.tools)
    one = example(tokens, prompt, before, row.tools, row.messages[k])
    given, whole = tokens.encode([prompt, prompt + one.answer])
    answer, _ = _answer(tokens, given, one, whole)
    return given, answer.ids, len(given) + len(answer.ids)


def limit(found: TokenBatch, limits: Limits) -> tuple[TokenBatch, int]:
    """Reject what is over the limits (4, 13, 14) and return the rest; under `left` and `right`, also count the rows
    that will be cut. The ids returned are not cut yet (see `cut_ids`)."""
    batch, cutting, cut, kept = found.batch, limits.truncation in ("left", "right"), 0, []
    for j, (row, prompt, answers) in enumerate(zip(found.rows, found.prompts, found.answers, strict=True)):
        faults: list[tuple[str, str, str]] = []
        prompt_cut, p = len(prompt) > limits.max_prompt, len(prompt)
        if prompt_cut and not cutting:
            faults.append(
                ("prompt_too_long", f"prompt is {p} tokens, max_prompt_length {limits.max_prompt}", batch.format.prompt)
            )
        cuts = prompt_cut
        for n, answer in enumerate(answers):
            a, turn = len(answer.ids), answer.longest_turn
            too_long = turn > limits.max_response
            if too_long and not cutting:
                message = f"teacher's answer is {turn} tokens with EOS, max_response_length {limits.max_response}"
                faults.append(("teacher_too_long", message, answer_field(batch, row, n)))
            cuts = cuts or too_long
            both = min(p, limits.max_prompt) + min(a, limits.max_response) if cutting else p + a
            if both > limits.max_model_len and not faults:
                message = f"prompt {p} + answer {a} = {p + a} tokens, max_model_len {limits.max_model_len}"
                faults.append(("row_too_long", message, batch.format.prompt))
        for reason, message, where in faults:
            batch.reject(row, reason, message, where)
        if not faults:
            kept.append(j)
            cut += cuts
    return found if len(kept) == len(found.rows) else found.keep(kept), cut


def cut_ids(ids: list[int], most: int, truncation: str) -> list[int]:
    """At most `most` ids: the first ones (`right` cuts the end off) or the last ones (`left`)."""
    if len(ids) <= most:
        return ids
    return ids[:most] if truncation == "right" else ids[-most:]


class SpecialText:
    """Finds the text of special tokens inside messages and answers (15): it would be read as control tokens."""

    def __init__(self, tokens: ChatTokenizer) -> None:
        texts = sorted(tokens.special_texts, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        self.ends: Sequence[str] = tokens.end_texts

    def check(self, batch: RowBatch, row: Row) -> None:
        """Warns once per field; an end token at an answer's very end is another matter (see `in_context`)."""
        if self.pattern is None:
            return
        fields = [(batch.format.prompt, str(m["content"])) for m in row.messages]
        fields += [(answer_field(batch, row, n), without_ends(a, self.ends)) for n, a in enumerate(row.answers)]
        said = set()
        for where, text in fields:
            if where not in said and (hit := self.pattern.search(text)):
                said.add(where)
                batch.warn(
                    row, "special_text", f"contains the text of a special token, {hit[0]!r}", where, excerpt(text)
                )
