"""A client for OpenAI-compatible chat endpoints that keeps its key to itself. Standard library only."""

from __future__ import annotations

import http.client
import ipaddress
import json
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from email.message import Message
from typing import IO, Any
from urllib.parse import urlsplit

from gadcli.errors import ConfigError, DataError

ATTEMPTS = 6
TIMEOUT_S = 120.0
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
MAX_REPLY_BYTES = 4 << 20


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would repeat the request, key included, at whatever address the answer names."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


@dataclass(frozen=True)
class ChatEndpoint:
    """One model behind `url` (as `https://host/v1`). The key is sent in a header and hidden from repr and errors.

    Raises ConfigError for an address that is no http(s) URL, holds a password, or would carry the key in clear text
    to another machine.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    key_variable: str = "the key's environment variable"
    first_wait_s: float = FIRST_WAIT_S

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("the judge's endpoint is not an http(s) address", "give one like https://host/v1")
        if parts.username or parts.password:
            raise ConfigError("the endpoint's address holds a password", f"put the key into {self.key_variable}")
        if parts.query or parts.fragment:
            raise ConfigError(f"{parts.hostname}: the endpoint's address has a query", "give one like https://host/v1")
        if self.key and parts.scheme == "http" and not _is_loopback(parts.hostname):
            raise ConfigError(
                f"{parts.hostname}: the key would cross the network in clear text",
                f"use https, or unset {self.key_variable}",
            )
        if self.key != self.key.strip() or not self.key.isascii() or not self.key.isprintable():
            raise ConfigError(f"{self.key_variable} holds white space or other characters no key has", "set it again")

    def complete(self, messages: list[dict[str, str]], max_tokens: int) -> str:
        """The reply's text, at temperature 0. Busy or failing servers are asked again, ever more slowly.

        Raises DataError when they stay so, and at once for a refusal.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self.key}"} if self.key else {}),
        )
        problem = ""
        for attempt in range(ATTEMPTS):
            wait = min(LONGEST_WAIT_S, self.first_wait_s * 2**attempt) * random.uniform(0.8, 1.2)
            try:
                with _opener().open(request, timeout=TIMEOUT_S) as response:
                    return _text_of(response.read(MAX_REPLY_BYTES))
            except urllib.error.HTTPError as error:
                problem = self._describe(error)
                if error.code not in RETRIED:
                    raise DataError(problem, self._hint(error.code)) from None
                wait = max(wait, _retry_after(error.headers))
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                problem = self._hide(f"{self._host()}: {getattr(error, 'reason', None) or type(error).__name__}")
            except ValueError as error:
                problem = self._hide(f"{self._host()}: {error}")
            if attempt + 1 < ATTEMPTS:
                time.sleep(wait)
        raise DataError(f"{problem} ({ATTEMPTS} attempts)", "run the same command again later: what was done is kept")

    def _describe(self, error: urllib.error.HTTPError) -> str:
        detail = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
        return self._hide(f"{self._host()} answered {error.code} {error.reason}: {detail}")

    def _hint(self, code: int) -> str:
        if code in (401, 403):
            return f"check the key in {self.key_variable}"
        if 300 <= code < 400:
            return "the address redirects; give the one it redirects to"
        return f"check the address (…/v1) and the model's name ({self.model})"

    def _host(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    def _hide(self, text: str) -> str:
        """Servers like to quote the key they refuse."""
        return text.replace(self.key, "***") if self.key else text


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_NoRedirects)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _retry_after(headers: Message) -> float:
    value = headers.get("Retry-After", "")
    return min(float(value), LONGEST_WAIT_S) if value.isdigit() else 0.0


def _text_of(raw: bytes) -> str:
    """The text of a chat completion. Raises ValueError for anything else."""
    try:
        content: Any = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError("the reply is not a chat completion") from None
    if not isinstance(content, str):
        raise ValueError("the reply holds no text")
    return content
