"""A language model as judge, through any OpenAI-compatible endpoint: two answers to a prompt, which is better?

Each pair is asked twice with the answers swapped: a verdict that follows the position is no verdict. Lengths are
reported beside the result, since judges favour long answers. Verdicts are kept in a file as they come, so an
interrupted evaluation goes on where it stopped and a repeated one costs nothing. The API key is read from
GAD_JUDGE_API_KEY, sent to that endpoint alone, and stands in no file, message or result.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from gadcli.errors import DataError, GadError
from gadcli.evaluate.chat_endpoint import ChatEndpoint
from gadcli.evaluate.text import bootstrap_interval

KEY_VARIABLE = "GAD_JUDGE_API_KEY"
INSTRUCTIONS = (
    "You compare two answers to the same request. Judge correctness, helpfulness and how well the answer does what "
    "was asked. Do not favour an answer for being longer, or for standing first. "
    "End with exactly one of: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if they are equal."
)
TEMPLATE = "# Request\n{prompt}\n\n# Answer A\n{a}\n\n# Answer B\n{b}\n\nWhich answer is better?"
MAX_TOKENS = 512


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
    unparsed: pairs left out of everything else, since a reply held no verdict.
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


def judge(
    pairs: Sequence[Pair],
    endpoint_url: str,
    model: str,
    cache: Path,
    *,
    workers: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> JudgeResult:
    """Ask for every pair in both orders; verdicts already in `cache` (JSON lines) are not asked again.

    `progress(done, total)` counts verdicts. Raises DataError where the endpoint refuses or cannot be reached, with
    what was decided so far kept in the cache.
    """
    if not pairs:
        raise DataError("no pairs to judge", "give --data with at least one row")
    endpoint = ChatEndpoint(endpoint_url, model, os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE)
    orders = [(pair.prompt, pair.answer, pair.reference) for pair in pairs]
    orders += [(pair.prompt, pair.reference, pair.answer) for pair in pairs]
    with VerdictCache(cache) as verdicts:
        keys = [_key(model, *order) for order in orders]
        missing = {key: order for key, order in zip(keys, orders, strict=True) if key not in verdicts}

        over = threading.Event()

        def ask(key: str, order: tuple[str, str, str]) -> None:
            if over.is_set():
                return
            try:
                verdict = _ask(endpoint, *order)
            except GadError:
                over.set()  # before this thread can take the next question
                raise
            verdicts.add(key, model, verdict)
            if progress:
                progress(len(keys) - len(missing) + verdicts.added, len(keys))

        pool = ThreadPoolExecutor(max(1, workers))
        try:
            for future in [pool.submit(ask, key, order) for key, order in missing.items()]:
                future.result()
        finally:
            over.set()
            pool.shutdown(cancel_futures=True)
        found = [verdicts[key] for key in keys]
    return _result(model, pairs, found[: len(pairs)], found[len(pairs) :], len(missing))


def _ask(endpoint: ChatEndpoint, prompt: str, a: str, b: str) -> str:
    reply = endpoint.complete(
        [
            {"role": "system", "content": INSTRUCTIONS},
            {"role": "user", "content": TEMPLATE.format(prompt=prompt, a=a, b=b)},
        ],
        max_tokens=MAX_TOKENS,
    )
    return parse_verdict(reply)


def parse_verdict(reply: str) -> str:
    """A, B, C (equal), or "" where the reply ends without a verdict. The last one counts: judges think aloud."""
    found = {letter: reply.rfind(f"[[{letter}]]") for letter in "ABC"}
    best = max(found, key=lambda letter: found[letter])
    return best if found[best] >= 0 else ""


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


def _key(model: str, prompt: str, a: str, b: str) -> str:
    """What a verdict depends on; a changed instruction is another question."""
    text = json.dumps([model, INSTRUCTIONS, TEMPLATE, MAX_TOKENS, prompt, a, b], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class VerdictCache:
    """Verdicts by key, in memory and appended to a file of JSON lines, one flushed line a verdict. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.added = 0
        self._verdicts: dict[str, str] = {}
        self._lock = threading.Lock()
        self._file: IO[str] | None = None

    def __enter__(self) -> VerdictCache:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._load()
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._verdicts

    def __getitem__(self, key: str) -> str:
        return self._verdicts[key]

    def add(self, key: str, model: str, verdict: str) -> None:
        """Keep a verdict. One without a letter is kept in memory only, so that the next evaluation asks again."""
        assert self._file is not None
        with self._lock:
            self._verdicts[key] = verdict
            self.added += 1
            if verdict:
                self._file.write(json.dumps({"key": key, "model": model, "verdict": verdict}) + "\n")
                self._file.flush()

    def _load(self) -> None:
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if whole != raw:  # a kill in the middle of a line: drop the rest, or the next line would join it
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                self._verdicts[record["key"]] = record["verdict"]
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{self.path}:{number}: is not a verdict of an earlier evaluation", "name another --judge-cache"
                ) from None
