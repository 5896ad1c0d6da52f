"""A client for OpenAI-compatible chat endpoints: retries, parameters that a model does not take, proxies, and a key
that reaches its endpoint and nothing else."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import random
import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import openai

from gadcli.endpoint.reply import Reply, ReplyError, read_reply
from gadcli.errors import ConfigError, DataError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
BUSY = (0, 408, 409, 425, 429)  # and 5xx: asked again; 0 stands for no answer at all
OTHER_NAMES = {"max_tokens": "max_completion_tokens"}  # newer models refuse the first and take the second
NOT_TAKEN = re.compile(r"unsupported|not support|unrecognized|unknown|not permitted|forbidden", re.IGNORECASE)
PRIVATE_NAMES = (".local", ".internal", ".svc", ".localhost")


class Rejected(Exception):
    """The endpoint will not answer this request, however often it is asked (400, 413, 422 …)."""


class NoAnswer(Exception):
    """No answer after all retries."""


@dataclass(frozen=True)
class ChatEndpoint:
    """One model behind `url` (as `https://host/v1`). The key is sent in a header and hidden from repr and errors.

    `params` go into every request; those in `optional` are left out for a model that does not take them. Raises
    ConfigError for an address that is no http(s) URL, holds a password, or would carry the key in clear text over a
    public network, and for proxy variables that cannot be used.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    key_variable: str = "the key's environment variable"
    params: dict[str, Any] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    retries: int = 6
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"the endpoint {self.shown} is not an http(s) address", "give one like https://host/v1")
        if parts.username or parts.password:
            raise ConfigError(
                f"{self.shown}: the endpoint's address holds a password", f"put the key into {self.key_variable}"
            )
        if parts.path.rstrip("/").endswith("/chat/completions"):
            raise ConfigError(f"{self.shown}: give the base address", self.shown.partition("/chat/completions")[0])
        if parts.query or parts.fragment:
            raise ConfigError(f"{parts.hostname}: the endpoint's address has a query", "give one like https://host/v1")
        if self.key and parts.scheme == "http" and not _is_private(parts.hostname):
            raise ConfigError(
                f"{parts.hostname}: the key would cross the network in clear text",
                f"use https, or unset {self.key_variable}",
            )
        if self.key != self.key.strip() or not self.key.isascii() or not self.key.isprintable():
            raise ConfigError(f"{self.key_variable} holds white space or other characters no key has", "set it again")
        self.proxy()

    @property
    def shown(self) -> str:
        """The address without user, password and query."""
        return re.sub(r"//[^/@]*@", "//***@", self.url.partition("?")[0])

    @property
    def local(self) -> bool:
        """On this machine: never reached through a proxy."""
        return _is_local(urlsplit(self.url).hostname or "")

    def proxy(self) -> str:
        """Where requests pass through on their way, by the proxy variables; "" for nowhere. Without its password."""
        if self.local:
            return ""
        parts, proxies = urlsplit(self.url), urllib.request.getproxies()
        for scheme, address in proxies.items():
            if scheme in ("http", "https", "all"):
                _check_proxy(f"{scheme.upper()}_PROXY", address)
        address = proxies.get(parts.scheme) or proxies.get("all") or ""
        if not address or urllib.request.proxy_bypass(parts.hostname or ""):
            return ""
        return re.sub(r"//[^/@]*@", "//***@", address if "//" in address else f"http://{address}")

    def hidden(self, text: str) -> str:
        """A server's words on one line, without the key: servers like to quote what they refuse."""
        if len(self.key) >= 4:
            text = text.replace(self.key, "***")
        text = re.sub(r"//[^/@\s]*@", "//***@", text)
        return re.sub(r"\b(sk|Bearer)[-_ ][\w*.-]{6,}", "***", " ".join(text.split()))[:200]


@dataclass
class _Failure:
    """A request that brought no answer: `status` 0 where there was no HTTP status."""

    status: int
    message: str
    code: str = ""
    param: str = ""
    wait_s: float = 0.0


