"""Which tokens end an answer, by a model's template, tokenizer and generation config (torch-free)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gadcli.chat.template import ChatTemplate, TemplateRefusal
from gadcli.errors import ConfigError


def generation_ends(folder: Path) -> list[int]:
    """The `eos_token_id`s of a model folder's generation_config.json, or of its config.json; [] where it has none."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        ids = found.get("eos_token_id") if isinstance(found, dict) else None
        if ids is not None:
            return [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int]
    return []


def end_of_turn(template: ChatTemplate | None, backend: Tokenizer) -> tuple[int | None, str]:
    """(id, text): the token that a template writes after an assistant's turn, None where it writes no token there.

    Then the text says what it writes instead, without blanks around it.
    """
    if template is None:
        return None, ""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\x02answer\x03"}]
    try:
        after = template.render(turns, add_generation_prompt=False).partition("answer\x03")[2]
    except TemplateRefusal:
        return None, ""
    added = backend.get_added_tokens_decoder()
    for found in backend.encode(after, add_special_tokens=False).ids:
        text = added[found].content if found in added else backend.decode([found], skip_special_tokens=False)
        if found in added and text.strip():  # some tokenizers add runs of blanks
            return found, text
        if text.strip():
            break
    return None, after.strip()


def joined_ends(first: int | None, eos: int | None, others: Iterable[int], added: dict[int, Any]) -> list[int]:
    """See `tokenize.end_ids`. Raises ConfigError where there is no end at all."""
    found = [i for i in (first, eos) if i is not None] + [i for i in others if i in added]
    if not found:
        raise ConfigError("the tokenizer has no EOS token, so answers could not end", "set eos_token in its config")
    return list(dict.fromkeys(found))
