"""What can be wrong with a file or a row: the one table of reasons, findings and their summary (torch-free)."""

from __future__ import annotations

import bisect
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import IO

EXCERPT_CHARS = 80
EXAMPLES_PER_REASON = 5


@dataclass(frozen=True)
class Reason:
    """One kind of fault: its level (`error` rows cannot be trained on, `warn` fails under --strict, `note` is counted
    and said), what it means, what to do next."""

    level: str
    meaning: str
    hint: str


REASONS: dict[str, Reason] = {
    "file_unreadable": Reason("error", "not a readable data file", "write or copy the file again"),
    "file_empty": Reason("error", "the file has 0 rows", "leave the file out"),
    "column_missing": Reason(
        "error", "a needed column is missing", "set data.prompt_key / data.response_key to the column's name"
    ),
    "column_type": Reason("error", "a column has a type that holds no text", "store messages or text in it"),
    "files_chosen": Reason("note", "a folder's files were chosen among", "name the files to take others"),
    "read_as": Reason("note", "columns or kind of file were guessed", "set data.prompt_key / data.response_key"),
    "schema_differs": Reason("warn", "files store the same column in different types", "write all files alike"),
    "page_corrupt": Reason("error", "a part of the file cannot be decoded", "write or copy the file again"),
    "teacher_null": Reason("error", "the teacher's answer is null", "drop the row or collect the answer again"),
    "teacher_blank": Reason("error", "the teacher's answer is empty or blank", "drop the row"),
    "teacher_type": Reason("error", "the teacher's answer is not text", "store it as a string"),
    "teacher_utf8": Reason("error", "the teacher's answer is not valid UTF-8", "decode it before writing"),
    "teacher_eos_only": Reason("error", "the teacher's answer is nothing but the end-of-answer token", "drop the row"),
    "teacher_too_long": Reason(
        "error", "the teacher's answer is over data.max_response_length", "raise it, or set data.truncation"
    ),
    "content_null": Reason("error", "the messages are null", "drop the row"),
    "content_empty": Reason("error", "the list of messages is empty", "drop the row"),
    "content_json": Reason("error", "the messages' JSON is invalid", "store a list of {role, content}"),
    "content_type": Reason("error", "the messages are not a list", "store a list of {role, content}"),
    "content_utf8": Reason("error", "a message is not valid UTF-8", "decode it before writing"),
    "message_keys": Reason("error", "a message has no role or no content", "give each message both"),
    "message_type": Reason("error", "a message's content is not text", "store it as a string"),
    "role_unknown": Reason("error", "a role the chat template does not know", "use system, user or assistant"),
    "last_is_assistant": Reason("error", "the last turn is the assistant's", "end the prompt with the user's turn"),
    "template_refuses": Reason("error", "the model's chat template refuses the messages", "reorder the turns"),
    "system_refused": Reason(
        "error", "the model's chat template has no system role", "put the system text into the first user message"
    ),
    "template_leaves_out": Reason(
        "error",
        "the model's chat template leaves out a message, a tool call or the tools",
        "drop them from the rows, or take a model whose template writes them",
    ),
    "template_missing": Reason(
        "error",
        "the model has no chat template to tell several messages apart",
        "put a chat_template.jinja into the model's folder, or give one user message per row",
    ),
    "template_absent": Reason(
        "warn",
        "the model has no chat template: prompts are given as they are",
        "put a chat_template.jinja into the model's folder if it is to be served as a chat model",
    ),
    "template_date": Reason(
        "note",
        "the chat template writes today's date into prompts",
        "data.template_kwargs={date_string: …} fixes it where the template takes one",
    ),
    "template_rewrites": Reason(
        "note",
        "the template renders finished conversations otherwise: the teacher's own text is trained behind the prompt",
        "nothing, if --show-mask shows what you expect",
    ),
    "template_end": Reason(
        "warn",
        "the template ends answers with text that the tokenizer has no token for",
        "add it to the tokenizer's special tokens, or correct the template",
    ),
    "end_differs": Reason(
        "note",
        "answers end with a token that is not the tokenizer's eos_token",
        "nothing: gad stops at both, and saved models name both in generation_config.json",
    ),
    "end_is_text": Reason(
        "warn", "an eos_token_id is a plain token of the vocabulary", "correct eos_token_id in generation_config.json"
    ),
    "start_twice": Reason("warn", "the prompt holds the BOS token twice", "write bos_token once in the chat template"),
    "end_added": Reason(
        "note", "the tokenizer adds tokens behind every text: left out of prompts", "set add_eos_token to false"
    ),
    "end_in_answer": Reason(
        "warn", "the answer ends with the text of an end token, which is trained once", "remove it from the answer"
    ),
    "end_inside": Reason(
        "error", "an end token's text stands inside the answer", "remove or escape it: sampling would stop there"
    ),
    "think_opened_twice": Reason(
        "warn",
        "prompt and answer both open <think>: trained with one of them",
        "remove <think> from the answer's start",
    ),
    "think_not_opened": Reason(
        "warn", "the answer closes </think> that nothing has opened", "put <think> at the answer's start"
    ),
    "think_not_closed": Reason(
        "error",
        "thinking is opened and the answer never closes it",
        "add the reasoning with its </think>, or set "
        "data.template_kwargs={enable_thinking: false} where the template knows it",
    ),
    "border_merges": Reason(
        "note",
        "the whole text's tokens run across the prompt's end: the answer is tokenised behind it",
        "nothing: prompts stay as the sampler gets them",
    ),
    "turn_rewritten": Reason(
        "error", "the template writes earlier assistant turns otherwise than last ones", "data.turns=last"
    ),
    "prompt_too_long": Reason("error", "the prompt is over data.max_prompt_length", "raise it, or set data.truncation"),
    "row_too_long": Reason(
        "error", "prompt and answer are over rollout.max_model_len", "raise it, or lower the two limits"
    ),
    "tools_json": Reason("error", "the tools are not a list of JSON objects", "store JSON schemas in the column tools"),
    "reasoning_unused": Reason(
        "note", "the teacher's reasoning is not trained on", "put it into the answer to train on it"
    ),
    "special_text": Reason("warn", "a message contains the text of a special token", "remove or escape it"),
    "duplicate": Reason("warn", "the same messages and answer occur before", "keep one of them"),
    "overlap": Reason("warn", "a prompt is in training and held-out files alike", "gad data split keeps them apart"),
}


