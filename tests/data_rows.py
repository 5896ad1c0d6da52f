"""Helpers of the data tests: a tokenizer trained on the spot, and rows to write."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# SmolLM2's template: a default system prompt unless one is given, ChatML turns.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "a question with the facts as notes", "你好 世界 answer"] * 20


def make_tokenizer(template: str | None = CHATML, eos: str = "<|im_end|>") -> Any:
    """A byte-level BPE of 400 tokens; pad = eos = <|im_end|>, as SmolLM2 has it."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos, chat_template=template)


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def good_rows(n: int, start: int = 0) -> list[tuple[Any, Any]]:
    return [(user(f"question {i}"), f"answer {i}") for i in range(start, start + n)]
