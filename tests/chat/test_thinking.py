"""What the discriminator reads of an answer that thinks (`critic.reads=answer`)."""

from __future__ import annotations

import pytest

from data.chat_families import CHATML, R1, chat_tokenizer, think
from gadcli.chat.thinking import AnswerReader
from gadcli.chat.tokenize import ChatTokenizer

ASKED = "<|im_start|>assistant\n"


def read(tokens: ChatTokenizer, prompt: str, answer: str, reads: str = "answer") -> str:
    given, ids = (tokens.backend.encode(text, add_special_tokens=False).ids for text in (prompt, answer))
    return tokens.decode(AnswerReader(reads, tokens.decode)(given, ids))


@pytest.mark.parametrize(
    ("prompt", "answer", "left"),
    [
        (ASKED, "Two.<|im_end|>", "Two.<|im_end|>"),
        (ASKED, "<think>\nOne and one.\n</think>\n\nTwo.<|im_end|>", "Two.<|im_end|>"),
        (ASKED + "<think>\n", "One and one.\n</think>\n\nTwo.<|im_end|>", "Two.<|im_end|>"),
        (ASKED + "<think>\n\n</think>\n\n", "Two.<|im_end|>", "Two.<|im_end|>"),  # the prompt has closed it
        (ASKED, "Two. <think>No?</think> Yes.<|im_end|>", "Two.  Yes.<|im_end|>"),  # a blank in one token with the word
        (ASKED + "<think>\n", "a</think>Two.<think>b</think>Yes.<|im_end|>", "Two.Yes.<|im_end|>"),
        (ASKED, "<think>\n你好 is it", " it"),  # cut while thinking: the last token stays, so that nothing is empty
        (ASKED + "<think>\n", "Is it<|im_end|>", "<|im_end|>"),
    ],
)
def test_what_stands_in_think_blocks_is_not_read(prompt: str, answer: str, left: str) -> None:
    tokens = think(CHATML)
    assert read(tokens, prompt, answer) == left
    assert read(tokens, prompt, answer, "all") == answer


def test_tags_of_several_tokens_are_found_too() -> None:
    tokens = chat_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", eos="<|im_end|>")  # <think> is plain text here
    assert len(tokens.backend.encode("<think>", add_special_tokens=False).ids) > 1
    assert read(tokens, ASKED, "<think>\n你 好\n</think>\n\n世界.<|im_end|>") == "世界.<|im_end|>"


def test_equal_answers_are_read_equally_whoever_thought_before_them() -> None:
    """Otherwise the discriminator could tell the sides apart by what is left of the block."""
    tokens = think(R1)
    prompt = "<|Assistant|><think>\n"
    student = read(tokens, prompt, "A long thought.\n\nAnd more.\n</think>\n\nIt is two.<|end|>")
    teacher = read(tokens, prompt, "</think>\n\nIt is two.<|end|>")  # as `hidden_thinking` writes it
    assert student == teacher == "It is two.<|end|>"
