"""The judge against a real server of ours on the loopback: swapped orders, counting, caching, resuming, the key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluate.judge_server import JudgeServer, Reply
from gadcli.endpoint import client
from gadcli.endpoint.client import ChatEndpoint
from gadcli.errors import ConfigError, DataError
from gadcli.evaluate.judge import JudgeResult, Pair, judge_endpoint, parse_verdict
from gadcli.evaluate.judge import judge as run_judge

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("GAD_JUDGE_API_KEY", KEY)
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.001)  # no long waits between attempts
    running = JudgeServer()
    yield running
    running.close()


def judge(pairs: list[Pair], url: str, model: str, cache: Path, workers: int = 8) -> JudgeResult:
    return run_judge(pairs, judge_endpoint(url, model, 512), cache, workers=workers)


def letters(quality: dict[str, int]) -> Reply:
    """A judge without position bias."""
    return lambda a, b: "[[C]]" if quality[a] == quality[b] else "[[A]]" if quality[a] > quality[b] else "[[B]]"


PAIRS = [Pair("q1", "good long answer", "bad"), Pair("q2", "bad", "good long answer"), Pair("q3", "same", "same!")]


def test_each_pair_is_asked_in_both_orders_and_counted_once(server: JudgeServer, tmp_path: Path) -> None:
    server.reply = letters({"good long answer": 2, "bad": 1, "same": 0, "same!": 0})
    result = judge(PAIRS, server.url, "judge-1", tmp_path / "cache.jsonl")
    assert len(server.requests) == 6
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    assert {request["temperature"] for request in server.requests} == {0}
    assert (result.wins, result.ties, result.losses, result.flipped, result.unparsed) == (1, 1, 1, 0, 0)
    assert result.win_rate == pytest.approx(0.5)  # (1 + 1/2 + 0) / 3
    assert result.first_share == pytest.approx(0.5)  # two decided pairs, each once first and once second
    assert result.longer_share == 1.0  # both decided pairs went to the longer text
    assert result.answer_chars == pytest.approx((16 + 3 + 4) / 3)


def test_a_judge_that_always_takes_the_first_answer_decides_nothing(server: JudgeServer, tmp_path: Path) -> None:
    server.reply = lambda a, b: "[[A]]"
    result = judge(PAIRS, server.url, "judge-1", tmp_path / "cache.jsonl")
    assert (result.wins, result.ties, result.losses, result.flipped) == (0, 3, 0, 3)
    assert result.win_rate == 0.5
    assert result.first_share == 1.0
    assert result.longer_share is None


def test_replies_without_a_verdict_are_counted_and_asked_again_next_time(server: JudgeServer, tmp_path: Path) -> None:
    server.reply = lambda a, b: "cannot say" if "same" in a else "[[A]]"
    result = judge(PAIRS, server.url, "judge-1", tmp_path / "cache.jsonl")
    assert result.unparsed == 1
    assert result.wins + result.ties + result.losses == 2
    server.requests.clear()
    again = judge(PAIRS, server.url, "judge-1", tmp_path / "cache.jsonl")
    assert (len(server.requests), again.asked, again.cached) == (2, 2, 4)


def test_a_repeated_evaluation_asks_nothing_and_gives_the_same(server: JudgeServer, tmp_path: Path) -> None:
    server.reply = letters({"good long answer": 2, "bad": 1, "same": 0, "same!": 0})
    first = judge(PAIRS, server.url, "judge-1", tmp_path / "cache.jsonl")
    server.requests.clear()
    second = judge(PAIRS, server.url, "judge-1", tmp_path / "cache.jsonl")
    assert server.requests == []
    assert second.to_json() | {"asked": 6, "cached": 0} == first.to_json()
    judge(PAIRS, server.url, "judge-2", tmp_path / "cache.jsonl")
    assert len(server.requests) == 6  # another judge's verdicts are others


def test_an_interrupted_evaluation_goes_on_where_it_stopped(server: JudgeServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    server.reply = lambda a, b: "[[A]]"
    judge(PAIRS[:2], server.url, "judge-1", cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole + b'{"key": "half a li')  # killed while writing
    server.requests.clear()
    result = judge(PAIRS, server.url, "judge-1", cache)
    assert (len(server.requests), result.cached) == (2, 4)
    assert len(cache.read_bytes().splitlines()) == 6


def test_a_refusal_ends_at_once_and_keeps_what_was_decided(server: JudgeServer, tmp_path: Path) -> None:
    server.failures = [401]
    with pytest.raises(DataError) as caught:
        judge(PAIRS, server.url, "judge-1", tmp_path / "cache.jsonl", workers=1)
    assert "401" in caught.value.message
    assert caught.value.hint == "check the key in GAD_JUDGE_API_KEY"


def test_a_busy_server_is_asked_again(server: JudgeServer, tmp_path: Path) -> None:
    server.failures = [429, 503, 500]
    result = judge(PAIRS[:1], server.url, "judge-1", tmp_path / "cache.jsonl", workers=1)
    assert result.ties == 1
    assert len(server.requests) == 2 + 3


def test_a_server_that_stays_busy_is_given_up(server: JudgeServer, tmp_path: Path) -> None:
    server.failures = [503] * 100
    with pytest.raises(DataError, match="503"):
        judge(PAIRS[:1], server.url, "judge-1", tmp_path / "cache.jsonl", workers=1)
    assert len(server.requests) == 2 * (1 + 6)  # both orders, each with 6 retries


def test_an_unreachable_server_is_an_error_with_its_address(server: JudgeServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9"):
        judge(PAIRS[:1], "http://127.0.0.1:9/v1", "judge-1", tmp_path / "cache.jsonl", workers=1)


def test_the_key_reaches_the_server_and_nothing_else(
    server: JudgeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = judge(PAIRS, server.url, "judge-1", tmp_path / "cache.jsonl")
    assert set(server.keys) == {f"Bearer {KEY}"}
    server.failures = [400, 400]  # this server quotes the key in its error
    with pytest.raises(DataError) as caught:
        judge([Pair("new", "x", "y")], server.url, "judge-1", tmp_path / "cache.jsonl")
    endpoint = judge_endpoint(server.url, "m", 512)
    seen = [str(caught.value), repr(caught.value), str(caught.value.hint), repr(endpoint), json.dumps(result.to_json())]
    seen += [(tmp_path / "cache.jsonl").read_text(), *capfd.readouterr()]
    assert all(KEY not in text for text in seen)
    assert "***" in caught.value.message


def test_a_redirect_does_not_carry_the_key_elsewhere(server: JudgeServer, tmp_path: Path) -> None:
    elsewhere = JudgeServer()
    server.failures, server.location = [307], elsewhere.url + "/chat/completions"
    with pytest.raises(DataError, match="307"):
        judge(PAIRS[:1], server.url, "judge-1", tmp_path / "cache.jsonl", workers=1)
    assert elsewhere.requests == []
    elsewhere.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/v1", "not an http"),
        ("host/v1", "not an http"),
        ("https://user:secret@host/v1", "password"),
        ("http://example.com/v1", "clear text"),
        ("https://host/v1?key=secret", "query"),
    ],
)
def test_addresses_that_would_leak_are_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ChatEndpoint(url, "m", KEY)
    assert "secret" not in caught.value.message.replace("a secret", "")


def test_a_damaged_cache_is_an_error_and_not_overwritten(server: JudgeServer, tmp_path: Path) -> None:
    cache = tmp_path / "notes.txt"
    cache.write_text("my notes\n")
    with pytest.raises(DataError, match=r"notes\.txt:1"):
        judge(PAIRS, server.url, "judge-1", cache)
    assert cache.read_text() == "my notes\n"


def test_the_last_verdict_of_a_reply_counts() -> None:
    assert parse_verdict("At first [[A]], but no: [[B]]") == "B"
    assert parse_verdict("equal [[C]].") == "C"
    assert parse_verdict("A is better") == ""


def test_judges_that_think_or_answer_in_parts_are_understood(server: JudgeServer, tmp_path: Path) -> None:
    forms: list[dict[str, Any]] = [
        {"content": [{"type": "text", "text": "clear: [[ a ]]"}]},
        {"content": None, "reasoning_content": "[[B]] at first, but in the end [[A]]"},
        {"content": "[[A]]", "reasoning": "[[B]] looks good too"},
    ]
    for number, form in enumerate(forms):
        server.message = lambda verdict, form=form: form
        result = judge(PAIRS[:1], server.url, f"judge-{number}", tmp_path / "cache.jsonl")
        assert (result.unparsed, result.flipped) == (0, 1)  # A in both orders


def test_a_judge_that_only_thinks_until_it_is_cut_off_is_an_error_that_says_so(
    server: JudgeServer, tmp_path: Path
) -> None:
    server.message, server.finish = lambda _: {"content": None, "reasoning_content": "maybe [[A]], or"}, "length"
    with pytest.raises(DataError, match="2 replies were cut off") as caught:
        judge(PAIRS[:1], server.url, "judge-1", tmp_path / "cache.jsonl")
    assert "--judge-max-tokens" in str(caught.value.hint)


def test_one_rejected_pair_does_not_end_an_evaluation(server: JudgeServer, tmp_path: Path) -> None:
    server.failures = [200, 400]
    result = judge(PAIRS, server.url, "judge-1", tmp_path / "cache.jsonl", workers=1)
    assert (result.unparsed, result.ties) == (1, 2)
