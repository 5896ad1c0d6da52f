"""From messages and teacher text to token ids, exactly as the model's own tokenizer and template give them.

`load_tokenizer` returns transformers' tokenizer, for training. `ChatTokenizer` wraps what is needed of it: the
Rust tokenizer, the chat template, and the ids that end answers. Commands that only count tokens build the
wrapper from the files alone: importing transformers costs seconds and 300 MB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gadcli.chat.ends import end_of_turn, generation_ends, joined_ends
from gadcli.chat.template import ChatTemplate, Message, TemplateRefusal, Tools
from gadcli.errors import ConfigError

# Classes whose Rust tokenizer transformers takes from tokenizer.json as it stands; others are rebuilt by it.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(model_path: str | Path) -> Any:
    """Transformers' fast tokenizer of a local folder. Raises ConfigError if there is none; runs no foreign code."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_path), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{model_path}: no tokenizer: {reason}", "name a local model folder") from None
    if not tokenizer.is_fast:
        raise ConfigError(f"{model_path}: only a slow tokenizer", "convert it to tokenizer.json first")
    return tokenizer


def end_ids(model_folder: str | Path) -> list[int]:
    """Ids that end an answer of this model; the first is the one that answers are trained to end with.

    That is what the chat template writes after an assistant's turn, else `eos_token`. Then come the tokenizer's eos and
    those of `generation_config.json` (of `config.json` without one), as far as the tokenizer knows them as tokens of
    their own: an id of plain text would end answers in the middle. Raises ConfigError where answers could not end.
    """
    return ChatTokenizer.from_folder(model_folder).end_ids


