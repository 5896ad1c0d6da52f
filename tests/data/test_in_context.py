"""What is trained stands in the model's own conversations as it is trained, whatever template and tokenizer do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.chat_families import (
    CHATML,
    GEMMA,
    GLM4,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    PHI3,
    QWEN3,
    R1,
    TOOLS,
    ZEPHYR,
    chat_tokenizer,
    think,
)
from data_rows import user
from gadcli.chat.tokenize import ChatTokenizer
from gadcli.data.check import open_files, scan_rows
from gadcli.data.read.findings import Finding, Summary
from gadcli.data.template_check import template_findings
from gadcli.data.tokens import Style, TokenBatch, tokenise
from gadcli.errors import ConfigError

KEYS = ("content", "teacher_response")
LAST = Style()
IM = ("<|im_start|>", "<|im_end|>")


def tokenised(
    folder: Path, tokens: ChatTokenizer, messages: list[dict[str, Any]], answer: Any, style: Style = LAST, **more: Any
) -> tuple[TokenBatch, list[Finding]]:
    """One row through the pass that `data check` and training share."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"content": messages, "teacher_response": answer, **more}) + "\n")
    batch = next(scan_rows(open_files([str(path)], KEYS, Summary()), Summary()))
    return tokenise(tokens, batch, style), batch.findings


def texts(tokens: ChatTokenizer, found: TokenBatch) -> tuple[str, str]:
    prompt, answer = found.prompts[0], found.answers[0][0].ids
    return (tokens.backend.decode(prompt, skip_special_tokens=False),
            tokens.backend.decode(answer, skip_special_tokens=False))  # fmt: skip


