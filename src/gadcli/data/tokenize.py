"""From messages and teacher text to token ids, exactly as the model's own tokenizer and template give them.

`load_tokenizer` returns transformers' tokenizer, for training. `ChatTokenizer` wraps what is needed of it: the
Rust tokenizer, the chat template, and the id that answers end with. Commands that only count tokens build the
wrapper from the files alone: importing transformers costs seconds and 300 MB.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from gadcli.data.segments import PromptEncoder
from gadcli.data.template import ChatTemplate, Message, TemplateRefusal
from gadcli.errors import ConfigError

# Classes whose Rust tokenizer transformers takes from tokenizer.json as it stands; others are rebuilt by it.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


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


def eos_id_of(tokenizer: Any) -> int:
    """The id the model's own answers end with: what its chat template puts after an assistant's turn, else EOS.

    Both are one token for most chat models, but base models with a ChatML template keep another `eos_token`.
    """
    return ChatTokenizer.of(tokenizer).eos_id


class ChatTokenizer:
    """Messages → prompt text → ids; teacher text → ids with EOS. `fingerprint` names tokenizer and template."""

    def __init__(self, backend: Tokenizer, template: str | None, specials: dict[str, Any]) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        try:
            self.template = ChatTemplate(template, specials) if template else None
        except TemplateRefusal as error:
            raise ConfigError(str(error), "mend the model's chat_template") from None
        self.specials = specials
        self.prompts = PromptEncoder(backend, self.template)
        self.eos_id = self._end_of_answer()
        added = backend.get_added_tokens_decoder()
        self.special_texts = tuple(sorted(t.content for t in added.values() if t.special))
        text = json.dumps([backend.to_str(), template, self.eos_id, specials], sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTokenizer:
        """From a transformers fast tokenizer (or one of these, unchanged)."""
        if isinstance(tokenizer, cls):
            return tokenizer
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # ours to configure
        return cls(backend, template, dict(tokenizer.special_tokens_map))

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTokenizer:
        """From a model folder; without transformers where tokenizer.json alone defines the tokenizer."""
        folder = Path(folder)
        config_file = folder / "tokenizer_config.json"
        if (folder / "tokenizer.json").is_file() and config_file.is_file():
            try:
                config = json.loads(config_file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{config_file}: not valid JSON ({error})", "copy the model again") from None
            if config.get("tokenizer_class") in PLAIN_CLASSES and not config.get("added_tokens_decoder"):
                return cls._from_files(folder, config)
        return cls.of(load_tokenizer(folder))

    @classmethod
    def _from_files(cls, folder: Path, config: dict[str, Any]) -> ChatTokenizer:
        try:
            backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001 - the Rust binding raises the bare class
            raise ConfigError(f"{folder}/tokenizer.json: {str(error)[:120]}", "copy the model again") from None
        names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
        specials = {n: v["content"] if isinstance(v, dict) else v for n in names if (v := config.get(n))}
        template_file = folder / "chat_template.jinja"
        template = template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
        if isinstance(template, list):
            template = {t["name"]: t["template"] for t in template}.get("default")
        return cls(backend, template, specials)

    def _end_of_answer(self) -> int:
        if self.template is not None:
            turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\x02answer\x03"}]
            try:
                after = self.template.jinja(turns, add_generation_prompt=False).partition("answer\x03")[2]
            except TemplateRefusal:
                after = ""
            ids = self.backend.encode(after, add_special_tokens=False).ids
            if ids and ids[0] in self.backend.get_added_tokens_decoder():
                return int(ids[0])
        eos = self.specials.get("eos_token")
        eos_id = self.backend.token_to_id(str(eos)) if eos else None
        if eos_id is None:
            raise ConfigError("the tokenizer has no EOS token, so answers could not end", "set eos_token in its config")
        return eos_id

    def prompt_text(self, messages: list[Message]) -> str:
        """The chat template's rendering with the generation prompt. Raises TemplateRefusal."""
        return self.prompts.whole([m["role"] for m in messages], [m["content"] for m in messages])

    def encode_answers(self, texts: list[str]) -> list[Encoding]:
        """Without the EOS that follows each."""
        return self.backend.encode_batch_fast(texts, add_special_tokens=False)
