"""The text of a training example as it stands in the model's own conversations (torch-free).

The prompt is what the sampler is given. What is trained behind it is what the chat template writes there when it
renders the finished conversation: blanks or an empty `<think>` block before the answer, the answer as the template
writes it, up to the end token. Where the template renders the finished conversation otherwise than the prompt, the
teacher's own text is trained, and that is said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from gadcli.chat.template import Message, TemplateRefusal, Tools
from gadcli.chat.tokenize import ChatTokenizer

OPEN, CLOSE = "<think>", "</think>"
OPENED = re.compile(r"<think>\s*\Z")


class AnswerFault(ValueError):
    """Nothing that could be trained on would be right: `reason` is one of findings.REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


@dataclass(frozen=True)
class Example:
    """The text trained behind a prompt (the end token follows it), the answer's own text in it, and what was noticed as
    (reason, message)."""

    answer: str
    text: str
    remarks: list[tuple[str, str]] = field(default_factory=list)


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends inside `<think>`, so that the model begins by thinking."""
    return OPENED.search(prompt) is not None


def example(
    tokens: ChatTokenizer,
    prompt: str,
    messages: Sequence[Message],
    tools: Tools | None,
    answer: Message,
    *,
    hidden_thinking: bool = False,
) -> Example:
    """The example of one answer (an assistant's message) to `messages`, whose `prompt_text` is `prompt`.

    With `hidden_thinking` (`critic.reads=answer`) an answer without reasoning may follow a prompt that opens it: the
    block is closed at once. Raises AnswerFault.
    """
    remarks: list[tuple[str, str]] = []
    text = without_ends(answer["content"], tokens.end_texts)
    if text != answer["content"]:
        spelt = answer["content"][len(text) :].strip()
        remarks.append(("end_in_answer", f"the answer ends with the text of an end token, {spelt!r}: trained once"))
    if not text.strip() and not answer.get("tool_calls"):
        raise AnswerFault("teacher_eos_only", "teacher's answer is only the end-of-answer token")
    for end in tokens.end_texts:
        if end in text:
            raise AnswerFault(
                "end_inside", f"the end token {end!r} stands inside the answer: sampling would stop there"
            )
    body, difference = _behind(tokens, prompt, messages, tools, {**answer, "content": text})
    if difference:
        remarks.append(("template_rewrites", difference))
    body = _thinking(prompt, body, remarks, hidden_thinking)
    return Example(body, text, remarks)


def without_ends(answer: str, ends: Sequence[str]) -> str:
    """An answer without end tokens spelled out at its end, as scraped text has them."""
    bare = answer.rstrip()
    while (found := next((end for end in ends if bare.endswith(end)), None)) is not None:
        answer = bare = bare[: -len(found)].rstrip()
    return answer


def _behind(
    tokens: ChatTokenizer, prompt: str, messages: Sequence[Message], tools: Tools | None, answer: Message
) -> tuple[str, str]:
    """(what stands behind the prompt in the finished conversation, why it is the teacher's own text or "")."""
    text: str = answer["content"]
    if tokens.template is None:
        return text, ""
    try:
        whole = tokens.template.render([*messages, answer], tools, add_generation_prompt=False)
    except TemplateRefusal as refusal:
        return text, f"the chat template does not render the answer: {refusal}"
    if not whole.startswith(prompt):
        if opens_thinking(prompt):  # the usual way to leave reasoning out of a finished conversation
            return text, ""
        return text, "the chat template writes the prompt otherwise once the answer is there"
    tail = whole[len(prompt) :]
    bare = text.strip()
    at = tail.rfind(bare)
    end = tokens.end_texts[0] if tokens.end_of_turn is not None else None
    if end is not None and end in tail:
        tail = tail[: tail.rindex(end)]
    else:  # the template writes no end token: what it writes behind the answer is the next turn's
        tail = tail[: at + len(bare)] if at >= 0 else tail.rstrip()
    if at < 0 and _squeezed(text) not in _squeezed(tail):
        return text, "the chat template changes the answer's text in the finished conversation"
    return tail, ""


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _thinking(prompt: str, body: str, remarks: list[tuple[str, str]], hidden: bool) -> str:
    """The body, its reasoning opened once and closed. Raises AnswerFault where it never is."""
    opened = opens_thinking(prompt)
    start = body.lstrip()
    if opened and start.startswith(OPEN):
        remarks.append(("think_opened_twice", f"the prompt ends with {OPEN}, and the answer opens it again"))
        body = start.removeprefix(OPEN)
        body = body.removeprefix(prompt[prompt.rindex(OPEN) + len(OPEN) :])  # the blanks that the prompt has already
    if (opened or start.startswith(OPEN)) and CLOSE not in body:
        if opened and hidden:
            return f"{CLOSE}\n\n{body}"
        who = "the prompt" if opened else "the answer"
        raise AnswerFault("think_not_closed", f"{who} opens {OPEN} and the answer never closes it")
    if not opened and CLOSE in body and OPEN not in body.partition(CLOSE)[0]:
        remarks.append(("think_not_opened", f"the answer closes {CLOSE}, which nothing has opened"))
    return body
