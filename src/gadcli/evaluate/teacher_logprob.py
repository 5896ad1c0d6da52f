"""How likely a local teacher finds a student's answers: a judge of open text, where the teacher is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gadcli.chat.tokenize import ChatTokenizer
from gadcli.checkpoint.resolve_model import resolve_model
from gadcli.config.schema import FsdpConfig, ModelConfig
from gadcli.distributed.fsdp import shard
from gadcli.distributed.world import World
from gadcli.model.actor import answer_logprobs
from gadcli.model.loading import load_actor
from gadcli.model.packing import Group

MICRO_BATCH_TOKENS = 4096
CHUNK = 256  # answers whose log-probs are held at once


class Teacher:
    """A causal language model that only reads; its own tokenizer and chat template are used."""

    def __init__(self, path: str, dtype: str, world: World) -> None:
        folder = str(resolve_model(path))
        self.chat, self.world = ChatTokenizer.from_folder(folder), world
        model = load_actor(folder, ModelConfig(dtype=dtype), trainable=False)
        self.model: Any = shard(model, world, FsdpConfig(), dtype)

    def logprobs(self, answers: Sequence[tuple[Sequence[Any], str, bool]]) -> list[float]:
        """Mean log-prob per token (nats, at temperature 1) of each (messages, text, finished) under the teacher.

        The end token is part of an answer that has ended. Longer answers are not punished for their length, and an
        empty one is judged by its end alone. Collective: ranks call it together.
        """
        groups = [self._group(messages, text, finished) for messages, text, finished in answers]
        found: list[float] = []
        for first in range(0, len(groups), CHUNK):
            part = groups[first : first + CHUNK]
            width = max(len(group.answers[0]) for group in part)
            logp_BT = answer_logprobs(self.model, part, max(1, width), 1.0, MICRO_BATCH_TOKENS, self.world)
            found += [
                float(logp) / max(1, len(group.answers[0])) for logp, group in zip(logp_BT.sum(-1), part, strict=True)
            ]
        return found

    def _group(self, messages: Sequence[Any], text: str, finished: bool) -> Group:
        (prompt_ids,) = self.chat.encode([self.chat.prompt_text(list(messages))])
        return Group(prompt_ids, [self.chat.encode_behind(text) + ([self.chat.end_id] if finished else [])])
