"""What a discriminator reads of an answer: all of it, or what stands outside `<think>…</think>` (torch-free)."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable

from gadcli.chat.in_context import OPEN, opens_thinking

BLOCK = re.compile(r"<think>.*?(?:</think>|\Z)\s*", re.DOTALL)
OPENED_BLOCK = re.compile(r".*?(?:</think>|\Z)\s*", re.DOTALL)
PROMPT_END = 16  # tokens of a prompt's end that show whether it opens the thinking


class AnswerReader:
    """`reader(prompt_ids, ids)`: the ids of an answer that the discriminator reads (`critic.reads`).

    `decode` turns ids into text, special tokens included. Blanks behind a block go with it. Thinking that is never
    closed is all thinking: then the last token is left, so that no answer is empty.
    """

    def __init__(self, reads: str, decode: Callable[[list[int]], str]) -> None:
        self.all, self.decode = reads == "all", decode

    def __call__(self, prompt_ids: list[int], ids: list[int]) -> list[int]:
        hidden = self.hidden(prompt_ids, ids)
        if not hidden:
            return ids
        edges = [0, *(edge for span in hidden for edge in span), len(ids)]
        return [i for start, end in zip(edges[::2], edges[1::2], strict=True) for i in ids[start:end]]

    def hidden(self, prompt_ids: list[int], ids: list[int]) -> list[tuple[int, int]]:
        """The spans of an answer's ids that are not read."""
        if self.all or not ids:
            return []
        text = self.decode(ids)
        opened = opens_thinking(self.decode(prompt_ids[-PROMPT_END:]))
        if not opened and OPEN not in text:
            return []
        first = OPENED_BLOCK.match(text) if opened else None
        blocks = [(0, first.end())] if first else []
        blocks += [found.span() for found in BLOCK.finditer(text, blocks[-1][1] if blocks else 0)]
        spans = [(self._token_at(ids, start), self._token_at(ids, end)) for start, end in blocks]
        if sum(end - start for start, end in spans) == len(ids):
            spans[-1] = (spans[-1][0], len(ids) - 1)
        return spans

    def _token_at(self, ids: list[int], char: int) -> int:
        """The token that holds a character of the text."""
        return bisect_left(range(len(ids)), char + 1, key=lambda n: len(self.decode(ids[: n + 1])))
