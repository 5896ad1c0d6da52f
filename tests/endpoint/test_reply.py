"""What endpoints send back, in the shapes that servers of several makers have."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest

from gadcli.endpoint import reply
from gadcli.endpoint.reply import Reply, ReplyError, is_refusal, oddities, read_reply
from mutants import mutated


def completion(message: dict[str, Any], finish: Any = "stop", **more: Any) -> bytes:
    return json.dumps({"model": "m", "choices": [{"message": message, "finish_reason": finish}], **more}).encode()


@pytest.mark.parametrize(
    ("content", "text", "reasoning"),
    [
        ("plain", "plain", ""),
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two", ""),
        ([{"type": "output_text", "text": "one"}], "one", ""),
        (["one ", "two"], "one two", ""),
        ({"type": "text", "text": "alone"}, "alone", ""),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, "yes"], "yes", "hm"),
    ],
)  # fmt: skip
def test_content_is_a_string_or_a_list_of_parts(content: Any, text: str, reasoning: str) -> None:
    assert read_reply(completion({"content": content})) == Reply("ok", text, reasoning, "stop", "m")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_kept_apart_from_the_text(name: str) -> None:
    found = read_reply(completion({"content": "It is 3", name: "First I think."}, usage={"prompt_tokens": 5}))
    assert (found.status, found.text, found.reasoning, found.prompt_tokens) == ("ok", "It is 3", "First I think.", 5)


@pytest.mark.parametrize(
    ("message", "finish", "status"),
    [
        ({"content": None, "reasoning_content": "I thought until the end"}, "length", "truncated"),
        ({"content": "half an ans"}, "max_tokens", "truncated"),
        ({"content": "", "reasoning_content": "I thought, and stopped"}, "stop", "empty"),
        ({"content": " \n"}, None, "empty"),
        ({"content": "a", "refusal": "I will not"}, "stop", "refused"),
        ({"content": [{"type": "refusal", "refusal": "I will not"}]}, "stop", "refused"),
        ({"content": "half"}, "content_filter", "refused"),
        ({"content": None}, "SAFETY", "refused"),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls", "tool_call"),
        ({"content": "Let me look.", "tool_calls": [{"id": "1"}]}, "stop", "tool_call"),
        ({"content": "It is 3", "tool_calls": []}, None, "ok"),
    ],
)
def test_each_way_to_end_has_its_status(message: dict[str, Any], finish: Any, status: str) -> None:
    assert read_reply(completion(message, finish)).status == status


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, I cannot assist with this request.", True),
        ("I am unable to provide that information.", True),
        ("很抱歉，我无法回答", True),
        ("I'm sorry, but I can't open attachments; here is what the text says: it is 3.", False),
        ("I can't help but admire the proof: it is short.", False),
        ("I cannot write to files, but here is the code:\n```python\nx = 3\n```", False),
        ("I'm sorry to hear that. Try restarting it.", False),
        ("Sorry is what the function returns.", False),
        ("Sorry, I won't do that.", True),
        ("I can't do long division in my head, so step by step.", False),
    ],
)
def test_an_apology_is_not_a_refusal(text: str, refused: bool) -> None:
    assert is_refusal(text) == refused


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"error": {"message": "Provider returned error", "code": 502}}, 502, "Provider returned error"),
        ({"choices": None, "error": {"message": "quota"}}, 0, "quota"),
        ({"error": "overloaded"}, 0, "overloaded"),
        ({"choices": [{"error": {"message": "no", "code": 429}, "message": {"content": ""}}]}, 429, "no"),
        ({"choices": [{"message": {"content": "par"}, "finish_reason": "error"}]}, 0, "broken off"),
        ({"choices": []}, 0, "not a chat completion"),
        ({"choices": [{"message": None}]}, 0, "not a chat completion"),
        ({"choices": [{"message": {"content": [{"type": "image_url"}]}}]}, 0, "image_url"),
        ([], 0, "not a chat completion"),
    ],
)
def test_an_error_inside_a_200_is_an_error(body: Any, status: int, said: str) -> None:
    with pytest.raises(ReplyError, match=said) as caught:
        read_reply(json.dumps(body).encode())
    assert caught.value.status == status


def test_a_web_page_is_named_as_one() -> None:
    with pytest.raises(ReplyError, match=r"web page.*…/v1.*Sign in"):
        read_reply(b"<html><body>Sign in to the network</body></html>")


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return (
        b"data: "
        + json.dumps({"model": "m", "choices": [{"delta": delta, "finish_reason": finish}]}).encode()
        + b"\n\n"
    )


def test_a_stream_nobody_asked_for_is_joined() -> None:
    body = b": ping\n\n" + chunk({"role": "assistant", "reasoning_content": "hm"}) + chunk({"content": "It "})
    whole = body + chunk({"content": "is 3"}, "stop") + b"data: [DONE]\n\n"
    assert read_reply(whole) == Reply("ok", "It is 3", "hm", "stop", "m")
    with pytest.raises(ReplyError, match="ended before"):
        read_reply(body)  # cut off: half an answer is none


def test_half_a_character_becomes_the_replacement_character_and_is_counted() -> None:
    body = b'{"choices": [{"message": {"content": "bad \\ud83d half"}, "finish_reason": "stop"}]}'
    found = read_reply(body)
    assert found.text == "bad � half"
    assert found.text.encode()
    assert ["cut in two" in line for line in oddities(found)] == [True]
    whole = read_reply(b'{"choices": [{"message": {"content": "\\ud83d\\ude00"}, "finish_reason": "stop"}]}')
    assert (whole.text, oddities(whole)) == ("😀", [])


@pytest.mark.parametrize(
    ("text", "said"),
    [("It is 3<|im_end|>", "end token"), ("It is 3</s>\n", "end token"), ("\n\nIt is 3", "empty lines"),
     ("  indented", ""), ("a <|im_end|> b", "")],
)  # fmt: skip
def test_text_that_would_teach_something_odd_is_noted_and_kept(text: str, said: str) -> None:
    found = read_reply(completion({"content": text}))
    assert found.text == text
    assert bool(oddities(found)) == bool(said)
    assert said in " ".join(oddities(found))


def check_statuses(module: ModuleType) -> None:
    """One case per rule that the mutants below break."""
    statuses = {
        text: module.read_reply(completion({"content": text})).status
        for text in ("yes", "", "I can't help with that.", "I can't write files; here is the code: x = 3")
    }
    assert list(statuses.values()) == ["ok", "empty", "refused", "ok"]
    assert module.read_reply(completion({"content": "half"}, "length")).status == "truncated"
    assert module.read_reply(completion({"content": "Let me look", "tool_calls": [{}]})).status == "tool_call"
    assert module.read_reply(completion({"content": "a", "reasoning": "b"})).reasoning == "b"
    with pytest.raises(module.ReplyError):
        module.read_reply(chunk({"content": "It "}))
    assert module.read_reply(b'{"choices": [{"message": {"content": "\\ud83d"}}]}').text == "\ufffd"


def test_the_statuses_hold() -> None:
    check_statuses(reply)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"ok" if text.strip() else "empty"', '"ok"'),
        ("bool(REFUSAL.match(text)) and not ANSWERS_ALL_THE_SAME.search(text)", "bool(REFUSAL.match(text))"),
        ("if finish.lower() in TRUNCATED:", "if False:"),
        ('message.get("tool_calls") or message.get("function_call")', "False"),
        ('thoughts or _text(message.get("reasoning_content") or message.get("reasoning"))', "thoughts"),
        ('if not finish and "[DONE]" not in lines and "error" not in whole:', "if False:"),
        ('.encode("utf-16", "surrogatepass").decode("utf-16", "replace")', ""),
    ],
)
def test_each_broken_rule_is_seen(old: str, new: str) -> None:
    mutant = mutated("endpoint.reply", old, new)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_statuses(mutant)
