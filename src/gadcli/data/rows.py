"""The row contract: whatever encoding a file has, its rows come out as the same messages and teacher text.

A `RowBatch` holds some thousand rows in columns (flat Arrow arrays of roles and texts, and where each row
starts), with the rows that break the contract flagged. Nothing here is per-row Python unless a row is JSON.
Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gadcli.data.arrays import indexes, strings, truths, whole_numbers
from gadcli.data.files import JsonFault, is_bytes, is_list
from gadcli.data.findings import Finding, excerpt
from gadcli.errors import ResourceError

ROLES = ("system", "user", "assistant")
_SKIP = object()  # stands for a value that is already reported
MAX_BATCH_BYTES = 1 << 30  # of one column in one batch; only a file that repeats a huge value gets there

Mask = npt.NDArray[np.bool_]
Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """One training example. `row_id` counts over all files in their order, dropped rows included."""

    row_id: int
    messages: list[Message]
    teacher: str


@dataclass
class RawChunk:
    """Rows as read: Arrow arrays from parquet, Python lists from jsonl. `first_row` counts within the file."""

    file: str
    row_group: int | None
    first_row: int
    content: pa.Array | list[Any]
    teacher: pa.Array | list[Any]
    extras: pa.RecordBatch | None = None
    records: list[Any] | None = None  # jsonl: each line's value, or the text of a line that is no JSON


@dataclass
class RowBatch:
    """Rows in columns. Row i's messages are `starts[i]:starts[i+1]` of the flat `roles` and `texts`.

    `bad[i]` is set for rows with an error among `findings`; their messages and teacher may be null.
    """

    file: str
    row_group: int | None
    first_row: int
    first_id: int
    roles: pa.Array
    texts: pa.Array
    starts: npt.NDArray[np.int64]
    teachers: pa.Array
    bad: Mask
    findings: list[Finding] = field(default_factory=list)
    extras: pa.RecordBatch | None = None
    records: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.bad)

    def flag(self, mask: Mask, reason: str, message: str | Callable[[int], str], where: str, show: Any = None) -> None:
        """Mark rows bad, one finding each. `show(i)` gives row i's excerpt."""
        for i in np.flatnonzero(mask & ~self.bad).tolist():
            self.findings.append(self.finding(i, reason, message if isinstance(message, str) else message(i), where,
                                              show(i) if show else ""))  # fmt: skip
        self.bad |= mask

    def finding(self, i: int, reason: str, message: str, where: str, shown: str = "") -> Finding:
        return Finding(reason, self.file, message, self.row_group, self.first_row + i, where, shown)

    def good(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(~self.bad).astype(np.int64)

    def conversations(self, rows: npt.NDArray[np.int64]) -> list[list[Message]]:
        """The messages of some good rows as the dicts chat templates take."""
        flat = [{"role": r, "content": c} for r, c in zip(self.roles.to_pylist(), self.texts.to_pylist(), strict=True)]
        starts = self.starts.tolist()
        return [flat[starts[i] : starts[i + 1]] for i in rows.tolist()]

    def turns(self, rows: npt.NDArray[np.int64]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        """Each row's roles and texts: half the cost of dicts."""
        roles, texts = self.roles.to_pylist(), self.texts.to_pylist()
        starts = self.starts.tolist()
        return ((tuple(roles[starts[i] : starts[i + 1]]), texts[starts[i] : starts[i + 1]]) for i in rows.tolist())

    def teacher_texts(self, rows: npt.NDArray[np.int64]) -> list[str]:
        taken = self.teachers if len(rows) == len(self) else self.teachers.take(indexes(rows))
        return list(taken.to_pylist())

    def rows(self) -> list[Row]:
        """The good rows, one by one."""
        good = self.good()
        return [
            Row(self.first_id + i, messages, teacher)
            for i, messages, teacher in zip(
                good.tolist(), self.conversations(good), self.teacher_texts(good), strict=True
            )
        ]


def normalise(chunk: RawChunk, first_id: int, fields: tuple[str, str]) -> RowBatch:
    """Bring a chunk into columns and flag every row that breaks the contract (faults 2-3, 6-12, 16, 17).

    `fields` are the names of the prompt and the teacher column, for the findings.
    """
    n = len(chunk.content)
    batch = RowBatch(
        chunk.file, chunk.row_group, chunk.first_row, first_id, pa.nulls(0, pa.string()), pa.nulls(0, pa.string()),
        np.zeros(n + 1, np.int64), pa.nulls(n, pa.string()), np.zeros(n, bool), [], chunk.extras, chunk.records,
    )  # fmt: skip
    if isinstance(chunk.content, list):
        _messages_from_python(batch, chunk.content, fields[0])
        _teacher_from_python(batch, chunk.teacher, fields[1])
        return batch
    content = _decoded(chunk.content)
    if is_list(content.type):
        _messages_from_lists(batch, content, fields[0])
    else:
        _messages_from_json(batch, content, fields[0])
    _teacher_from_arrow(batch, _decoded(chunk.teacher), fields[1])
    return batch


def normalise_prompts(chunk: RawChunk, field_name: str) -> RowBatch:
    """As `normalise`, for rows that have no answer yet."""
    n = len(chunk.content)
    unanswered = RawChunk(chunk.file, chunk.row_group, chunk.first_row, chunk.content, strings(["-"] * n), chunk.extras)
    if isinstance(chunk.content, list):
        unanswered.teacher = ["-"] * n
    return normalise(unanswered, chunk.first_row, (field_name, ""))


def _decoded(array: pa.Array) -> pa.Array:
    """Without a dictionary or the JSON mark; refuses a dictionary whose repeats would unfold beyond memory."""
    if isinstance(array.type, pa.JsonType):
        array = array.storage
    if not pa.types.is_dictionary(array.type):
        return array
    if len(array) and not pa.types.is_null(array.type.value_type):
        lengths = pc.binary_length(_plain(array.dictionary))
        unfolded = pc.sum(lengths.take(array.indices)).as_py() or 0
        if unfolded > MAX_BATCH_BYTES:
            raise ResourceError(f"{len(array)} rows unfold to {unfolded:,} bytes", "write the file without repeats")
    return array.cast(array.type.value_type)


def _plain(array: pa.Array) -> pa.Array:
    """View types as large offsets: fewer kernels know views."""
    if pa.types.is_string_view(array.type):
        return array.cast(pa.large_string())
    if pa.types.is_binary_view(array.type) or pa.types.is_fixed_size_binary(array.type):
        return array.cast(pa.large_binary())
    return array


def _as_text(array: pa.Array) -> tuple[pa.Array, Mask | None]:
    """A valid string array, and which values were not UTF-8 (they become null). Parquet readers do not check."""
    array = _plain(array)
    if pa.types.is_null(array.type):
        return array.cast(pa.string()), None
    large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    try:
        if is_bytes(array.type):
            return array.cast(pa.large_string() if large else pa.string()), None
        array.validate(full=True)
        return array, None
    except pa.ArrowInvalid:
        pass
    values = array.cast(pa.large_binary() if large else pa.binary()).to_pylist()
    texts, wrong = [], np.zeros(len(values), bool)
    for i, value in enumerate(values):
        try:
            texts.append(None if value is None else value.decode("utf-8"))
        except UnicodeDecodeError:
            texts.append(None)
            wrong[i] = True
    return strings(texts, large), wrong


def _messages_from_lists(batch: RowBatch, content: pa.Array, name: str) -> None:
    n = len(batch)
    if content.null_count:
        batch.flag(truths(content.is_null()), "content_null", "messages are null", name)
    lengths = whole_numbers(pc.list_value_length(content), null=0)
    np.cumsum(lengths, out=batch.starts[1:])
    batch.flag(lengths == 0, "content_empty", "the list of messages is empty", name)
    flat = content.flatten()
    names = [f.name for f in flat.type]
    if names.count("role") != 1 or names.count("content") != 1:
        batch.flag(lengths > 0, "message_keys", f"messages have {', '.join(names) or 'no fields'}", name)
        batch.starts[:] = 0
        return

    def rows_of(flags: Mask) -> Mask:
        hit = np.zeros(n, bool)
        hit[np.searchsorted(batch.starts, np.flatnonzero(flags), side="right") - 1] = True
        return hit

    if flat.null_count:
        batch.flag(rows_of(truths(flat.is_null())), "message_keys", "a message is null", name)
    roles, texts = _fields(flat)
    for array, field_name, reason in ((roles, "role", "message_keys"), (texts, "content", "message_type")):
        if not _texty(array.type):
            message = f"a message's {field_name} is {str(array.type)[:40]}"
            batch.flag(lengths > 0, reason, message, name)
            batch.starts[:] = 0
            return
    for array, field_name, reason in ((roles, "role", "message_keys"), (texts, "content", "message_type")):
        if array.null_count:
            batch.flag(rows_of(truths(array.is_null())), reason, f"a message's {field_name} is null", name)
    roles, wrong_roles = _as_text(roles)
    texts, wrong_texts = _as_text(texts)
    batch.roles, batch.texts = roles, texts
    for wrong in (wrong_roles, wrong_texts):
        if wrong is not None:
            batch.flag(rows_of(wrong), "content_utf8", "a message is not valid UTF-8", name)
    _flag_roles(batch, rows_of, name)


def _fields(flat: pa.StructArray) -> tuple[pa.Array, pa.Array]:
    """The role and content columns, dictionaries decoded; `flatten` puts a null struct's null into both."""
    columns = dict(zip((f.name for f in flat.type), flat.flatten(), strict=True))
    return _decoded(columns["role"]), _decoded(columns["content"])


def _texty(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind) or is_bytes(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind) or (
        pa.types.is_string_view(kind)
    )  # fmt: skip


def role_codes(roles: pa.Array) -> npt.NDArray[np.int64]:
    """Each role's place in ROLES, or len(ROLES)."""
    known = strings(ROLES, large=pa.types.is_large_string(roles.type))
    return whole_numbers(pc.index_in(roles, value_set=known), null=len(ROLES))


def _flag_roles(batch: RowBatch, rows_of: Callable[[Mask], Mask], name: str) -> None:
    codes = role_codes(batch.roles)
    unknown = codes == len(ROLES)
    if unknown.any():
        hit = rows_of(unknown)

        def message(i: int) -> str:
            span = batch.roles.slice(batch.starts[i], batch.starts[i + 1] - batch.starts[i]).to_pylist()
            odd = next((r for r in span if r not in ROLES), None)
            return f"unknown role {excerpt(odd)!r}"

        batch.flag(hit, "role_unknown", message, name)
    ends = batch.starts[1:] - 1
    filled = batch.starts[1:] > batch.starts[:-1]
    if len(codes):
        ends_wrong = (codes[np.where(filled, ends, 0)] == ROLES.index("assistant")) & filled
        batch.flag(ends_wrong, "last_is_assistant", "the last turn is the assistant's", name)


def _messages_from_json(batch: RowBatch, content: pa.Array, name: str) -> None:
    """A column of JSON strings: parsed, then the same checks as Python values."""
    texts, wrong = _as_text(content)
    if wrong is not None:
        batch.flag(wrong, "content_utf8", "the messages are not valid UTF-8", name)
    values = texts.to_pylist()
    if wrong is not None:
        values = [_SKIP if wrong[i] else value for i, value in enumerate(values)]
    _messages_from_python(batch, values, name)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return JsonFault(f"messages are not valid JSON ({str(error)[:60]})")


def _messages_from_python(batch: RowBatch, values: Sequence[Any], name: str) -> None:
    roles: list[str] = []
    texts: list[str] = []
    for i, value in enumerate(values):
        if isinstance(value, str):  # a JSON string is as good as the list itself
            value = _parse(value)
        fault = _message_fault(value)
        if fault is None:
            roles += [m["role"] for m in value]
            texts += [m["content"] for m in value]
        elif fault[0]:
            shown = "" if isinstance(value, JsonFault) else excerpt(value)
            batch.findings.append(batch.finding(i, fault[0], fault[1], name, shown))
            batch.bad[i] = True
        batch.starts[i + 1] = len(roles)
    batch.roles, batch.texts = strings(roles), strings(texts)


def _message_fault(value: Any) -> tuple[str, str] | None:
    """Why a Python value is not a list of messages, as (reason, message); None if it is one."""
    if value is _SKIP:
        return "", ""
    if value is None:
        return "content_null", "messages are null"
    if isinstance(value, JsonFault):
        return ("content_utf8" if value.utf8 else "content_json"), value.message
    if not isinstance(value, list):
        return "content_type", f"messages are a {type(value).__name__}, not a list"
    if not value:
        return "content_empty", "the list of messages is empty"
    for message in value:
        if not isinstance(message, dict) or message.get("role") is None or "content" not in message:
            return "message_keys", "a message has no role or no content"
        text, role = message["content"], message["role"]
        if not isinstance(text, str):
            return "message_type", f"a message's content is {'null' if text is None else type(text).__name__}"
        if not isinstance(role, str) or role not in ROLES:
            return "role_unknown", f"unknown role {excerpt(role)!r}"
        if not _encodable(text):
            return "content_utf8", "a message holds half a surrogate pair, which UTF-8 cannot"
    if value[-1]["role"] == "assistant":
        return "last_is_assistant", "the last turn is the assistant's"
    return None


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _teacher_from_python(batch: RowBatch, values: Sequence[Any], name: str) -> None:
    texts: list[str | None] = []
    for i, value in enumerate(values):
        reason = message = ""
        if isinstance(value, JsonFault):  # reported with the content: the line as a whole is no JSON
            texts.append(None)
            continue
        if value is None:
            reason, message = "teacher_null", "teacher's answer is null"
        elif not isinstance(value, str):
            reason, message = "teacher_type", f"teacher's answer is a {type(value).__name__}"
        elif not value.strip():
            reason, message = "teacher_blank", "teacher's answer is empty or blank"
        elif not _encodable(value):
            reason, message = "teacher_utf8", "teacher's answer holds half a surrogate pair"
        if reason:
            batch.findings.append(batch.finding(i, reason, message, name, excerpt(value)))
        batch.bad[i] |= bool(reason)
        texts.append(None if reason else value)
    batch.teachers = strings(texts)


def _teacher_from_arrow(batch: RowBatch, values: pa.Array, name: str) -> None:
    texts, wrong = _as_text(values)
    known = batch.bad.copy()
    batch.bad[:] = False  # so that a row with two faults gets two findings
    if values.null_count:
        batch.flag(truths(values.is_null()), "teacher_null", "teacher's answer is null", name)
    if wrong is not None:
        raw = _plain(values).cast(pa.large_binary()).to_pylist()
        batch.flag(wrong, "teacher_utf8", "teacher's answer is not valid UTF-8", name, lambda i: excerpt(raw[i]))
    blank = truths(pc.utf8_is_space(texts)) | (whole_numbers(pc.binary_length(texts), null=1) == 0)
    batch.flag(blank, "teacher_blank", "teacher's answer is empty or blank", name)
    batch.teachers = texts
    batch.bad |= known
