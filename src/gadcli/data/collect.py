"""Teacher answers from an OpenAI-compatible chat API: concurrent, resumable, each paid for once (torch-free)."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq

from gadcli.data.findings import Finding
from gadcli.data.journal import Journal, request_key
from gadcli.data.prompts import Prompt, read_prompts
from gadcli.data.writing import MESSAGES
from gadcli.errors import ConfigError, DataError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
FAILED_IN_A_ROW = 8  # that many prompts (or one each worker) without an answer between: the endpoint is down
REFUSED_IN_A_ROW = 5  # that many 400s without one answer: the request itself is wrong, not its prompt
WRITE_ROWS = 1000
# ok, refused, truncated and rejected answers are journalled; a prompt that failed is asked about again next time.
STATUSES = ("ok", "refused", "truncated", "rejected", "failed")
# How models open a refusal in the text itself; the API's own marks (refusal, content_filter) come first.
REFUSAL = re.compile(
    r"^\s*(I['’]?m sorry,? (but )?I (can['’]?t|cannot|am unable)"
    r"|I (can['’]?t|cannot|am unable to|won['’]?t) (help|assist|provide|comply|fulfil)"
    r"|Sorry, (but )?I (can['’]?t|cannot)|很?抱歉，我(无法|不能)|对不起，我(无法|不能))",
    re.IGNORECASE,
)


@dataclass
class CollectSpec:
    """What is asked, of whom, and how. Prices are per million tokens, in whatever currency the user thinks."""

    prompts: list[str]
    out: Path
    endpoint: str
    model: str
    key: str = field(repr=False, default="")
    prompt_key: str = "content"
    response_key: str = "teacher_response"
    system: str = ""
    params: dict[str, Any] = field(default_factory=dict)  # max_tokens, temperature, top_p …
    concurrency: int = 16
    retries: int = 6
    timeout_s: float = 300.0
    limit: int = 0
    exclude: tuple[str, ...] = ("refused", "truncated")
    price_in: float = 0.0
    price_out: float = 0.0

    @property
    def shown_endpoint(self) -> str:
        """Without a user and password."""
        return re.sub(r"//[^/@]*@", "//***@", self.endpoint)

    @property
    def journal(self) -> Path:
        return self.out.with_name(self.out.name + ".journal.jsonl")


@dataclass
class Tally:
    """What happened so far."""

    total: int = 0
    reused: int = 0
    repeated: int = 0
    bad_prompts: int = 0
    requests: int = 0
    retried: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    started: float = field(default_factory=time.monotonic)
    last_failure: str = ""
    failed_in_a_row: int = 0
    stopped: int = 0  # after so many prompts in a row without an answer

    @property
    def done(self) -> int:
        return self.reused + sum(self.counts.values())

    def cost(self, spec: CollectSpec) -> float:
        return (self.tokens_in * spec.price_in + self.tokens_out * spec.price_out) / 1e6

    def line(self, spec: CollectSpec) -> str:
        seconds = max(time.monotonic() - self.started, 1e-6)
        fresh = self.done - self.reused
        parts = [
            f"{self.done:,}/{self.total:,}",
            f"{fresh / seconds:.1f} answers/s",
            f"{self.tokens_out / seconds:.0f} tok/s",
        ]
        parts += [f"{n} {status}" for status, n in self.counts.items() if status != "ok" and n]
        if self.retried:
            parts.append(f"{self.retried} retries")
        if spec.price_in or spec.price_out:
            parts.append(f"cost {self.cost(spec):.4f}")
        if fresh and self.total > self.done:
            parts.append(f"{(self.total - self.done) * seconds / fresh:.0f} s left")
        return "  ".join(parts)


def collect(spec: CollectSpec, show: Callable[[Tally], None] = lambda tally: None) -> Tally:
    """Ask for every prompt that the journal has no answer to, then write `out`.

    Answers go to `<out>.journal.jsonl` as they arrive: kill it at any time and run the same command again. Raises
    ConfigError if the endpoint refuses the key or the request, DataError (after writing what there is) if prompts
    stayed without an answer.
    """
    if spec.out.exists() and not spec.journal.exists():
        raise ConfigError(f"{spec.out}: exists, and not from a collect that could go on", "choose another -o")
    tally = Tally()
    with Journal(spec.journal) as journal:
        jobs = _count(spec, journal, tally)
        if jobs:
            asyncio.run(_ask_all(spec, journal, tally, show))
        write_answers(spec, journal)
    if tally.stopped:
        raise DataError(
            f"stopped: {tally.stopped} prompts in a row got no answer, {tally.total - tally.done:,} were not "
            f"asked; the last: {tally.last_failure}",
            "when the endpoint answers again, run the same command: it goes on from here",
        )
    if tally.counts["failed"]:
        raise DataError(
            f"{tally.counts['failed']:,} of {tally.total:,} prompts got no answer; the last: {tally.last_failure}",
            "run the same command again: it asks for those alone",
        )
    return tally


def requests_of(spec: CollectSpec) -> Iterator[tuple[str, Prompt]]:
    """Each different request once, in file order, with its key."""
    seen: set[str] = set()
    taken = 0
    for prompt in read_prompts(spec.prompts, spec.prompt_key):
        if isinstance(prompt, Finding):
            continue
        key = request_key(spec.model, _messages(spec, prompt), spec.params)
        if key in seen:
            continue
        seen.add(key)
        taken += 1
        yield key, prompt
        if taken == spec.limit:
            return


def _messages(spec: CollectSpec, prompt: Prompt) -> list[dict[str, str]]:
    if spec.system and prompt.messages[0]["role"] != "system":
        return [{"role": "system", "content": spec.system}, *prompt.messages]
    return prompt.messages


def _count(spec: CollectSpec, journal: Journal, tally: Tally) -> int:
    """A first pass over the prompts: how many there are, and how many answers are there already."""
    rows = 0
    for prompt in read_prompts(spec.prompts, spec.prompt_key):
        if isinstance(prompt, Finding):
            tally.bad_prompts += 1
        else:
            rows += 1
    for key, _ in requests_of(spec):
        tally.total += 1
        tally.reused += key in journal
    tally.repeated = rows - tally.total if not spec.limit else 0
    if tally.total == 0:
        raise DataError("there is no usable prompt in these files", "gad data head FILES shows them")
    return tally.total - tally.reused


async def _ask_all(spec: CollectSpec, journal: Journal, tally: Tally, show: Callable[[Tally], None]) -> None:
    """`concurrency` workers share one stream of prompts; the first fatal error stops them all."""
    client = openai.AsyncOpenAI(
        base_url=spec.endpoint, api_key=spec.key or "none", max_retries=0, timeout=spec.timeout_s
    )
    jobs = ((key, prompt) for key, prompt in requests_of(spec) if key not in journal)

    async def work() -> None:
        for key, prompt in jobs:  # one thread: taking the next is atomic
            entry = await _ask(client, spec, _messages(spec, prompt), tally)
            tally.failed_in_a_row = tally.failed_in_a_row + 1 if entry is None else 0
            if entry is None:
                tally.counts["failed"] += 1
                if tally.failed_in_a_row >= max(FAILED_IN_A_ROW, spec.concurrency):
                    tally.stopped = tally.failed_in_a_row
            else:
                journal.add(key, entry)
                tally.counts[entry["status"]] += 1
            show(tally)
            if tally.stopped:  # the others end what they are at
                return

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(spec.concurrency):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the first fatal one; the others are its echoes
    finally:
        await client.close()


async def _ask(client: Any, spec: CollectSpec, messages: list[dict[str, str]], tally: Tally) -> dict[str, Any] | None:
    """One answer, with retries; None when it stayed out. A prompt the endpoint rejects (400) is journalled as
    `rejected`, since asking again would not help."""
    wait = FIRST_WAIT_S
    for attempt in range(spec.retries + 1):
        tally.requests += 1
        try:
            answer = await client.chat.completions.create(model=spec.model, messages=messages, **spec.params)
            return _entry(answer, tally)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            reason = _redact(_reason(error), spec.key)
            raise ConfigError(
                f"{spec.shown_endpoint} answered {error.status_code}: {reason}",
                "check --endpoint, --model and the key's variable",
            ) from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            tally.last_failure = _redact(_reason(error), spec.key)
            answered = tally.reused + tally.counts["ok"] + tally.counts["truncated"]
            if tally.counts["rejected"] + 1 >= REFUSED_IN_A_ROW and not answered:
                raise ConfigError(
                    f"{spec.shown_endpoint} rejects every request: {tally.last_failure}", "see --model and its options"
                ) from None
            return {"status": "rejected", "text": "", "finish_reason": "", "reason": tally.last_failure}
        except (openai.APIError, ValueError) as error:  # throttled, down, cut off, or not JSON
            tally.last_failure = _redact(_reason(error), spec.key)
            if attempt == spec.retries:
                return None
            tally.retried += 1
            await asyncio.sleep(_asked_wait(error) or wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, LONGEST_WAIT_S)
    return None


def _asked_wait(error: Exception) -> float:
    """What the server's Retry-After asks for, in seconds (0 if it does not)."""
    response = getattr(error, "response", None)
    try:
        return min(float(response.headers.get("retry-after", 0)), LONGEST_WAIT_S) if response is not None else 0.0
    except ValueError:  # an HTTP date: rare, and the backoff will do
        return 0.0


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _redact(text: str, key: str) -> str:
    """Servers like to quote the key they did not like."""
    if len(key) >= 4:
        text = text.replace(key, "***")
    return re.sub(r"\b(sk|Bearer)[-_ ][\w*.-]{6,}", "***", text)


