"""A language model as judge, through any OpenAI-compatible endpoint: two answers to a prompt, which is better?

Each pair is asked twice with the answers swapped: a verdict that follows the position counts as a tie. Lengths are
reported beside the result, since judges favour long answers. Replies are journalled as they come, so an interrupted
evaluation resumes where it stopped and a repeated one costs nothing. The API key is read from GAD_JUDGE_API_KEY, sent
to that endpoint alone, and stands in no file, message or result.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gadcli.endpoint.ask import Messages, Tally, ask_all
from gadcli.endpoint.client import ChatEndpoint
from gadcli.endpoint.journal import Journal, request_key
from gadcli.errors import ConfigError, DataError
from gadcli.evaluate.text import bootstrap_interval

KEY_VARIABLE = "GAD_JUDGE_API_KEY"
INSTRUCTIONS = (
    "You compare two answers to the same request. Judge correctness, helpfulness and how well the answer does what "
    "was asked. Do not favour an answer for being longer, or for standing first. "
    "End with exactly one of: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if they are equal."
)
TEMPLATE = "# Request\n{prompt}\n\n# Answer A\n{a}\n\n# Answer B\n{b}\n\nWhich answer is better?"
VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """One prompt with the answer under test and the one it is compared with."""

    prompt: str
    answer: str
    reference: str


@dataclass(frozen=True)
class JudgeResult:
    """The answers under test against the references.

    win_rate counts a tie one half, with its 95 % bootstrap interval; wins and losses are pairs on which both orders
    agree, ties the rest. flipped: pairs judged by position (the same letter both times, so counted as ties).
    first_share: share of decided verdicts for the answer that stood first (.5 without position bias).
    longer_share: share of won-or-lost pairs that the longer text won (.5 without length bias; None if none).
    unparsed: pairs left out of everything else, since a reply held no verdict or a request was rejected.
    """

    model: str
    pairs: int
    wins: int
    ties: int
    losses: int
    flipped: int
    unparsed: int
    win_rate: float
    win_rate_low: float
    win_rate_high: float
    first_share: float | None
    longer_share: float | None
    answer_chars: float
    reference_chars: float
    asked: int
    cached: int

    def to_json(self) -> dict[str, float | str | None]:
        return asdict(self)


def judge_endpoint(url: str, model: str, max_tokens: int) -> ChatEndpoint:
    """The judge behind `url`, at temperature 0 where the model takes a temperature. Raises ConfigError for a bad
    address."""
    params = {"temperature": 0, "max_tokens": max_tokens}
    return ChatEndpoint(url, model, os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE, params, optional=("temperature",))


def judge(
    pairs: Sequence[Pair],
    endpoint: ChatEndpoint,
    cache: Path,
    *,
    workers: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> JudgeResult:
    """Ask for every pair in both orders; verdicts already in the journal `cache` are not asked for again.

    `progress(done, total)` counts verdicts. Raises DataError where the endpoint refuses or cannot be reached, with
    what was decided so far kept in the journal.
    """
    if not pairs:
        raise DataError("no pairs to judge", "give --data with at least one row")
    orders = [_messages(pair.prompt, pair.answer, pair.reference) for pair in pairs]
    orders += [_messages(pair.prompt, pair.reference, pair.answer) for pair in pairs]
    keys = [request_key(endpoint.model, order, endpoint.params) for order in orders]
    with Journal(cache, "--judge-cache", wait=True) as journal:
        missing = {key: order for key, order in zip(keys, orders, strict=True) if not _verdict(journal, key)}
        tally = Tally(total=len(keys), reused=len(keys) - len(missing))

        def show(now: Tally) -> None:
            if progress:
                progress(now.done, now.total)

        try:
            ask_all(endpoint, missing.items(), journal, tally, concurrency=max(1, workers), show=show)
        except ConfigError as error:
            raise DataError(f"the judge: {error.message}", error.hint) from None
        tally.raise_unanswered()
        found = [_verdict(journal, key) for key in keys]
    if not any(found):
        cut = tally.counts["truncated"]
        problem = f"{cut} replies were cut off" if cut else tally.last_failure or "no reply holds [[A]], [[B]] or [[C]]"
        raise DataError(
            f"the judge gave no verdict on {len(pairs)} pairs: {problem}", f"its replies: {cache}; --judge-max-tokens"
        )
    return _result(endpoint.model, pairs, found[: len(pairs)], found[len(pairs) :], len(missing))


def _messages(prompt: str, a: str, b: str) -> Messages:
    return [
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": TEMPLATE.format(prompt=prompt, a=a, b=b)},
    ]


def _verdict(journal: Journal, key: str) -> str:
    """The verdict in a journalled reply; "" for none, so that the next evaluation asks again.

    A reply without text, by a server that takes all of it for reasoning, has its verdict at the reasoning's end.
    """
    entry = journal.get(key) if key in journal else {}
    if entry.get("status") == "truncated":
        return ""
    return parse_verdict(str(entry.get("text") or entry.get("reasoning") or ""))


def parse_verdict(reply: str) -> str:
    """A, B, C (equal), or "" where the reply ends without a verdict. The last one counts: judges think aloud."""
    found = VERDICT.findall(reply)
    return found[-1].upper() if found else ""


def _result(model: str, pairs: Sequence[Pair], forward: list[str], swapped: list[str], asked: int) -> JudgeResult:
    """Combine the two orders; in `forward` the answer under test is A, in `swapped` it is B."""
    kept = [(p, f, s) for p, f, s in zip(pairs, forward, swapped, strict=True) if f and s]
    points, longer, first = [], [], []
    flipped = 0
    for pair, one, two in kept:
        won, lost = (one, two) == ("A", "B"), (one, two) == ("B", "A")
        flipped += one == two != "C"
        points.append(1.0 if won else 0.0 if lost else 0.5)
        if (won or lost) and len(pair.answer) != len(pair.reference):
            longer.append(float(won == (len(pair.answer) > len(pair.reference))))
        first += [float(verdict == "A") for verdict in (one, two) if verdict != "C"]
    low, high = bootstrap_interval(points) if points else (0.0, 1.0)
    return JudgeResult(
        model=model,
        pairs=len(pairs),
        wins=points.count(1.0),
        ties=points.count(0.5),
        losses=points.count(0.0),
        flipped=flipped,
        unparsed=len(pairs) - len(kept),
        win_rate=statistics.fmean(points) if points else 0.5,
        win_rate_low=low,
        win_rate_high=high,
        first_share=_mean(first),
        longer_share=_mean(longer),
        answer_chars=statistics.fmean(len(pair.answer) for pair in pairs),
        reference_chars=statistics.fmean(len(pair.reference) for pair in pairs),
        asked=asked,
        cached=2 * len(pairs) - asked,
    )


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None