QUESTION, ANSWER = "What is it?", "The answer is three."
GLM = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# (tokenizer, prompt, what is trained behind it): the template's own writing of question and answer, cut behind the end.
FAMILIES = {
    "qwen2.5 base": (
        lambda: chat_tokenizer(CHATML, *IM, eos="<|endoftext|>"),
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n", "The answer is three.<|im_end|>",
    ),
    "qwen3": (
        lambda: think(QWEN3), "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nThe answer is three.<|im_end|>",
    ),
    "qwen3, not thinking": (
        lambda: think(QWEN3, enable_thinking=False),
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "The answer is three.<|im_end|>",
    ),
    "gemma": (
        lambda: chat_tokenizer(GEMMA, "<start_of_turn>", "<end_of_turn>", eos="<eos>", bos="<bos>"),
        "<bos><start_of_turn>user\nWhat is it?<end_of_turn>\n<start_of_turn>model\n",
        "The answer is three.<end_of_turn>",
    ),
    "llama 2": (
        lambda: chat_tokenizer(LLAMA2, eos="</s>", bos="<s>", kind="legacy"),
        "<s> [INST] What is it? [/INST]", "The answer is three. </s>",
    ),
    "mistral": (
        lambda: chat_tokenizer(MISTRAL, eos="</s>", bos="<s>", kind="first"),
        "<s>[INST] What is it? [/INST]", "The answer is three.</s>",
    ),
    "zephyr, metaspace": (
        lambda: chat_tokenizer(ZEPHYR, eos="</s>", bos="<s>", kind="first"),
        "<|user|>\nWhat is it?</s>\n<|assistant|>\n", "The answer is three.</s>",
    ),
    "llama 3": (
        lambda: chat_tokenizer(LLAMA3, *HEADERS, eos="<|end_of_text|>", bos="<|begin_of_text|>"),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "The answer is three.<|eot_id|>",
    ),
    "phi-3": (
        lambda: chat_tokenizer(PHI3, "<|user|>", "<|assistant|>", "<|end|>", eos="<|endoftext|>"),
        "<|user|>\nWhat is it?<|end|>\n<|assistant|>\n", "The answer is three.<|end|>",
    ),
    "glm-4": (
        lambda: chat_tokenizer(GLM4, *GLM, eos="<|endoftext|>"),
        "[gMASK]<sop><|user|>\nWhat is it?<|assistant|>", "\nThe answer is three.<|endoftext|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_trained_as_the_finished_conversation_has_it(family: str, tmp_path: Path) -> None:
    make, prompt, trained = FAMILIES[family]
    tokens = make()
    found, findings = tokenised(tmp_path, tokens, user(QUESTION), ANSWER)
    assert texts(tokens, found) == (prompt, trained) and findings == []
    # The same ids as those of the whole conversation, tokenised at once.
    assert tokens.template is not None
    whole = tokens.template.render([*user(QUESTION), {"role": "assistant", "content": ANSWER}], None, False)
    ids = tokens.backend.encode(whole, add_special_tokens=False).ids
    both = found.prompts[0] + found.answers[0][0].ids
    ended = both if tokens.end_of_turn is not None else both[:-1]  # GLM-4 writes no end: the next role is one
    assert ids[: len(ended)] == ended
    assert found.prompts[0] == tokens.backend.encode(tokens.prompt_text(user(QUESTION)), add_special_tokens=False).ids


def test_an_answer_encoded_alone_would_begin_otherwise() -> None:
    """The mutant: SentencePiece marks the first word of every text."""
    tokens = FAMILIES["zephyr, metaspace"][0]()
    alone = tokens.backend.encode(ANSWER, add_special_tokens=False).ids
    assert tokens.encode_behind(ANSWER) != alone and tokens.backend.decode(alone) == ANSWER


def test_blanks_around_an_answer_go_where_the_template_trims_them(tmp_path: Path) -> None:
    tokens = FAMILIES["gemma"][0]()
    found, findings = tokenised(tmp_path, tokens, user(QUESTION), "  It is two. \n")
    assert texts(tokens, found)[1] == "It is two.<end_of_turn>" and findings == []


def test_tokens_that_would_merge_across_the_border_are_counted_and_the_prompt_stays(tmp_path: Path) -> None:
    tokens = chat_tokenizer(CHATML, *IM, eos="<|im_end|>")
    newline, two = (tokens.backend.encode(t, add_special_tokens=False).ids for t in ("\n", "\n\n"))
    assert len(two) == 1  # so that the whole text's token runs across the prompt's end
    found, findings = tokenised(tmp_path, tokens, user(QUESTION), "\nIt is two.")
    assert [f.reason for f in findings] == ["border_merges"] and findings[0].level == "note"
    assert found.prompts[0][-1:] == newline and found.answers[0][0].ids[:1] == newline
    assert texts(tokens, found)[1] == "\nIt is two.<|im_end|>"


THOUGHT = "<think>\nTwice one is two.\n</think>\n\nIt is two."


@pytest.mark.parametrize(
    ("template", "answer", "trained", "reasons"),
    [
        (R1, THOUGHT, "Twice one is two.\n</think>\n\nIt is two.", ["think_opened_twice"]),
        (R1, THOUGHT.removeprefix("<think>\n"), "Twice one is two.\n</think>\n\nIt is two.", []),
        (QWEN3, THOUGHT, THOUGHT, []),
        (QWEN3, "<think>Twice.</think>Two.", "<think>\nTwice.\n</think>\n\nTwo.", []),
        (CHATML, THOUGHT, THOUGHT, []),
        (CHATML, THOUGHT.removeprefix("<think>\n"), THOUGHT.removeprefix("<think>\n"), ["think_not_opened"]),
    ],
)
def test_thinking_is_opened_once(template: str, answer: str, trained: str, reasons: list[str], tmp_path: Path) -> None:
    tokens = think(template)
    found, findings = tokenised(tmp_path, tokens, user(QUESTION), answer)
    assert texts(tokens, found)[1] == trained + tokens.end_texts[0]
    assert [f.reason for f in findings] == reasons


def test_thinking_that_is_never_closed_is_an_error_unless_only_the_answer_is_read(tmp_path: Path) -> None:
    tokens = think(R1)
    found, findings = tokenised(tmp_path, tokens, user(QUESTION), "It is two.")
    assert found.rows == [] and [f.reason for f in findings] == ["think_not_closed"]
    found, findings = tokenised(tmp_path, tokens, user(QUESTION), "It is two.", Style(hidden_thinking=True))
    assert texts(tokens, found)[1] == "</think>\n\nIt is two.<|end|>" and findings == []
    found, findings = tokenised(tmp_path, think(CHATML), user(QUESTION), "<think>\nIs it two?")
    assert found.rows == [] and [f.reason for f in findings] == ["think_not_closed"]


def test_a_template_that_drops_an_answers_thinking_does_not_untrain_it(tmp_path: Path) -> None:
    drops = R1.replace("<think>\n{% endif %}", "{% endif %}")  # R1's first template: the prompt opens nothing
    tokens = think(drops)
    found, findings = tokenised(tmp_path, tokens, user(QUESTION), THOUGHT)
    assert texts(tokens, found)[1].startswith(THOUGHT) and [f.reason for f in findings] == ["template_rewrites"]


@pytest.mark.parametrize("spelt", ["<end_of_turn>", "<eos>", " <end_of_turn>\n", "<eos><end_of_turn>"])
def test_an_end_spelt_out_at_the_answers_end_is_trained_once(spelt: str, tmp_path: Path) -> None:
    tokens = FAMILIES["gemma"][0]()
    found, findings = tokenised(tmp_path, tokens, user(QUESTION), f"It is two.{spelt}")
    assert texts(tokens, found)[1] == "It is two.<end_of_turn>" and [f.reason for f in findings] == ["end_in_answer"]
    assert found.answers[0][0].text == "It is two."


def test_an_end_inside_an_answer_is_an_error_and_an_answer_of_ends_too(tmp_path: Path) -> None:
    tokens = FAMILIES["gemma"][0]()
    _, findings = tokenised(tmp_path, tokens, user(QUESTION), "It is<eos> two.")
    assert [(f.reason, f.level) for f in findings if f.level == "error"] == [("end_inside", "error")]
    _, findings = tokenised(tmp_path, tokens, user(QUESTION), "<eos> <end_of_turn>")
    assert [f.reason for f in findings] == ["teacher_eos_only"]


def test_a_refused_system_role_and_a_dropped_message_are_named(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "Be brief."}, *user(QUESTION)]
    _, findings = tokenised(tmp_path, FAMILIES["gemma"][0](), system, ANSWER)
    assert [f.reason for f in findings] == ["system_refused"] and "System role not supported" in findings[0].message
    _, findings = tokenised(tmp_path, FAMILIES["gemma"][0](), [*user("a"), *user("b")], ANSWER)
    assert [f.reason for f in findings] == ["template_refuses"]
    _, findings = tokenised(tmp_path, FAMILIES["llama 2"][0](), system, ANSWER)  # silently left out by the template
    assert [f.reason for f in findings] == ["template_leaves_out"] and "'system'" in findings[0].message


# ---- no template, several templates, templates that cannot be right ----


def test_without_a_template_a_question_goes_as_it_is_and_a_chat_is_refused(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokens = chat_tokenizer(None, eos="</s>", bos="<s>")
    start, end = tokens.backend.token_to_id("<s>"), tokens.backend.token_to_id("</s>")
    tokens.backend.post_processor = TemplateProcessing(  # add_eos_token, as some base models have it
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    tokens = ChatTokenizer(tokens.backend, None, tokens.specials)
    assert [f.reason for f in template_findings(tokens)] == ["template_absent", "end_added"]
    found, _ = tokenised(tmp_path, tokens, user(QUESTION), ANSWER)
    assert texts(tokens, found) == (f"<s>{QUESTION}", f"{ANSWER}</s>")
    _, findings = tokenised(tmp_path, tokens, [*user("a"), {"role": "assistant", "content": "b"}, *user("c")], ANSWER)
    assert [f.reason for f in findings] == ["template_missing"]


def test_of_several_templates_the_default_serves_and_tool_use_serves_rows_with_tools() -> None:
    several = {"default": CHATML, "tool_use": TOOLS}
    tokens = chat_tokenizer(several, *IM, eos="<|im_end|>")
    assert "get_time" not in tokens.prompt_text(user("q"))
    assert tokens.prompt_text(user("q"), TIME).count("get_time") == 1
    with pytest.raises(ConfigError, match=r"several chat templates \(rag, tool_use\)"):
        chat_tokenizer({"tool_use": TOOLS, "rag": CHATML}, *IM, eos="<|im_end|>")


def test_a_template_that_ignores_add_generation_prompt_is_refused() -> None:
    header = CHATML.partition("{% if add_generation_prompt %}")[0]
    with pytest.raises(ConfigError, match="ignores add_generation_prompt"):
        template_findings(chat_tokenizer(header, *IM, eos="<|im_end|>"))
    always = header + "<|im_start|>assistant\n"  # written without being asked: prompts are right
    assert template_findings(chat_tokenizer(always, *IM, eos="<|im_end|>")) == []
    # Mistral's and Llama 2's templates need none.
    assert template_findings(FAMILIES["mistral"][0]()) == template_findings(FAMILIES["llama 2"][0]()) == []


def test_ends_and_starts_that_do_not_fit_the_tokenizer_are_said() -> None:
    no_token = chat_tokenizer(CHATML, "<|im_start|>", eos="</s>")  # <|im_end|> is six plain tokens here
    assert no_token.end_texts == ["</s>"]
    assert [f.reason for f in template_findings(no_token)] == ["template_end"]
    twice = chat_tokenizer("{{ bos_token }}" + GEMMA, "<start_of_turn>", eos="<end_of_turn>", bos="<bos>")
    assert [f.reason for f in template_findings(twice)] == ["start_twice"]
    dated = chat_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML, *IM, eos="<|im_end|>")
    assert [f.reason for f in template_findings(dated)] == ["template_date"]
    differs = FAMILIES["qwen2.5 base"][0]()
    assert [f.reason for f in template_findings(differs)] == ["end_differs"]
    assert differs.end_texts == ["<|im_end|>", "<|endoftext|>"]


# ---- tools ----

TIME = [{"type": "function", "function": {"name": "get_time", "description": "d", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": '{"place": "Rome"}'}}
WITH_CALL = [
    *user("What time is it in Rome?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12:00", "tool_call_id": "c1", "name": "get_time"},
]


def test_tools_calls_and_results_are_rendered(tmp_path: Path) -> None:
    tokens = chat_tokenizer(TOOLS, *IM, eos="<|im_end|>")
    found, findings = tokenised(tmp_path, tokens, WITH_CALL, "Noon.", tools=TIME)
    prompt, answer = texts(tokens, found)
    assert findings == [] and answer == "Noon.<|im_end|>"
    assert '<tool_call>get_time({"place": "Rome"})</tool_call>' in prompt  # arguments as a dict, not as quoted text
    assert "tool\n12:00<|im_end|>" in prompt and '"name": "get_time"' in prompt


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (CHATML, "tool calls (get_time)"),
        (TOOLS.replace("{{ t | tojson }}", ""), "the tools (get_time)"),
        (TOOLS.replace("{{ c.function.name }}", "call"), "tool calls (get_time)"),
        (TOOLS.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"), "message 3, of role 'tool'"),
    ],
)
def test_a_template_without_tools_refuses_them_by_name(template: str, what: str, tmp_path: Path) -> None:
    tokens = chat_tokenizer(template, *IM, eos="<|im_end|>")
    found, findings = tokenised(tmp_path, tokens, WITH_CALL, "Noon.", tools=TIME)
    assert found.rows == [] and [f.reason for f in findings] == ["template_leaves_out"]
    assert what in findings[0].message


# ---- several turns, several answers ----

CHAT = [*user("One?"), {"role": "assistant", "content": "1."}, *user("Two?"), {"role": "assistant", "content": "2."}]
EACH = Style(turns="each")


def test_each_assistant_turn_is_trained_with_its_end(tmp_path: Path) -> None:
    tokens = chat_tokenizer(CHATML, *IM, eos="<|im_end|>")
    found, findings = tokenised(tmp_path, tokens, [*CHAT, *user("Three?")], "3.", EACH)
    answer = found.answers[0][0]
    trained, at = [], 0
    for start, end in [*answer.untrained, (len(answer.ids), len(answer.ids))]:
        trained.append(tokens.decode(answer.ids[at:start]))
        at = end
    assert findings == [] and trained == ["1.<|im_end|>", "2.<|im_end|>", "3.<|im_end|>"]
    assert texts(tokens, found)[0] == "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    last, _ = tokenised(tmp_path, tokens, [*CHAT, *user("Three?")], "3.")
    assert found.prompts[0] + answer.ids == last.prompts[0] + last.answers[0][0].ids


def test_each_turn_is_refused_where_the_template_writes_earlier_turns_otherwise(tmp_path: Path) -> None:
    _, findings = tokenised(tmp_path, think(QWEN3), [*CHAT, *user("Three?")], "3.", EACH)
    assert [f.reason for f in findings] == ["turn_rewritten"]  # Qwen3 writes the empty block in last turns only


def test_every_answer_of_a_list_is_tokenised_and_named_by_its_number(tmp_path: Path) -> None:
    tokens = FAMILIES["gemma"][0]()
    found, findings = tokenised(tmp_path, tokens, user(QUESTION), ["It is two.", "Two.<eos>"])
    assert [tokens.decode(a.ids) for a in found.answers[0]] == ["It is two.<end_of_turn>", "Two.<end_of_turn>"]
    assert [(f.reason, f.field) for f in findings] == [("end_in_answer", "teacher_response[1]")]