def _entry(answer: Any, tally: Tally) -> dict[str, Any]:
    """A journal line of an API answer. Raises ValueError (retried) if it holds no choice."""
    if not getattr(answer, "choices", None) or answer.choices[0].message is None:
        raise ValueError("an answer without choices")
    choice = answer.choices[0]
    text = choice.message.content or ""
    refusal = getattr(choice.message, "refusal", None)
    status = "ok"
    if refusal or choice.finish_reason == "content_filter" or not text.strip() or REFUSAL.match(text):
        status = "refused"
    if choice.finish_reason == "length":
        status = "truncated"
    usage = answer.usage
    tokens = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
    tally.tokens_in += tokens[0]
    tally.tokens_out += tokens[1]
    return {
        "status": status, "text": text or refusal or "", "finish_reason": choice.finish_reason or "",
        "model": answer.model or "", "prompt_tokens": tokens[0], "completion_tokens": tokens[1],
    }  # fmt: skip


def write_answers(spec: CollectSpec, journal: Journal) -> int:
    """`out` from the journal, in the prompts' order, without the excluded statuses; replaced in one step."""
    schema = pa.schema([
        (spec.prompt_key, MESSAGES), (spec.response_key, pa.large_string()), ("status", pa.string()),
        ("finish_reason", pa.string()), ("model", pa.string()), ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
    ])  # fmt: skip
    part = spec.out.with_name(f".{spec.out.name}.part")
    rows: list[dict[str, Any]] = []
    written = 0
    with pq.ParquetWriter(part, schema, compression="zstd") as writer:
        for key, prompt in requests_of(spec):
            entry = journal.get(key) if key in journal else None
            if entry is not None and entry["status"] not in (*spec.exclude, "rejected"):
                row = {name: entry[name] for name in schema.names[2:]}
                rows.append({spec.prompt_key: _messages(spec, prompt), spec.response_key: entry["text"], **row})
            if len(rows) >= WRITE_ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                written += len(rows)
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))
        written += len(rows)
    part.replace(spec.out)
    return written
