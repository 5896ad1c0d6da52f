"""Prompts tokenised without the parts that every prompt of a template shares (torch-free).

A tokenizer cuts its input at special tokens first and encodes what lies between on its own. So `<|im_start|>user\n`
+ content + `<|im_end|>\n<|im_start|>assistant\n` needs only `user\n` + content encoded anew for each row; the rest is
the same ids for all rows. Where that is not certain (see `_cuts` and `_plan`), whole prompts are encoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from gadcli.data.template import PLANS_KEPT, ChatTemplate, Message

Chunk = tuple[str | int, ...]  # fixed text, and the numbers of the messages whose contents go between
Ints = npt.NDArray[np.int64]
# What pre-tokenizers do with one stretch between special tokens does not depend on where it stands, except:
PLACED = ("Metaspace",)  # `prepend_scheme: first` looks whether a stretch is the first one
PROBES = ("a", "", " a\n", "\n\n", "12 é漢\t", "<|im_end|>", "</s>", "  ")


@dataclass(frozen=True)
class Plan:
    """One sequence of roles: its parts in order, ids that are fixed or a chunk to encode."""

    parts: tuple[list[int] | Chunk, ...]
    chunks: list[Chunk] = field(init=False)
    fixed: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunks", [p for p in self.parts if isinstance(p, tuple)])
        object.__setattr__(self, "fixed", sum(len(p) for p in self.parts if isinstance(p, list)))


WHOLE = Plan(((0,),))


@dataclass
class EncodedPrompts:
    """The prompts of some rows. `firsts[j]`: where row j's encodings begin."""

    plans: list[Plan]
    firsts: Ints
    encodings: list[Encoding]

    def __len__(self) -> int:
        return len(self.plans)

    def lengths(self) -> Ints:
        """Tokens of each prompt."""
        if not self.plans:
            return np.zeros(0, np.int64)
        fixed = {id(p): p.fixed for p in self.plans} if len(set(map(id, self.plans))) > 1 else None
        sizes = np.fromiter(map(len, self.encodings), np.int64, len(self.encodings))
        sums = np.add.reduceat(sizes, self.firsts)
        if fixed is None:
            return np.asarray(sums + self.plans[0].fixed, np.int64)
        return np.asarray(sums + np.fromiter((fixed[id(p)] for p in self.plans), np.int64, len(self.plans)), np.int64)

    def ids(self, j: int) -> list[int]:
        out: list[int] = []
        at = int(self.firsts[j])
        for part in self.plans[j].parts:
            if isinstance(part, list):
                out += part
            else:
                out += self.encodings[at].ids
                at += 1
        return out

    def keep(self, kept: list[int]) -> EncodedPrompts:
        return EncodedPrompts([self.plans[j] for j in kept], self.firsts[kept], self.encodings)


class PromptEncoder:
    """Rows' roles and texts → EncodedPrompts, a plan for each sequence of roles."""

    def __init__(self, backend: Tokenizer, template: ChatTemplate | None) -> None:
        self.backend, self.template = backend, template
        self.cuts = _cuts(backend)
        self._plans: dict[tuple[str, ...], Plan] = {}

    def plan(self, roles: tuple[str, ...]) -> Plan:
        """Raises TemplateRefusal."""
        found = self._plans.get(roles)
        if found is None:
            if len(self._plans) >= PLANS_KEPT:
                self._plans.clear()
            found = self._plans[roles] = self._plan(roles)
        return found

    def texts(self, plan: Plan, roles: Sequence[str], contents: Sequence[str]) -> list[str]:
        """What is to be encoded for one row. Raises TemplateRefusal."""
        if plan is WHOLE:
            return [self.whole(roles, contents)]
        return ["".join([contents[p] if p.__class__ is int else p for p in c]) for c in plan.chunks]  # type: ignore[misc]

    def whole(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        """The prompt's text."""
        if self.template is None:
            return "\n".join(contents)
        messages: list[Message] = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        return self.template.render(messages)

    def encode(self, plans: list[Plan], texts: list[list[str]]) -> EncodedPrompts:
        """Templates write special tokens out, so none are added to them; a bare prompt gets what the model adds."""
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        flat = list(chain.from_iterable(texts))
        encodings = self.backend.encode_batch_fast(flat, add_special_tokens=self.template is None)
        return EncodedPrompts(plans, np.cumsum(sizes) - sizes, encodings)

    def _plan(self, roles: tuple[str, ...]) -> Plan:
        pieces = self.template.pieces(roles) if self.template is not None else None
        if pieces is None or self.cuts is None:
            return WHOLE
        plan = self._cut(pieces)
        for probe in PROBES:  # the reasoning above, held against the tokenizer itself
            contents = [probe + str(i) * (i % 2) for i in range(len(roles))]
            whole = self.backend.encode(self.whole(roles, contents), add_special_tokens=False).ids
            if self.encode([plan], [self.texts(plan, roles, contents)]).ids(0) != whole:
                return WHOLE
        return plan

    def _cut(self, pieces: Sequence[str | int]) -> Plan:
        """Fixed stretches between special tokens become ids; stretches with a content in them, chunks."""
        assert self.cuts is not None
        parts: list[list[int] | Chunk] = []
        open_chunk: list[str | int] = []

        def close() -> None:
            if any(isinstance(p, int) for p in open_chunk):
                parts.append(tuple(open_chunk))
            else:
                text = "".join(str(p) for p in open_chunk)
                parts.append(self.backend.encode(text, add_special_tokens=False).ids)
            open_chunk.clear()

        for piece in pieces:
            if isinstance(piece, int):
                open_chunk.append(piece)
                continue
            for n, stretch in enumerate(self.cuts.split(piece)):
                if n % 2:
                    close()
                    parts.append(self.backend.encode(stretch, add_special_tokens=False).ids)
                elif stretch:
                    open_chunk.append(stretch)
        close()
        return Plan(tuple(_merged(parts)))


def _merged(parts: list[list[int] | Chunk]) -> list[list[int] | Chunk]:
    """Neighbouring fixed ids as one list."""
    out: list[list[int] | Chunk] = []
    for part in parts:
        if isinstance(part, list) and out and isinstance(out[-1], list):
            out[-1] = out[-1] + part
        elif part:
            out.append(part)
    return out


def _cuts(backend: Tokenizer) -> re.Pattern[str] | None:
    """Special tokens at which every text is cut, whatever stands beside them; None where there are none for sure."""
    whole: dict[str, Any] = json.loads(backend.to_str())
    if any(f'"type": "{kind}"' in json.dumps([whole["pre_tokenizer"], whole["normalizer"]]) for kind in PLACED):
        return None
    added = backend.get_added_tokens_decoder().values()
    if backend.encode_special_tokens or any(t.single_word for t in added):  # single_word looks at its neighbours
        return None
    texts = [t.content for t in added]
    safe = [
        t.content
        for t in added
        if t.special and not (t.normalized or t.lstrip or t.rstrip) and not any(_overlaps(o, t.content) for o in texts)
    ]
    return re.compile("(" + "|".join(re.escape(t) for t in sorted(safe, key=len, reverse=True)) + ")") if safe else None


def _overlaps(other: str, token: str) -> bool:
    """Could `other` be found in a text so that it takes part of a `token` that stands there?"""
    if other == token:
        return False
    if token in other:
        return True
    return any(token.startswith(other[-n:]) or token.endswith(other[:n]) for n in range(1, len(other)))
