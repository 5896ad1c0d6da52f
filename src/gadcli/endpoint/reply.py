"""What a chat endpoint sent back, read without trust in its shape: servers differ in all but the outline."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

# All but failed ones are journalled; a failed request is sent again next time.
STATUSES = ("ok", "refused", "truncated", "empty", "tool_call", "rejected", "failed")
# finish_reason as servers of several makers spell it, in lower case.
TRUNCATED = ("length", "max_tokens", "max_output_tokens", "model_length")
FILTERED = ("content_filter", "safety", "refusal", "prohibited_content", "blocklist", "recitation")
TOOL_CALLS = ("tool_calls", "tool_use", "function_call")
BROKEN_OFF = ("error", "abort", "cancelled")
# How models open a refusal in the text itself; the API's own marks (refusal, content_filter) come first.
REFUSAL = re.compile(
    r"^\s*((I['’]?m|I am) sorry[,.]? (but )?|Sorry[,.]? (but )?|Unfortunately,? )?"
    r"(I (can['’]?t|cannot|am unable to|am not able to|won['’]?t|will not)|I['’]m (unable|not able) to) "
    r"(help|assist|comply|fulfil|provide|answer|create|generate|write|produce"
    r"|discuss|engage|support|share|do (that|this|so))\b"
    r"(?! but)|^\s*(很?抱歉|对不起)，我(无法|不能)",
    re.IGNORECASE,
)
# A text that opens so but goes on to answer is not a refusal: "I can't write to files, but here is the code: …"
ANSWERS_ALL_THE_SAME = re.compile(r"\bhere(['’]s| is| are)\b|```|以下是|如下", re.IGNORECASE)
END_MARKER = re.compile(r"(<\|[\w-]+\|>|<｜[^｜\s]+｜>|</s>|<end_of_turn>|<eos>)\s*$")
PART_TYPES = {
    "text": "text", "output_text": "text", "thinking": "reasoning", "reasoning": "reasoning", "refusal": "refusal",
}  # fmt: skip


class ReplyError(ValueError):
    """Not an answer. `status` is the HTTP status that an error inside the reply names (0: none)."""

    def __init__(self, message: str, status: int = 0, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Reply:
    """One answer. `text` and `reasoning` are valid Unicode; `tokens` are as the endpoint counts them (0: not told)."""

    status: str
    text: str
    reasoning: str = ""
    finish_reason: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


def read_reply(body: bytes) -> Reply:
    """The answer in the body of a 200: a chat completion, or a stream of its chunks that nobody asked for.

    Raises ReplyError for anything else: an error object, a web page, a body cut off.
    """
    text = body.decode("utf-8-sig", "replace").strip()
    answer = _joined_stream(text) if text.startswith(("data:", "event:", ":")) else _json(text)
    if error := answer.get("error"):
        raise _error_inside(error)
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(choice, dict) and choice.get("error"):
        raise _error_inside(choice["error"])
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise ReplyError(f"not a chat completion: {_excerpt(text)}")
    return _reply(answer, choice, message)


def _reply(answer: dict[str, Any], choice: dict[str, Any], message: dict[str, Any]) -> Reply:
    text, thoughts, refusal = _parts(message.get("content"))
    reasoning = thoughts or _text(message.get("reasoning_content") or message.get("reasoning"))
    refusal = refusal or _text(message.get("refusal"))
    finish = str(choice.get("finish_reason") or "")
    if finish.lower() in BROKEN_OFF:
        raise ReplyError(f"the answer was broken off (finish_reason {finish})")
    if finish.lower() in TRUNCATED:
        status = "truncated"
    elif refusal or finish.lower() in FILTERED or is_refusal(text):
        status = "refused"
    elif message.get("tool_calls") or message.get("function_call") or finish.lower() in TOOL_CALLS:
        status = "tool_call"
    else:
        status = "ok" if text.strip() else "empty"
    usage = answer.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    prompt_tokens, completion_tokens = (int(n) if isinstance(n, (int, float)) else 0 for n in counts)
    return Reply(
        status, _valid(text or refusal), _valid(reasoning), finish, str(answer.get("model") or ""), prompt_tokens,
        completion_tokens,
    )  # fmt: skip


def is_refusal(text: str) -> bool:
    """Whether a text opens like a refusal and does not answer after that."""
    return bool(REFUSAL.match(text)) and not ANSWERS_ALL_THE_SAME.search(text)


def oddities(reply: Reply) -> list[str]:
    """What someone who trains on the text should know; the text itself stays as it came."""
    found = []
    if "\ufffd" in reply.text:
        found.append("hold a character that was cut in two (now U+FFFD)")
    if END_MARKER.search(reply.text):
        found.append("end with the spelling of an end token, such as <|im_end|> (gad data check -t MODEL)")
    if reply.text.strip() and reply.text.strip("\r\n") != reply.text:
        found.append("begin or end with empty lines")
    return found


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        page = text[:200].lower().lstrip().startswith(("<!doctype", "<html"))
        what = "a web page instead of JSON; is the address right (…/v1)?" if page else "the reply is not JSON:"
        raise ReplyError(f"{what} {_excerpt(re.sub(r'<[^>]*>', ' ', text) if page else text)}") from None
    if not isinstance(value, dict):
        raise ReplyError(f"not a chat completion: {_excerpt(text)}")
    return value


def _joined_stream(text: str) -> dict[str, Any]:
    """One completion of the chunks of a server-sent event stream. Raises ReplyError if its end is missing."""
    lines = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    chunks = [_json(line) for line in lines if line and line != "[DONE]"]
    whole: dict[str, Any] = {}
    message = {"content": "", "reasoning_content": "", "refusal": ""}
    finish, tools = "", False
    for chunk in chunks:
        whole |= {name: chunk[name] for name in ("error", "model", "usage") if chunk.get(name)}
        for choice in (chunk.get("choices") or [])[:1]:
            delta = choice.get("delta") or {}
            content, thoughts, refusal = _parts(delta.get("content"))
            message["content"] += content
            message["reasoning_content"] += thoughts or _text(delta.get("reasoning_content") or delta.get("reasoning"))
            message["refusal"] += refusal or _text(delta.get("refusal"))
            tools = tools or bool(delta.get("tool_calls"))
            finish = choice.get("finish_reason") or finish
    if not finish and "[DONE]" not in lines and "error" not in whole:
        raise ReplyError("the stream ended before its answer")
    return {**whole, "choices": [{"message": {**message, "tool_calls": tools}, "finish_reason": finish}]}


def _parts(content: Any) -> tuple[str, str, str]:
    """Text, reasoning and refusal in a message's content: a string, null, or a list of typed parts."""
    if content is None or isinstance(content, str):
        return content or "", "", ""
    found = {"text": "", "reasoning": "", "refusal": ""}
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            found["text"] += part
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind not in PART_TYPES:
            raise ReplyError(f"the answer holds a part of type {kind!r}, which is not text")
        found[PART_TYPES[kind]] += _text(part.get(kind, part.get("text")))
    return found["text"], found["reasoning"], found["refusal"]


def _text(content: Any) -> str:
    return _parts(content)[0]


def _error_inside(error: Any) -> ReplyError:
    """Of an error object in a reply whose HTTP status says that all is well."""
    if not isinstance(error, dict):
        return ReplyError(str(error))
    code = error.get("code") or error.get("status") or ""
    status = int(code) if str(code).isdigit() and 400 <= int(code) < 600 else 0
    return ReplyError(str(error.get("message") or error), status, str(code or error.get("type") or ""))


def _valid(text: str) -> str:
    """Halves of surrogate pairs, which JSON can hold and UTF-8 cannot, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _excerpt(text: str) -> str:
    return repr(" ".join(text.split())[:80])
