"""The row contract: whatever a file looks like, its rows come out as messages, one or more answers, and tools.

Values arrive as Python objects (`reading`), laid out as one of `formats`; here each is checked and brought into one
form, and rows that break the contract are named with all their faults. Torch-free.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from gadcli.data.read.findings import Finding, excerpt
from gadcli.data.read.formats import Fault, Format, is_plain_text, parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
TO_JSON = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder for each call with options
Message = dict[str, Any]  # role and content are text; tool_calls, tool_call_id, name … where a row has them


@dataclass(frozen=True)
class Row:
    """One training example. `row_id` counts over all files in their order, dropped rows included.

    `answers` holds one text or more, none of them blank; `tools` is what the chat template takes under that name.
    """

    row_id: int
    messages: list[Message]
    answers: list[str]
    tools: list[dict[str, Any]] | None = None

    @property
    def teacher(self) -> str:
        return self.answers[0]

    def prompt_json(self) -> bytes:
        """What the model is asked, as bytes: equal for equal prompts, whatever file they come from."""
        asked: Any = self.messages if self.tools is None else [self.messages, self.tools]
        return TO_JSON(asked).encode()

    def whole_json(self) -> bytes:
        """The same with the answers."""
        return self.prompt_json() + TO_JSON(self.answers).encode()


@dataclass
class Chunk:
    """Rows as read: one record (column → value) each, or the Fault of a line that is none.

    `first_row` counts within the file. `extras`: all columns, where a cleaned copy is wanted.
    """

    file: str
    row_group: int | None
    first_row: int
    records: list[dict[str, Any] | Fault]
    extras: pa.RecordBatch | None = None


@dataclass
class RowBatch:
    """Some rows of one file: None stands for a row with an error, which is among `findings`."""

    file: str
    row_group: int | None
    first_row: int
    first_id: int
    format: Format
    rows: list[Row | None] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    chunk: Chunk | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def good(self) -> list[Row]:
        return [row for row in self.rows if row is not None]

    @property
    def bad(self) -> int:
        return self.rows.count(None)

    def reject(self, row: Row, reason: str, message: str, where: str, shown: str = "") -> None:
        """Mark a row as bad, with the finding that says why."""
        self.warn(row, reason, message, where, shown)
        self.rows[row.row_id - self.first_id] = None

    def warn(self, row: Row, reason: str, message: str, where: str, shown: str = "") -> None:
        """A finding about a row that stays."""
        self.findings.append(self.finding(row.row_id - self.first_id, reason, message, where, shown))

    def finding(self, i: int, reason: str, message: str, where: str, shown: str = "") -> Finding:
        return Finding(reason, self.file, message, self.row_group, self.first_row + i, where, shown)


def normalise(chunk: Chunk, first_id: int, form: Format, plain: bool = False) -> RowBatch:
    """Read a chunk's records as rows; every fault of a row becomes a finding (2-3, 6-12, 16, 17).

    `plain`: a prompt that is text is the user's only turn, and not the JSON of messages.
    """
    batch = RowBatch(chunk.file, chunk.row_group, chunk.first_row, first_id, form, chunk=chunk)
    for i, record in enumerate(chunk.records):
        faults: list[tuple[Fault, str, Any]] = []  # with the column, and what stood in it

        def keep(value: Any, column: str, raw: Any, faults: list[tuple[Fault, str, Any]] = faults) -> Any:
            if isinstance(value, Fault):
                faults.append((value, column, raw))
            return value

        if isinstance(record, Fault):  # the line as a whole is none
            keep(record, form.prompt, None)
        else:
            prompt, answer = form.read(record)
            messages = keep(read_plain(prompt) if plain else read_messages(prompt), form.prompt, prompt)
            answers = keep(read_answers(answer), form.answer, answer) if form.answer else []
            tools = keep(read_tools(record.get("tools")), "tools", record.get("tools"))
            if isinstance(answer, dict) and (answer.get("reasoning_content") or answer.get("reasoning")):
                batch.findings.append(
                    batch.finding(i, "reasoning_unused", "the teacher's reasoning is left out", form.answer)
                )
        for fault, column, raw in faults:
            place = column if fault.index is None else f"{column}[{fault.index}]"
            shown = "" if raw is None or isinstance(raw, Fault) else excerpt(raw)
            batch.findings.append(batch.finding(i, fault.reason, fault.message, place, shown))
        batch.rows.append(None if faults else Row(first_id + i, messages, answers, tools))
    return batch


def prompts_are_plain(chunk: Chunk, form: Format) -> bool | None:
    """Whether the prompts of a file are plain text and no JSON: its first one decides. None if none of them is text."""
    for record in chunk.records:
        if not isinstance(record, Fault):
            prompt = form.read(record)[0]
            text = _text(prompt) if isinstance(prompt, bytes) else prompt
            if isinstance(text, str) and text and not text.isspace():
                return is_plain_text(text)
    return None


def read_plain(value: Any) -> list[Message] | Fault:
    """Text as one user turn; messages are taken too."""
    text = _text(value) if isinstance(value, bytes) else value
    if not isinstance(text, str):
        return read_messages(text)
    if not text or text.isspace():
        return Fault("content_empty", "the prompt is empty or blank")
    return [{"role": "user", "content": text}] if _encodable(text) else HALF_PAIR


def read_messages(value: Any) -> list[Message] | Fault:
    """A list of messages, or the JSON of one; each comes out as role, content and what else it holds."""
    if isinstance(value, (str, bytes)):
        value = parse_json(value, "content", "messages are")
    if isinstance(value, Fault):
        return value
    if value is None:
        return Fault("content_null", "messages are null")
    if not isinstance(value, list):
        return Fault("content_type", f"messages are a {type(value).__name__}, not a list")
    if not value:
        return Fault("content_empty", "the list of messages is empty")
    messages: list[Message] = []
    for given in value:
        message = _message(given)
        if isinstance(message, Fault):
            return message
        messages.append(message)
    if messages[-1]["role"] == "assistant":
        return Fault("last_is_assistant", "the last turn is the assistant's")
    return messages


def _message(given: Any) -> Message | Fault:
    if not isinstance(given, dict) or given.get("role") is None or not ("content" in given or "tool_calls" in given):
        keys = ", ".join(map(str, given)) if isinstance(given, dict) else type(given).__name__
        return Fault("message_keys", f"a message has no role or no content; it has {keys or 'nothing'}")
    role, content = _text(given["role"]), given.get("content")
    if not isinstance(role, str) or role not in ROLES:
        return Fault("role_unknown", f"unknown role {excerpt(role)!r}")
    if len(given) == 2 and isinstance(content, str):  # most messages
        return {"role": role, "content": content} if _encodable(content) else HALF_PAIR
    more = {key: given[key] for key in sorted(given) if key not in ("role", "content") and given[key] is not None}
    if isinstance(calls := more.get("tool_calls"), (str, bytes)):
        more["tool_calls"] = calls = parse_json(calls, "content", "tool calls are")
    if isinstance(calls, Fault):
        return calls
    if calls == []:
        del more["tool_calls"]
    text = "" if content is None and calls else _text(content)
    if isinstance(text, Fault):
        return text
    if not isinstance(text, str):
        return Fault("message_type", f"a message's content is {_kind(content)}")
    return {"role": role, "content": text, **without_nulls(more)} if _encodable(text) else HALF_PAIR


HALF_PAIR = Fault("content_utf8", "a message holds half a surrogate pair, which UTF-8 cannot")


def _text(value: Any) -> Any:
    """Bytes as text, and content parts as the text they hold; other values unchanged, or a Fault."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return Fault("content_utf8", "a message is not valid UTF-8")
    if isinstance(value, list) and value and all(isinstance(p, dict) and "type" in p for p in value):
        odd = next((p["type"] for p in value if p["type"] != "text" or not isinstance(p.get("text"), str)), None)
        if odd is not None:
            return Fault("message_type", f"a message has a part of type {excerpt(odd)!r}; only text is supported")
        return "".join(p["text"] for p in value)
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def read_answers(value: Any) -> list[str] | Fault:
    """The teacher's answer or answers: text, a list of texts, content parts, or an assistant's message."""
    if isinstance(value, str) and value and not value.isspace() and _encodable(value):  # most of them
        return [value]
    if isinstance(value, Fault):
        return Fault(value.reason.replace("content_", "teacher_"), value.message.replace("a message", "an answer"))
    if value is None or value == []:
        return Fault("teacher_null", "teacher's answer is null" if value is None else "there are no answers")
    if isinstance(value, list) and all(isinstance(v, (str, bytes, type(None))) for v in value):
        answers = []
        for index, one in enumerate(value):
            text = _answer(one)
            if isinstance(text, Fault):
                return Fault(text.reason, text.message, index)
            answers.append(text)
        return answers
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and "role" in value[0]:
        value = value[0]
    text = _answer(value)
    return text if isinstance(text, Fault) else [text]


