"""Templates and tokens equal transformers' own, whatever the text says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_rows import CHATML, make_tokenizer, user
from gadcli.chat.template import ChatTemplate, TemplateRefusal
from gadcli.chat.tokenize import ChatTokenizer, end_ids, load_tokenizer
from gadcli.data.template_check import template_findings

# Qwen2.5's way to write it, a template that trims, one that splits on the text, one with `generation` blocks.
TEMPLATES = {
    "chatml": CHATML,
    "attributes and slices": (
        "{%- if messages[0]['role'] == 'system' %}{%- set rest = messages[1:] %}{{ messages[0]['content'] }}|"
        "{%- else %}{%- set rest = messages %}{%- endif %}"
        "{%- for message in rest %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "trims": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}",
    "looks inside": (
        "{% for m in messages %}{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    ),
    "through a variable": (
        "{% for m in messages %}{% set text = m['content'] %}{{ text | upper }}{{ m['content'] }}\n{% endfor %}"
    ),
    "key in a variable": "{% set k = 'content' %}{% for m in messages %}{{ m[k] | lower }}\n{% endfor %}",
    "whole message": "{% for m in messages %}{{ m | tojson }}\n{% endfor %}",
    "generation": ("{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}\n{% endfor %}"),
}
CONVERSATIONS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=12)}),
    min_size=1, max_size=4,
)  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_transformers_for_any_text(name: str) -> None:
    source = TEMPLATES[name]
    tokenizer = make_tokenizer(source)
    ours = ChatTemplate(source, dict(tokenizer.special_tokens_map))

    @settings(max_examples=60, deadline=None)
    @given(CONVERSATIONS)
    def agree(messages: list[dict[str, str]]) -> None:
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.render(messages) == theirs

    agree()


def test_a_template_that_raises_refuses_with_its_own_words() -> None:
    template = ChatTemplate(
        "{% if messages[0].role != 'user' %}{{ raise_exception('start with the user') }}{% endif %}"
        "{{ messages[0].content }}", {},
    )  # fmt: skip
    with pytest.raises(TemplateRefusal, match="start with the user"):
        template.render([{"role": "system", "content": "x"}])
    assert template.render(user("hi")) == "hi"


def end_of(tokenizer: Any) -> int:
    return ChatTokenizer.of(tokenizer).end_id


def test_answers_end_with_the_token_the_template_ends_turns_with() -> None:
    # SmolLM2: eos is <|im_end|> (id 2) and the template says the same.
    assert end_of(make_tokenizer()) == 2
    # A base model with a ChatML template keeps <|endoftext|> (id 0) as eos, but its answers end with <|im_end|>.
    assert end_of(make_tokenizer(eos="<|endoftext|>")) == 2
    # A template that puts plain text after an answer says nothing: eos it is.
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert end_of(make_tokenizer(plain, eos="<|endoftext|>")) == 0
    # Blanks before the end are the answer's, not its end (Llama 2 writes one).
    spaced = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {{ eos_token }}{% endfor %}"
    assert end_of(make_tokenizer(spaced, eos="<|endoftext|>")) == 0
    # No template: eos.
    assert end_of(make_tokenizer(None)) == 2


def test_the_ends_are_the_trained_one_the_eos_token_and_generation_configs(tmp_path: Path) -> None:
    make_tokenizer(eos="<|endoftext|>").save_pretrained(tmp_path)
    assert end_ids(tmp_path) == [2, 0]  # Qwen2.5 base: the template ends with <|im_end|>, eos is <|endoftext|>
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert end_ids(tmp_path) == [2, 0, 1]  # transformers takes the config's where there is no generation config
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 7, true, "x"]}')
    assert end_ids(tmp_path) == [2, 0]  # 7 is a letter of the byte alphabet: it would end answers in the middle
    tokens = ChatTokenizer.of(load_tokenizer(tmp_path), tmp_path)
    assert tokens.end_ids == [2, 0] and [f.reason for f in template_findings(tokens)] == ["end_differs", "end_is_text"]


def test_without_a_template_the_prompt_is_encoded_as_it_is() -> None:
    tokenizer = make_tokenizer(None)
    ours = ChatTokenizer.of(tokenizer)
    assert ours.prompt_text(user("the quick fox")) == "the quick fox"
    assert ours.encode(["the quick fox"]) == [tokenizer("the quick fox")["input_ids"]]


def test_the_light_loader_gives_the_tokenizer_that_transformers_gives(model_folder: Path) -> None:
    light, full = ChatTokenizer.from_folder(model_folder), ChatTokenizer.of(load_tokenizer(model_folder))
    assert light.fingerprint == full.fingerprint  # the whole Rust tokenizer, template, specials and EOS


def test_the_light_loader_needs_neither_transformers_nor_torch(model_folder: Path) -> None:
    import os
    import subprocess

    code = (
        "import sys; from gadcli.chat.tokenize import ChatTokenizer; ChatTokenizer.from_folder(sys.argv[1]);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code, str(model_folder)], env=env, timeout=60).returncode == 0