@dataclass(frozen=True)
class Finding:
    """One fault in one place. `row` counts from 0 within the file; None means the file (or row group) itself."""

    reason: str
    file: str
    message: str
    row_group: int | None = None
    row: int | None = None
    field: str = ""
    excerpt: str = ""

    @property
    def level(self) -> str:
        return REASONS[self.reason].level

    def to_json(self) -> str:
        return json.dumps({"level": self.level, **asdict(self)}, ensure_ascii=False)

    def where(self) -> str:
        place = self.file if self.row is None else f"{self.file} row {self.row}"
        return printable(f"{place} {self.field}".strip())


def printable(text: str) -> str:
    """On one line, without what a terminal would obey; names in files may hold anything."""
    return "".join(c if c.isprintable() else "?" for c in text)


def excerpt(value: object) -> str:
    """The first characters of a value, on one line, safe to print in a terminal."""
    if isinstance(value, bytes):
        value = value[: 2 * EXCERPT_CHARS].decode("utf-8", "backslashreplace")
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else " " for c in text[: 2 * EXCERPT_CHARS])
    return text[:EXCERPT_CHARS]


@dataclass
class Summary:
    """Counts of one pass. Bounded memory: all findings are counted, a few of each kind are kept.

    `total` rows were read; `dropped` of them have at least one error; `kept + dropped == total`.
    `file_errors` counts faults of whole files and row groups, whose rows cannot be counted.
    """

    total: int = 0
    dropped: int = 0
    truncated: int = 0
    file_errors: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # columns that a cleaned copy does not carry
    starts: list[tuple[int, str]] = field(default_factory=list)  # the id of each file's first row, in order
    sink: IO[str] | None = None

    @property
    def kept(self) -> int:
        return self.total - self.dropped

    @property
    def errors(self) -> int:
        return sum(n for reason, n in self.counts.items() if REASONS[reason].level == "error")

    @property
    def warnings(self) -> int:
        return sum(n for reason, n in self.counts.items() if REASONS[reason].level != "error")

    def add(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.counts[finding.reason] += 1
            kept = self.examples.setdefault(finding.reason, [])
            if len(kept) < EXAMPLES_PER_REASON:
                kept.append(finding)
            if finding.row is None and finding.level == "error":
                self.file_errors += 1
            if self.sink is not None:
                self.sink.write(finding.to_json() + "\n")

    def place(self, row_id: int) -> tuple[str, int]:
        """The file that a row id stands for, and the row within it."""
        first, file = self.starts[bisect.bisect(self.starts, row_id, key=lambda start: start[0]) - 1]
        return file, row_id - first

    def lines(self, level: str | None = None) -> list[str]:
        """One line a reason, most frequent first: count, meaning, first place, what was found there."""
        out = []
        for reason, count in self.counts.most_common():
            if level not in (None, REASONS[reason].level):
                continue
            first = self.examples[reason][0]
            out.append(f"{count:>9,}  {reason}: {first.message} (first: {first.where()})")
        return out

    def hints(self, level: str = "error") -> list[str]:
        return [REASONS[r].hint for r, _ in self.counts.most_common() if REASONS[r].level == level]
