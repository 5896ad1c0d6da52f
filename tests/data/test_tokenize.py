"""Templates and tokens equal transformers' own, with and without the fast path, whatever the text says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from data_rows import CHATML, make_tokenizer, user
from gadcli.data import segments
from gadcli.data.template import ChatTemplate, TemplateRefusal
from gadcli.data.tokenize import ChatTokenizer, eos_id_of, load_tokenizer

# Qwen2.5's way to write it, a template that trims, one that splits on the text, one with `generation` blocks.
TEMPLATES = {
    "chatml": (CHATML, True),
    "attributes and slices": (
        "{%- if messages[0]['role'] == 'system' %}{%- set rest = messages[1:] %}{{ messages[0]['content'] }}|"
        "{%- else %}{%- set rest = messages %}{%- endif %}"
        "{%- for message in rest %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        True,
    ),
    "trims": ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}", False),
    "looks inside": (
        "{% for m in messages %}{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}",
        False,
    ),
    "through a variable": (
        "{% for m in messages %}{% set text = m['content'] %}{{ text | upper }}{{ m['content'] }}\n{% endfor %}",
        False,
    ),
    "key in a variable": ("{% set k = 'content' %}{% for m in messages %}{{ m[k] | lower }}\n{% endfor %}", False),
    "whole message": ("{% for m in messages %}{{ m | tojson }}\n{% endfor %}", False),
    "generation": (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}\n{% endfor %}",
        True,
    ),
}
CONVERSATIONS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=12)}),
    min_size=1, max_size=4,
)  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_transformers_for_any_text(name: str) -> None:
    source, copies = TEMPLATES[name]
    tokenizer = make_tokenizer(source)
    ours = ChatTemplate(source, dict(tokenizer.special_tokens_map))
    assert ours.copies is copies  # the fast path is taken where it is safe, and nowhere else

    @settings(max_examples=60, deadline=None)
    @given(CONVERSATIONS)
    def agree(messages: list[dict[str, str]]) -> None:
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.render(messages) == theirs
        assert ours.jinja(messages) == theirs

    agree()


def with_added(tokenizer: Any, *tokens: AddedToken) -> ChatTokenizer:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_tokens(list(tokens))
    return ChatTokenizer(backend, CHATML, {"eos_token": "<|im_end|>"})


def metaspace() -> ChatTokenizer:
    """As Llama 2: the first stretch of a text gets a space before it, the others do not."""
    backend = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return ChatTokenizer(backend, CHATML, {"eos_token": "<|im_end|>"})


# What a tokenizer knows beside the special tokens, and whether prompts may still be cut at these.
NEIGHBOURS = AddedToken("q", single_word=True)
TOKENIZERS: dict[str, tuple[Callable[[], ChatTokenizer], bool]] = {
    "plain": (lambda: ChatTokenizer.of(make_tokenizer()), True),
    "harmless words": (lambda: with_added(make_tokenizer(), AddedToken("quick"), AddedToken("<tool>")), True),
    "begins before": (lambda: with_added(make_tokenizer(), AddedToken("x<|", normalized=False)), False),
    "goes on behind": (lambda: with_added(make_tokenizer(), AddedToken("|>x", normalized=False)), False),
    "a longer one": (lambda: with_added(make_tokenizer(), AddedToken("<|im_end|>\n", normalized=False)), True),
    "looks at its neighbours": (lambda: with_added(make_tokenizer(), NEIGHBOURS), False),
    "depends on the place": (metaspace, False),
}
PIECES = ["<|im_end|>", "<|im_", "x", "q", "user", "|>", "\n", " ", "quick", "é漢", "<tool>", "7"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_in_parts_have_the_ids_of_whole_prompts(name: str) -> None:
    make, cut = TOKENIZERS[name]
    tokenizer = make()
    assert (tokenizer.prompts.plan(("user",)).fixed > 0) is cut

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from([("user",), ("system", "user"), ("user", "assistant", "user")]),
                              st.tuples(TEXTS, TEXTS, TEXTS)), min_size=1, max_size=4))  # fmt: skip
    def agree(rows: list[tuple[tuple[str, ...], tuple[str, ...]]]) -> None:
        encoder = tokenizer.prompts
        rows = [(roles, contents[: len(roles)]) for roles, contents in rows]
        plans = [encoder.plan(roles) for roles, _ in rows]
        found = encoder.encode(plans, [encoder.texts(p, *row) for p, row in zip(plans, rows, strict=True)])
        expected = [tokenizer.backend.encode(encoder.whole(*row), add_special_tokens=False).ids for row in rows]
        assert [found.ids(j) for j in range(len(rows))] == expected
        assert found.lengths().tolist() == list(map(len, expected))
        assert found.keep([len(rows) - 1]).ids(0) == expected[-1]

    agree()


def test_cutting_at_every_special_token_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: without the look for overlaps, a token that reaches over the cut is torn."""
    monkeypatch.setattr(segments, "_overlaps", lambda other, token: False)
    monkeypatch.setattr(segments, "PROBES", ("a",))
    tokenizer = with_added(make_tokenizer(), AddedToken("x<|", normalized=False))
    encoder, row = tokenizer.prompts, (("user",), ("x",))
    found = encoder.encode([encoder.plan(row[0])], [encoder.texts(encoder.plan(row[0]), *row)])
    assert found.ids(0) != tokenizer.backend.encode(encoder.whole(*row), add_special_tokens=False).ids


def test_a_template_that_raises_refuses_with_its_own_words() -> None:
    template = ChatTemplate(
        "{% if messages[0].role != 'user' %}{{ raise_exception('start with the user') }}{% endif %}"
        "{{ messages[0].content }}", {},
    )  # fmt: skip
    with pytest.raises(TemplateRefusal, match="start with the user"):
        template.render([{"role": "system", "content": "x"}])
    assert template.render(user("hi")) == "hi"


def test_answers_end_with_the_token_the_template_ends_turns_with() -> None:
    # SmolLM2: eos is <|im_end|> (id 2) and the template says the same.
    assert eos_id_of(make_tokenizer()) == 2
    # A base model with a ChatML template keeps <|endoftext|> (id 0) as eos, but its answers end with <|im_end|>.
    assert eos_id_of(make_tokenizer(eos="<|endoftext|>")) == 2
    # A template that puts plain text after an answer says nothing: eos it is.
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert eos_id_of(make_tokenizer(plain, eos="<|endoftext|>")) == 0
    # No template: eos.
    assert eos_id_of(make_tokenizer(None)) == 2


def test_without_a_template_the_prompt_is_encoded_as_it_is() -> None:
    tokenizer = make_tokenizer(None)
    ours = ChatTokenizer.of(tokenizer)
    assert ours.prompt_text(user("the quick fox")) == "the quick fox"
    prompts = ours.prompts.encode([ours.prompts.plan(("user",))], [["the quick fox"]])
    assert prompts.ids(0) == tokenizer("the quick fox")["input_ids"]


def test_the_light_loader_gives_the_tokenizer_that_transformers_gives(model_folder: Path) -> None:
    light, full = ChatTokenizer.from_folder(model_folder), ChatTokenizer.of(load_tokenizer(model_folder))
    assert light.fingerprint == full.fingerprint  # the whole Rust tokenizer, template, specials and EOS


def test_the_light_loader_needs_neither_transformers_nor_torch(model_folder: Path) -> None:
    import os
    import subprocess

    code = (
        "import sys; from gadcli.data.tokenize import ChatTokenizer; ChatTokenizer.from_folder(sys.argv[1]);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code, str(model_folder)], env=env, timeout=60).returncode == 0