class ChatClient:
    """Asks one endpoint. What it learns about the model's parameters holds for the requests that follow."""

    def __init__(self, endpoint: ChatEndpoint) -> None:
        self.endpoint = endpoint
        self.requests = self.retried = 0
        self._params = dict(endpoint.params)
        self._openai = openai.AsyncOpenAI(
            base_url=endpoint.url, api_key=endpoint.key or "none", max_retries=0, timeout=endpoint.timeout_s,
            # A redirect would carry the prompts to whatever address the answer names.
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=not endpoint.local),
        )  # fmt: skip

    async def close(self) -> None:
        await self._openai.close()

    async def ask(self, messages: list[dict[str, str]], on_failure: Callable[[str], None] = lambda _: None) -> Reply:
        """One answer. A busy or failing endpoint is asked again, ever more slowly; `on_failure` hears each failure.

        Raises Rejected if it refuses this request, NoAnswer if it stays out, ConfigError if it refuses the key, the
        address or the model, DataError if no more credit is left.
        """
        wait = FIRST_WAIT_S
        for attempt in range(self.endpoint.retries + 1):
            found = await self._ask_adapted(messages)
            if isinstance(found, Reply):
                return found
            reason = self._reason(found)
            on_failure(reason)
            if found.status == 402 or found.code in ("insufficient_quota", "billing_hard_limit_reached"):
                raise DataError(f"no credit is left: {reason}", "add credit, then run the same command to resume")
            if found.status not in BUSY and found.status < 500:
                self._raise_fatal(found, reason)
                raise Rejected(reason)
            if attempt < self.endpoint.retries:
                self.retried += 1
                await asyncio.sleep(found.wait_s or wait * random.uniform(0.5, 1.0))
                wait = min(2 * wait, LONGEST_WAIT_S)
        raise NoAnswer(reason)

    async def _ask_adapted(self, messages: list[dict[str, str]]) -> Reply | _Failure:
        """One request; again without or with another name for each parameter that the model refuses."""
        params, first = dict(self._params), None
        while True:
            found = await self._send(messages, params)
            if isinstance(found, Reply):
                self._params = params
                return found
            first = first or found
            name = self._refused_parameter(found, params)
            if name in OTHER_NAMES:
                params[OTHER_NAMES[name]] = params.pop(name)
            elif name in self.endpoint.optional:
                del params[name]
            else:
                return first if found.status in (400, 422) else found

    def _refused_parameter(self, failure: _Failure, params: dict[str, Any]) -> str:
        """Which of `params` a 400 or 422 speaks of ("" for none)."""
        if failure.status not in (400, 422):
            return ""
        if failure.param in params:
            return failure.param
        return next((name for name in params if re.search(rf"\b{name}\b", failure.message)), "")

    async def _send(self, messages: list[dict[str, str]], params: dict[str, Any]) -> Reply | _Failure:
        self.requests += 1
        try:
            raw = await self._openai.chat.completions.with_raw_response.create(
                model=self.endpoint.model, messages=messages, extra_body=params,  # type: ignore[arg-type]
            )  # fmt: skip
            return read_reply(raw.http_response.content)
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            code, param = (str(body.get(name) or "") for name in ("code", "param"))
            if code == "content_filter":  # Azure's mark for a prompt that it will not pass on
                return Reply("refused", "", finish_reason=code)
            page = re.sub(r"<[^>]*>", " ", error.response.text)
            message = str(body.get("message") or body or page.strip() or error.response.reason_phrase)
            return _Failure(error.status_code, message, code, param, _asked_wait(error.response.headers))
        except ReplyError as error:
            return _Failure(error.status, str(error), error.code)
        except openai.APIConnectionError as error:  # refused, timed out, cut off, an unknown name, a bad certificate
            cause = error.__cause__
            return _Failure(0, f"{type(cause).__name__}: {cause}" if cause and str(cause) else str(error))

    def _reason(self, failure: _Failure) -> str:
        proxy = self.endpoint.proxy()
        where = self.endpoint.shown + (f" (through the proxy {proxy})" if proxy else "")
        answered = f" answered {failure.status}" if failure.status else ""
        return f"{where}{answered}: {self.endpoint.hidden(failure.message)}"

    def _raise_fatal(self, failure: _Failure, reason: str) -> None:
        """For statuses that every other request would meet too."""
        if 300 <= failure.status < 400:
            raise ConfigError(reason, "the address redirects; give the one it redirects to")
        if failure.status in (401, 407):
            raise ConfigError(reason, f"check the key in {self.endpoint.key_variable}")
        if failure.status in (404, 405):
            raise ConfigError(reason, f"check the address (…/v1) and the model's name ({self.endpoint.model})")
        name = self._refused_parameter(failure, self._params)
        if name and NOT_TAKEN.search(f"{failure.code} {failure.message}"):
            raise ConfigError(reason, f"the model does not take {name}={self._params[name]}: leave it out")


def _asked_wait(headers: Any) -> float:
    """What Retry-After asks for, in seconds or as a date, at most LONGEST_WAIT_S; 0 without it."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT_S)


def _check_proxy(variable: str, address: str) -> None:
    """Raises ConfigError for a proxy that the HTTP library would not take."""
    shown = re.sub(r"//[^/@]*@", "//***@", address)
    try:
        parts = urlsplit(address if "//" in address else f"http://{address}")
        usable = parts.scheme in ("http", "https", "socks5", "socks5h") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{variable}={shown} is not a proxy's address", "set it to http://host:port, or unset it")
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise ConfigError(f"{variable}={shown} is a SOCKS proxy, which needs socksio", "pip install socksio")


def _is_local(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _is_private(host: str) -> bool:
    """On this machine or a private network, where servers of one's own often speak http."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith(PRIVATE_NAMES)
