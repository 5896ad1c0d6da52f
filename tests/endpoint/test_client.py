"""The client against a server of ours on loopback: parameters that are not taken, errors, proxies, addresses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gadcli.endpoint import client
from gadcli.endpoint.client import ChatClient, ChatEndpoint, NoAnswer, Rejected
from gadcli.endpoint.reply import Reply
from gadcli.errors import ConfigError, DataError
from teacher_server import Teacher

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def quick_and_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.001)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


def ok(text: str = "fine") -> tuple[int, Any, dict[str, str]]:
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}, {}


def refuses(name: str, **error: Any) -> Any:
    """A model that answers 400 to every request with the parameter `name`."""
    return lambda body: (400, {"error": error}, {}) if name in body else ok()


def ask(server: Teacher, times: int = 1, **settings: Any) -> list[Reply]:
    async def run() -> list[Reply]:
        chat = ChatClient(ChatEndpoint(server.url, "m", **{"retries": 2, **settings}))
        try:
            return [await chat.ask([{"role": "user", "content": "hi"}]) for _ in range(times)]
        finally:
            await chat.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    "error",
    [
        {"message": "Unsupported parameter", "param": "max_tokens", "code": "unsupported_parameter"},
        {"message": "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."},
    ],
)
def test_a_model_that_takes_only_the_new_name_of_max_tokens_gets_it(error: dict[str, Any]) -> None:
    with Teacher(script=refuses("max_tokens", **error)) as server:
        assert [r.text for r in ask(server, times=2, params={"max_tokens": 64})] == ["fine", "fine"]
    sent = [{name: body[name] for name in body if "tokens" in name} for body in server.bodies]
    # learnt from the first answer, and not tried again
    assert sent == [{"max_tokens": 64}, {"max_completion_tokens": 64}, {"max_completion_tokens": 64}]


def test_an_optional_parameter_is_left_out_and_one_that_was_asked_for_is_an_error() -> None:
    message = "temperature does not support this value with this model"
    script = refuses("temperature", message=message, param="temperature", code="unsupported_value")
    with Teacher(script=script) as server:
        assert ask(server, params={"temperature": 0}, optional=("temperature",))[0].text == "fine"
        with pytest.raises(ConfigError, match="does not support") as caught:
            ask(server, params={"temperature": 0.7})
    assert caught.value.hint == "the model does not take temperature=0.7: leave it out"


def test_a_length_that_does_not_fit_is_not_taken_for_a_parameter_that_is_not_known() -> None:
    """vLLM names max_tokens where prompt and answer exceed the context: both names fail, the first error counts."""
    message = "'max_tokens' or 'max_completion_tokens' is too large: 64"
    with Teacher(script=lambda body: (400, {"error": {"message": message}}, {})) as server:
        with pytest.raises(Rejected, match="too large"):
            ask(server, params={"max_tokens": 64})
        server.script = lambda body: ok()
        ask(server, params={"max_tokens": 64})
    assert server.bodies[-1]["max_tokens"] == 64


def test_extra_fields_reach_the_request() -> None:
    with Teacher(script=lambda body: ok()) as server:
        ask(server, params={"chat_template_kwargs": {"enable_thinking": False}})
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("status", [402, 429])
def test_an_account_without_credit_is_not_asked_again(status: int) -> None:
    body = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    with Teacher(script=lambda _: (status, body, {})) as server, pytest.raises(DataError, match="no credit"):
        ask(server)
    assert len(server.bodies) == 1


def test_an_error_inside_a_200_counts_as_the_status_it_names() -> None:
    def inside(code: int) -> Any:
        return lambda body: (200, {"error": {"message": "Provider returned error", "code": code}}, {})

    with Teacher(script=inside(502)) as server:
        with pytest.raises(NoAnswer, match="502: Provider returned error"):
            ask(server)
        assert len(server.bodies) == 3
        server.script = inside(400)
        with pytest.raises(Rejected):
            ask(server)
        assert len(server.bodies) == 4


def test_azures_filter_is_a_refusal() -> None:
    body = {"error": {"message": "filtered", "code": "content_filter"}}
    with Teacher(script=lambda _: (400, body, {})) as server:
        assert ask(server)[0].status == "refused"


@pytest.mark.parametrize("date", ["2", "Wed, 21 Oct 2099 07:28:00 GMT", "soon", ""])
def test_the_wait_that_a_server_asks_for_is_kept_within_a_minute(date: str) -> None:
    wanted = {"2": 2.0, "soon": 0.0, "": 0.0}
    assert client._asked_wait({"retry-after": date}) == wanted.get(date, client.LONGEST_WAIT_S)


@pytest.fixture
def proxy() -> Iterator[Teacher]:
    """A plain HTTP proxy is asked with the whole address as its path: this server answers for everyone."""
    with Teacher(script=lambda body: (503, {"error": {"message": "from the proxy"}}, {})) as server:
        yield server


def test_loopback_is_never_asked_through_a_proxy(proxy: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    monkeypatch.setenv("ALL_PROXY", "ftp://not.usable:1")
    with Teacher(script=lambda body: ok()) as server:
        assert ask(server)[0].text == "fine"
    assert not proxy.bodies


def test_a_proxy_in_the_way_is_named_without_its_password(proxy: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1").replace("//", "//me:hunter2@"))
    there = Teacher()
    there.url = "http://teacher.internal:8000/v1"
    with pytest.raises(
        NoAnswer, match=r"through the proxy http://\*\*\*@127\.0\.0\.1:\d+\) answered 503: from the proxy"
    ):
        ask(there)
    assert len(proxy.bodies) == 3


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("HTTPS_PROXY", "ftp://me:hunter2@host:1", "not a proxy's address"),
        ("HTTPS_PROXY", "http://host:port", "not a proxy's address"),
        ("ALL_PROXY", "socks5://me:hunter2@host:1", "needs socksio"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_a_usage_error(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"{variable}.*{said}") as caught:
        ChatEndpoint("https://example.com/v1", "m")
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(("host", "fine"), [("10.0.0.5", True), ("gpu-7", True), ("8.8.8.8", False), ("a.org", False)])
def test_a_key_crosses_only_private_networks_in_clear_text(host: str, fine: bool) -> None:
    if fine:
        assert ChatEndpoint(f"http://{host}:8000/v1", "m", "sk-1").url
        return
    with pytest.raises(ConfigError, match="clear text"):
        ChatEndpoint(f"http://{host}:8000/v1", "m", "sk-1")


def test_an_unreachable_endpoint_is_named_with_the_reason() -> None:
    with pytest.raises(NoAnswer, match=r"http://127\.0\.0\.1:9/v1: .*(refused|attempts failed|connect)"):
        ask(type("Nobody", (), {"url": "http://127.0.0.1:9/v1"})())  # type: ignore[arg-type]
    assert threading.active_count() < 10
