"""Teacher answers for a file of prompts: resumable, each paid for once, written as a data file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from gadcli.data.prompts import Prompt, read_prompts
from gadcli.data.read.findings import Finding
from gadcli.data.writing import MESSAGES
from gadcli.endpoint.ask import Messages, Price, Tally, ask_all
from gadcli.endpoint.client import ChatEndpoint
from gadcli.endpoint.journal import Journal, request_key
from gadcli.errors import ConfigError, DataError

WRITE_ROWS = 1000
NEVER_WRITTEN = ("empty", "tool_call", "rejected")
ADVICE = {
    "truncated": "raise --max-tokens (a model that reasons may use it up before it answers)",
    "refused": "look at the journal, or keep them with --exclude none",
    "tool_call": "the model called a tool instead of answering: see --system and --extra-body",
}


class Teacher(Protocol):
    """Whoever answers without an endpoint: a model on this machine."""

    @property
    def model(self) -> str: ...

    @property
    def params(self) -> dict[str, Any]: ...

    def ask(
        self, jobs: Iterable[tuple[str, Messages]], journal: Journal, tally: Tally, show: Callable[[Tally], None]
    ) -> None: ...


@dataclass
class CollectSpec:
    """What is asked, of whom, and how. `samples` is the number of answers per prompt."""

    prompts: list[str]
    out: Path
    endpoint: ChatEndpoint | Teacher
    prompt_key: str = "content"
    response_key: str = "teacher_response"
    system: str = ""
    samples: int = 1
    concurrency: int = 16
    limit: int = 0
    exclude: tuple[str, ...] = ("refused", "truncated")
    price: Price = field(default_factory=Price)

    @property
    def journal(self) -> Path:
        return self.out.with_name(self.out.name + ".journal.jsonl")


def collect(spec: CollectSpec, show: Callable[[Tally], None] = lambda tally: None) -> Tally:
    """Ask for every prompt that the journal has no answer to, then write `out`.

    Answers go to `<out>.journal.jsonl` as they arrive: kill it at any time and run the same command again. Raises
    ConfigError if the endpoint refuses the key or the request, DataError (after writing what there is) if prompts
    stayed without an answer, or if no answer at all can be trained on.
    """
    if spec.out.exists() and not spec.journal.exists():
        raise ConfigError(f"{spec.out}: exists, and was not written by collect", "choose another -o")
    tally = Tally()
    with Journal(spec.journal) as journal:
        jobs = _count(spec, journal, tally)
        try:
            if jobs:
                missing = ((key, _messages(spec, p)) for key, p in requests_of(spec) if key not in journal)
                if isinstance(spec.endpoint, ChatEndpoint):
                    ask_all(
                        spec.endpoint, missing, journal, tally, concurrency=spec.concurrency, price=spec.price,
                        show=show,
                    )  # fmt: skip
                else:
                    spec.endpoint.ask(missing, journal, tally, show)
        except DataError:  # no credit left: what was paid for is written
            write_answers(spec, journal)
            raise
        written = write_answers(spec, journal)
    tally.raise_unanswered()
    if not written and not tally.over_budget:
        most = max(tally.counts, key=lambda status: tally.counts[status], default="")
        statuses = ", ".join(f"{n:,} {status}" for status, n in tally.counts.items()) or "all from an earlier run"
        raise DataError(f"{spec.out}: no row to train on; answers: {statuses}", ADVICE.get(most, f"see {spec.journal}"))
    return tally


def requests_of(spec: CollectSpec) -> Iterator[tuple[str, Prompt]]:
    """Each different request once per sample, in file order, with its key."""
    seen: set[str] = set()
    for prompt in read_prompts(spec.prompts, spec.prompt_key):
        if isinstance(prompt, Finding):
            continue
        key = request_key(spec.endpoint.model, _messages(spec, prompt), spec.endpoint.params)
        if key in seen:
            continue
        seen.add(key)
        yield key, prompt
        yield from ((f"{key}-{i}", prompt) for i in range(2, spec.samples + 1))
        if len(seen) == spec.limit:
            return


def _messages(spec: CollectSpec, prompt: Prompt) -> list[dict[str, str]]:
    if spec.system and prompt.messages[0]["role"] != "system":
        return [{"role": "system", "content": spec.system}, *prompt.messages]
    return prompt.messages


def _count(spec: CollectSpec, journal: Journal, tally: Tally) -> int:
    """A first pass over the prompts: how many there are, how many answers are there already, and what they cost."""
    rows = 0
    for prompt in read_prompts(spec.prompts, spec.prompt_key):
        if isinstance(prompt, Finding):
            tally.bad_prompts += 1
        else:
            rows += 1
    for key, _ in requests_of(spec):
        tally.total += 1
        if key in journal:
            tally.reused += 1
            if spec.price.budget:
                entry = journal.get(key)
                cost = spec.price.of(entry.get("prompt_tokens", 0), entry.get("completion_tokens", 0))
                tally.spent, tally.dearest = tally.spent + cost, max(tally.dearest, cost)
    tally.repeated = rows - tally.total // spec.samples if not spec.limit else 0
    if tally.total == 0:
        raise DataError("no usable prompt in these files", "gad data head FILES shows them")
    return tally.total - tally.reused


def write_answers(spec: CollectSpec, journal: Journal) -> int:
    """`out` from the journal, in the prompts' order, without the excluded statuses; replaced in one step."""
    schema = pa.schema([
        (spec.prompt_key, MESSAGES), (spec.response_key, pa.large_string()), ("status", pa.string()),
        ("finish_reason", pa.string()), ("model", pa.string()), ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()), ("reasoning", pa.large_string()),
    ])  # fmt: skip
    part = spec.out.with_name(f".{spec.out.name}.part")
    rows: list[dict[str, Any]] = []
    written = 0
    with pq.ParquetWriter(part, schema, compression="zstd") as writer:
        for key, prompt in requests_of(spec):
            entry = journal.get(key) if key in journal else None
            if entry is not None and entry["status"] not in (*spec.exclude, *NEVER_WRITTEN):
                row = {name: entry.get(name) for name in schema.names[2:]}
                row["reasoning"] = row["reasoning"] or None
                rows.append({spec.prompt_key: _messages(spec, prompt), spec.response_key: entry["text"], **row})
            if len(rows) >= WRITE_ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                written += len(rows)
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))
        written += len(rows)
    part.replace(spec.out)
    return written
