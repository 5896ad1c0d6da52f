"""What a model's template and tokenizer say about each other before any row is read (torch-free)."""

from __future__ import annotations

from gadcli.chat.in_context import CLOSE, OPEN
from gadcli.chat.template import TemplateRefusal
from gadcli.chat.tokenize import ChatTokenizer
from gadcli.data.read.findings import Finding
from gadcli.errors import ConfigError

QUESTION = {"role": "user", "content": "\x02question\x03"}
ANSWER = {"role": "assistant", "content": "\x02answer\x03"}


def template_findings(tokens: ChatTokenizer) -> list[Finding]:
    """What is worth saying of a model's template and ends of answers.

    Raises ConfigError for a template that writes a header before answers but not as generation prompt: students would
    have to write it themselves, and would do so in every chat.
    """
    found = _ends(tokens)
    if tokens.template is None:
        found.append(_finding("template_absent", "no chat template: prompts are plain text"))
        if tokens.ids_behind_texts:
            texts = "".join(str(tokens.backend.id_to_token(i)) for i in tokens.ids_behind_texts)
            found.append(_finding("end_added", f"the tokenizer adds {texts!r} behind every text"))
        return found
    try:
        bare = tokens.template.render([QUESTION], add_generation_prompt=False)
        prompt = tokens.template.render([QUESTION])
        whole = tokens.template.render([QUESTION, ANSWER], add_generation_prompt=False)
    except TemplateRefusal:
        return found  # rows will tell, in the template's words
    header = whole[len(prompt) :].partition(ANSWER["content"])[0] if whole.startswith(prompt) else ""
    header = header.replace(OPEN, "").replace(CLOSE, "").strip()
    if bare == prompt and header:
        raise ConfigError(
            f"the chat template writes {header!r} before answers but ignores add_generation_prompt",
            "add {% if add_generation_prompt %}…{% endif %} with that text to the end of the template",
        )
    start = tokens.backend.token_to_id(str(tokens.specials.get("bos_token")))
    if start is not None and tokens.encode([prompt])[0][:2] == [start, start]:
        found.append(_finding("start_twice", f"prompts begin with {tokens.specials['bos_token']!r} twice"))
    if tokens.template.writes_date:
        found.append(_finding("template_date", "prompts hold the date of the day they were first tokenised"))
    return found


def _ends(tokens: ChatTokenizer) -> list[Finding]:
    found = []
    if tokens.end_of_turn is None and tokens.text_after_answer:
        message = f"answers are trained to end with {tokens.end_texts[0]!r}, not with {tokens.text_after_answer[:40]!r}"
        found.append(_finding("template_end", message))
    if tokens.end_of_turn is not None and tokens.specials.get("eos_token") not in (None, tokens.end_texts[0]):
        message = f"answers end with {tokens.end_texts[0]!r}, eos_token is {tokens.specials['eos_token']!r}"
        found.append(_finding("end_differs", message))
    for end in tokens.generation_ends:
        if end not in tokens.added:
            message = f"eos_token_id names {end}, which is {tokens.backend.id_to_token(end)!r}: left out"
            found.append(_finding("end_is_text", message))
    return found


def _finding(reason: str, message: str) -> Finding:
    return Finding(reason, "the model's tokenizer", message)