class ChatTokenizer:
    """Messages → prompt text → ids. `fingerprint` names tokenizer, template and its variables.

    end_ids : what ends an answer (see the function); end_id, the first, is what answers are trained to end with.
    start_ids : what the tokenizer itself puts before a text (BOS): only prompts of models without a template get it,
    since templates write their special tokens out.
    """

    def __init__(
        self,
        backend: Tokenizer,
        template: str | Mapping[str, str] | None,
        specials: dict[str, Any],
        *,
        folder: str | Path | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend, self.specials = backend, specials
        try:
            self.template = ChatTemplate(template, specials, template_kwargs) if template else None
        except TemplateRefusal as error:
            raise ConfigError(str(error), "correct chat_template in the model's tokenizer files") from None
        self.added = backend.get_added_tokens_decoder()
        self.end_of_turn, self.text_after_answer = end_of_turn(self.template, backend)
        self.generation_ends = generation_ends(Path(folder)) if folder is not None else []
        eos = specials.get("eos_token")
        eos_id = backend.token_to_id(str(eos)) if eos else None
        self.end_ids = joined_ends(self.end_of_turn, eos_id, self.generation_ends, self.added)
        self.end_texts = [str(backend.id_to_token(i)) for i in self.end_ids]
        self.special_texts = tuple(sorted(t.content for t in self.added.values() if t.special))
        self.start_ids, self.ids_behind_texts = self._ids_around_texts() if self.template is None else ([], [])
        known = [backend.to_str(), template, self.end_ids, specials, template_kwargs or {}]
        self.fingerprint = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()

    @classmethod
    def of(
        cls, tokenizer: Any, folder: str | Path | None = None, template_kwargs: Mapping[str, Any] | None = None
    ) -> ChatTokenizer:
        """From a transformers fast tokenizer (or one of these, unchanged) and the folder of its model."""
        if isinstance(tokenizer, cls):
            return tokenizer
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # ours to configure
        specials = dict(tokenizer.special_tokens_map)
        return cls(backend, tokenizer.chat_template, specials, folder=folder, template_kwargs=template_kwargs)

    @classmethod
    def from_folder(cls, folder: str | Path, template_kwargs: Mapping[str, Any] | None = None) -> ChatTokenizer:
        """From a model folder; without transformers where tokenizer.json alone defines the tokenizer."""
        found = cls.without_transformers(folder, template_kwargs)
        return cls.of(load_tokenizer(folder), folder, template_kwargs) if found is None else found

    @classmethod
    def without_transformers(
        cls, folder: str | Path, template_kwargs: Mapping[str, Any] | None = None
    ) -> ChatTokenizer | None:
        """From a model folder's files, or None where transformers has to read them."""
        folder = Path(folder)
        if (config := _plain_config(folder)) is not None:
            try:
                backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # noqa: BLE001 - the Rust binding raises the bare class
                raise ConfigError(f"{folder}/tokenizer.json: {str(error)[:120]}", "copy the model again") from None
            specials = {n: v["content"] if isinstance(v, dict) else v for n in SPECIALS if (v := config.get(n))}
            special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
            if special.issuperset(specials.values()):  # transformers would add what is missing
                file = folder / "chat_template.jinja"
                template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
                if isinstance(template, list):
                    template = {t["name"]: t["template"] for t in template}
                return cls(backend, template, specials, folder=folder, template_kwargs=template_kwargs)
        return None

    @property
    def end_id(self) -> int:
        return self.end_ids[0]

    def prompt_text(self, messages: Sequence[Message], tools: Tools | None = None) -> str:
        """What the model is given: the chat template's rendering with the generation prompt.

        Raises TemplateRefusal, also where the template leaves a message, a tool call or the tools out. Without a
        template it is the messages' texts, a line each; TemplateRefusal where that would lose who says what.
        """
        if self.template is not None:
            self.template.refuse_what_is_left_out(messages, tools)
            try:
                return self.template.render(messages, tools)
            except TemplateRefusal as refusal:
                raise self._system_refusal(messages, tools, refusal) from None
        if len(messages) > 1 or tools or messages[0]["role"] != "user":
            what = f"{len(messages)} messages" if len(messages) > 1 else "tools" if tools else "a system message"
            raise TemplateRefusal(f"the model has no chat template to write {what} with", "template_missing")
        return str(messages[0]["content"])

    def _system_refusal(
        self, messages: Sequence[Message], tools: Tools | None, refusal: TemplateRefusal
    ) -> TemplateRefusal:
        """The refusal, named as one of the system role where the conversation without it would pass."""
        others = [m for m in messages if m["role"] != "system"]
        if self.template is None or not others or len(others) == len(messages):
            return refusal
        try:
            self.template.render(others, tools)
        except TemplateRefusal:
            return refusal
        return TemplateRefusal(f"the chat template refuses the system role: {refusal}", "system_refused")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole texts (prompts, or conversations that begin with one)."""
        found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self.start_ids + e.ids for e in found] if self.start_ids else [e.ids for e in found]

    def encode_behind(self, text: str) -> list[int]:
        """Ids of a text that goes on behind others: no word mark is written before it as before a text's first word.

        Tokenizers cut their input at special tokens, so one of these stands in for what goes before.
        """
        for token in (self.end_texts[0], *self.special_texts):
            ids = self.backend.encode(token + text, add_special_tokens=False).ids
            if ids[:1] == [self.backend.token_to_id(token)]:
                return list(ids[1:])
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def _ids_around_texts(self) -> tuple[list[int], list[int]]:
        bare = self.backend.encode("a", add_special_tokens=False).ids
        whole = self.backend.encode("a", add_special_tokens=True).ids
        for at in range(len(whole) - len(bare) + 1):
            if whole[at : at + len(bare)] == bare:
                return whole[:at], whole[at + len(bare) :]
        return [], []


def _plain_config(folder: Path) -> dict[str, Any] | None:
    """tokenizer_config.json of a folder whose tokenizer.json is all that transformers would read too, else None."""
    file = folder / "tokenizer_config.json"
    if (
        not ((folder / "tokenizer.json").is_file() and file.is_file())
        or (folder / "additional_chat_templates").exists()
    ):
        return None
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON ({error})", "copy the model again") from None
    plain = config.get("tokenizer_class") in PLAIN_CLASSES and not config.get("added_tokens_decoder")
    return config if plain else None
