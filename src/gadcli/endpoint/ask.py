"""Many requests to one chat endpoint at once, each answer into the journal as it arrives: nothing is paid for twice."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from gadcli.endpoint.client import ChatClient, ChatEndpoint, NoAnswer, Rejected
from gadcli.endpoint.journal import Journal
from gadcli.endpoint.reply import oddities
from gadcli.errors import ConfigError, DataError, GadError

FAILED_IN_A_ROW = 8  # that many requests (or one each worker) without an answer between: the endpoint is down
REJECTED_IN_A_ROW = 5  # that many 400s without one answer: the request itself is wrong, not its prompt

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Price:
    """Per million tokens, in whatever currency the user thinks; `budget` 0 sets no limit."""

    per_prompt_token: float = 0.0
    per_answer_token: float = 0.0
    budget: float = 0.0

    def of(self, prompt_tokens: int, answer_tokens: int) -> float:
        return (prompt_tokens * self.per_prompt_token + answer_tokens * self.per_answer_token) / 1e6


@dataclass
class Tally:
    """What happened so far. Tokens and counts are of this run; `spent` is all that the file's answers cost, `dearest`
    the most that one did."""

    total: int = 0
    reused: int = 0
    repeated: int = 0
    bad_prompts: int = 0
    requests: int = 0
    retried: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    spent: float = 0.0
    dearest: float = 0.0
    started: float = field(default_factory=time.monotonic)
    oddities: Counter[str] = field(default_factory=Counter)
    last_failure: str = ""
    failed_in_a_row: int = 0
    stopped: int = 0  # after so many requests in a row without an answer
    over_budget: bool = False

    @property
    def done(self) -> int:
        return self.reused + sum(self.counts.values())

    def line(self, price: Price) -> str:
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
        if price.per_prompt_token or price.per_answer_token:
            parts.append(f"cost {price.of(self.tokens_in, self.tokens_out):.4f}")
        return "  ".join(parts)

    def raise_unanswered(self) -> None:
        """Raises DataError if requests stayed without an answer."""
        if self.stopped:
            raise DataError(
                f"stopped: {self.stopped} prompts in a row got no answer, {self.total - self.done:,} were not "
                f"asked; the last: {self.last_failure}",
                "when the endpoint answers again, run the same command to resume",
            )
        if self.counts["failed"]:
            raise DataError(
                f"{self.counts['failed']:,} of {self.total:,} prompts got no answer; the last: {self.last_failure}",
                "run the same command again: it asks only for those",
            )


def ask_all(
    endpoint: ChatEndpoint,
    jobs: Iterable[tuple[str, Messages]],
    journal: Journal,
    tally: Tally,
    *,
    concurrency: int,
    price: Price = Price(),
    show: Callable[[Tally], None] = lambda tally: None,
) -> None:
    """Ask for each (key, messages) and add what comes to the journal; `tally` counts, and says why it ended early.

    A first fatal error (the key, the address, a request that is always rejected: ConfigError; no credit left:
    DataError) is raised when the requests on their way are back.
    """
    asyncio.run(_Asking(endpoint, iter(jobs), journal, tally, price, show).run(concurrency))


class _Asking:
    """`concurrency` workers share one stream of jobs. One thread: taking the next is atomic."""

    def __init__(
        self, endpoint: ChatEndpoint, jobs: Any, journal: Journal, tally: Tally, price: Price,
        show: Callable[[Tally], None],
    ) -> None:  # fmt: skip
        self.endpoint, self.jobs, self.journal, self.tally, self.price, self.show = (
            endpoint, jobs, journal, tally, price, show
        )  # fmt: skip
        self.fatal: GadError | None = None
        self.on_their_way = 0
        self.rejected: list[tuple[str, dict[str, Any]]] = []  # not journalled before an answer shows that others pass

    async def run(self, concurrency: int) -> None:
        self.client = ChatClient(self.endpoint)
        self.limit = max(FAILED_IN_A_ROW, concurrency)
        try:
            if self.price.budget and not self.tally.dearest:  # the first answer says what one costs
                await self.work(most=1)
            await asyncio.gather(*(self.work() for _ in range(concurrency)))
        finally:
            await self.client.close()
        if self.fatal:
            raise self.fatal

    async def work(self, most: int = 0) -> None:
        taken = 0
        while not (self.fatal or self.tally.stopped or (most and taken == most)):
            if self.price.budget and not self.affordable():
                return
            job = next(self.jobs, None)
            if job is None:
                return
            taken += 1
            self.on_their_way += 1
            await self.ask(*job)
            self.on_their_way -= 1
            self.tally.requests, self.tally.retried = self.client.requests, self.client.retried
            self.show(self.tally)

    def affordable(self) -> bool:
        """Whether one more answer fits the budget, should those on their way cost as much as the dearest so far."""
        fits = self.tally.spent + (self.on_their_way + 1) * self.tally.dearest <= self.price.budget * (1 + 1e-9)
        self.tally.over_budget |= not fits
        return fits

    async def ask(self, key: str, messages: Messages) -> None:
        tally = self.tally
        try:
            reply = await self.client.ask(messages, self.note)
        except NoAnswer:
            tally.counts["failed"] += 1
            tally.failed_in_a_row += 1
            tally.stopped = tally.failed_in_a_row if tally.failed_in_a_row >= self.limit else 0
            return
        except Rejected as error:
            self.rejected.append((key, {"status": "rejected", "text": "", "finish_reason": "", "reason": str(error)}))
            tally.counts["rejected"] += 1
            tally.failed_in_a_row = 0
            if self.answered():
                self.keep_rejected()
            elif len(self.rejected) >= REJECTED_IN_A_ROW:
                self.fatal = self.fatal or ConfigError(
                    f"every request is rejected: {error}", "see --model and its options"
                )
            return
        except GadError as error:
            self.fatal = self.fatal or error
            return
        tally.failed_in_a_row = 0
        self.journal.add(key, asdict(reply))
        tally.counts[reply.status] += 1
        tally.oddities.update(oddities(reply))
        tally.tokens_in += reply.prompt_tokens
        tally.tokens_out += reply.completion_tokens
        self.keep_rejected()
        cost = self.price.of(reply.prompt_tokens, reply.completion_tokens)
        tally.spent += cost
        tally.dearest = max(tally.dearest, cost)
        if self.price.budget and not cost:
            self.fatal = self.fatal or ConfigError(
                f"{self.endpoint.shown} does not tell how many tokens an answer has, so --budget cannot be kept",
                "leave --budget out, and watch the bill at the endpoint",
            )

    def note(self, reason: str) -> None:
        self.tally.last_failure = reason

    def answered(self) -> bool:
        counts = self.tally.counts
        return bool(self.tally.reused or any(counts[s] for s in counts if s not in ("rejected", "failed")))

    def keep_rejected(self) -> None:
        """Journalled only where the endpoint answers other requests: else the request itself was wrong, and the same
        command with another option should ask again."""
        while self.rejected:
            self.journal.add(*self.rejected.pop())
