"""How others lay out rows: one table of formats, each known by its columns (torch-free).

A format turns a record (column → value) into what `rows` takes: messages, and the answer or answers to them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

PROMPT_KEY, RESPONSE_KEY = "content", "teacher_response"  # the defaults of data.prompt_key and data.response_key
Record = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """Stands where a value could not be read: a reason of `findings`, what is wrong, which of several answers it was,
    and the text of a line that is no record."""

    reason: str
    message: str
    index: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Format:
    """`prompt` and `answer` name the columns that findings speak of; `columns` are all that `read` looks at.

    `answer` is empty where only prompts are wanted. `note` says what was guessed.
    """

    prompt: str
    answer: str
    columns: tuple[str, ...]
    read: Callable[[Record], tuple[Any, Any]]
    note: str = ""


def parse_json(text: str | bytes, what: str, subject: str) -> Any:
    """The JSON value of a text, or a Fault of reason `<what>_json` or `<what>_utf8`."""
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        return Fault(f"{what}_utf8", f"{subject} not valid UTF-8")
    except (ValueError, RecursionError) as error:
        return Fault(f"{what}_json", f"{subject} not valid JSON ({str(error)[:60]})")


# ---- one function for each layout of a row ----


def _pair(prompt: str, answer: str, note: str = "") -> Format:
    """Messages, their JSON, or plain text in one column and the answer in another."""

    def read(record: Record) -> tuple[Any, Any]:
        return record.get(prompt), record.get(answer)

    return Format(prompt, answer, (prompt, answer, "tools"), read, note)


SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "observation": "tool", "function_call": "assistant",
}  # fmt: skip


def _turn(turn: Any) -> Any:
    """ShareGPT's {from, value} as {role, content}."""
    if not isinstance(turn, dict) or turn.get("from") is None or turn.get("role") is not None:
        return turn
    role, value = turn["from"], turn.get("value")
    if role == "function_call":
        call = parse_json(value, "content", "a function call is") if isinstance(value, str) else value
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    return {"role": SHAREGPT_ROLES.get(role, role), "content": value}


def _conversation(column: str, note: str = "") -> Format:
    """A whole conversation: its last turn is the answer to those before."""

    def read(record: Record) -> tuple[Any, Any]:
        turns = record.get(column)
        if isinstance(turns, (str, bytes)):
            turns = parse_json(turns, "content", "messages are")
        if not isinstance(turns, list):
            return turns, Fault("teacher_null", "there is no answer")
        turns = [_turn(turn) for turn in turns]
        if (system := record.get("system")) and isinstance(system, str):
            turns.insert(0, {"role": "system", "content": system})
        last = turns[-1] if turns else None
        if isinstance(last, dict) and last.get("role") == "assistant":
            return turns[:-1], last
        return turns, Fault("teacher_null", "the conversation does not end with the assistant's turn")

    return Format(column, column, (column, "system", "tools"), read, note)


def _alpaca(answer: str) -> Format:
    def read(record: Record) -> tuple[Any, Any]:
        asked = [record.get(name) for name in ("instruction", "input", "context")]
        if odd := next((v for v in asked if v is not None and not isinstance(v, str)), None):
            return Fault("content_type", f"instruction and input are text, not a {type(odd).__name__}"), None
        messages = [{"role": "user", "content": "\n".join(v for v in asked if v and not v.isspace())}]
        for question, reply in reversed(record.get("history") or []):
            messages[:0] = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        if system := record.get("system"):
            messages.insert(0, {"role": "system", "content": system})
        return messages, record.get(answer)

    columns = ("instruction", "input", "context", "history", "system", "tools", answer)
    note = f"read as Alpaca: instruction and input are the prompt, {answer} is the answer"
    return Format("instruction", answer, columns, read, note)


def _named(name: str, prompt: str, answer: str) -> Format:
    return _pair(prompt, answer, f"read as {name}: {prompt} is the prompt, {answer} is the answer")


# In the order they are tried, when the configured columns are not there.
FORMATS = (
    _named("verl", "prompt", RESPONSE_KEY),
    _named("chat messages", "messages", RESPONSE_KEY),
    _conversation("messages", "read as chat messages: the last turn of `messages` is the answer"),
    _conversation("conversations", "read as ShareGPT: the last turn of `conversations` is the answer"),
    _alpaca("output"),
    _alpaca("response"),
    _named("prompt-completion", "prompt", "completion"),
    _named("prompt-response", "prompt", "response"),
    _named("question-answer", "question", "answer"),
)


def choose_format(columns: Collection[str], prompt_key: str, response_key: str | None) -> Format | None:
    """The configured columns if they are there, else the first format whose columns are; None if nothing fits.

    A column that was asked for by another name than the default is never replaced by a guess. One name for both is
    a conversation that ends with the answer. Without a `response_key`, only prompts are looked for.
    """
    if response_key is None:
        form = choose_format({*columns, RESPONSE_KEY}, prompt_key, RESPONSE_KEY)
        return form and replace(form, answer="", note=form.note and f"prompts are read from {form.prompt}")
    if prompt_key in columns and response_key in columns:
        return _conversation(prompt_key) if prompt_key == response_key else _pair(prompt_key, response_key)
    if prompt_key == PROMPT_KEY in columns:  # the answers' column is missing, most likely misspelt
        return None
    for form in FORMATS:
        asked = prompt_key in (PROMPT_KEY, form.prompt) and response_key in (RESPONSE_KEY, form.answer)
        if asked and form.prompt in columns and form.answer in columns:
            return form
    return None


def is_plain_text(text: str) -> bool:
    """Whether a prompt is the user's own words: neither a JSON list of messages nor an attempt at one."""
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        return True
    value = parse_json(text, "content", "")
    if isinstance(value, Fault):
        return re.match(r"\s*\[\s*\{", text) is None
    first = value[0] if isinstance(value, list) and value else value
    return not (first == [] or isinstance(first, dict))
