"""A local teacher's log-prob of answers: transformers' own, per token, the end token only of what has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from gadcli.chat.tokenize import ChatTokenizer
from gadcli.evaluate import teacher_logprob
from mutants import mutated

if TYPE_CHECKING:
    from gadcli.distributed.world import World

PROMPT = [{"role": "user", "content": "What does 3 do?"}]
ANSWERS = [("It returns 3.", True), ("It returns", False), ("", True)]


def by_hand(model_path: str, text: str, finished: bool) -> float:
    chat = ChatTokenizer.from_folder(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    prompt = chat.encode([chat.prompt_text(PROMPT)])[0]
    answer = chat.encode([text])[0] if text else []
    ids = torch.tensor([prompt + answer + [chat.end_id] * finished])
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    return float(logp[len(prompt) - 1 :].mean())


def check(module: object, model_path: str, world: World) -> None:
    teacher = module.Teacher(model_path, "float32", world)  # type: ignore[attr-defined]
    found = teacher.logprobs([(PROMPT, text, finished) for text, finished in ANSWERS])
    assert found == pytest.approx([by_hand(model_path, *answer) for answer in ANSWERS], abs=1e-4)


def test_it_is_the_mean_log_prob_per_token_and_mutants_are_not(model_path: str, world: World) -> None:
    check(teacher_logprob, model_path, world)
    for old, new in [
        ("float(logp) / max(1, len(group.answers[0]))", "float(logp)"),  # longer answers would be punished
        ("[self.chat.end_id] if finished else []", "[self.chat.end_id]"),
        ("max(1, width), 1.0, MICRO", "max(1, width), 0.7, MICRO"),
    ]:
        with pytest.raises(AssertionError):
            check(mutated("evaluate.teacher_logprob", old, new), model_path, world)