def _answer(value: Any) -> str | Fault:
    if isinstance(value, dict):
        if value.get("role") not in (None, "assistant"):
            return Fault("teacher_type", f"the answer is a message of role {excerpt(value['role'])!r}")
        if value.get("tool_calls"):
            return Fault("teacher_type", "the answer calls a tool; only text can be trained on")
        if "content" not in value:
            return Fault("teacher_type", "teacher's answer is an object without content")
        value = value["content"]
    if value is None:
        return Fault("teacher_null", "teacher's answer is null")
    text = _text(value)
    if isinstance(text, Fault):
        reason = "teacher_utf8" if text.reason == "content_utf8" else "teacher_type"
        return Fault(reason, text.message.replace("a message", "teacher's answer", 1))
    if not isinstance(text, str):
        return Fault("teacher_type", f"teacher's answer is a {type(text).__name__}")
    if not text or text.isspace():
        return Fault("teacher_blank", "teacher's answer is empty or blank")
    return text if _encodable(text) else Fault("teacher_utf8", "teacher's answer holds half a surrogate pair")


def read_tools(value: Any) -> list[dict[str, Any]] | Fault | None:
    """The tools a template may list: JSON schemas, as a list or as its JSON; None where there are none."""
    if isinstance(value, (str, bytes)):
        value = parse_json(value, "tools", "tools are") if value.strip() else None
    if isinstance(value, Fault):
        return Fault("tools_json", value.message)
    if not value:
        return None
    if isinstance(value, list):
        tools = [parse_json(v, "tools", "a tool is") if isinstance(v, (str, bytes)) else v for v in value]
        if all(isinstance(tool, dict) for tool in tools):
            return [without_nulls(tool) for tool in tools]
    return Fault("tools_json", "tools are not a list of JSON objects")


def without_nulls(value: Any) -> Any:
    """Without the keys whose value is null: columns of structs hold every key that any row has."""
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
