"""Small tokenizers of the kinds that the families have, each with its own special tokens, trained on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "What does the function do? It returns the value of its first argument.",
    "The sum of two and three is five. Is that so? Yes, it is, and 12 is not 21.",
]
LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def byte_level(specials: Sequence[str], *, words: str = "", plain: Sequence[str] = (), **names: Any) -> Any:
    """Byte-level BPE, as GPT-2's, Qwen's and Llama 3's: no unknown text, a space belongs to the word behind it.

    `words` is a family's own expression for cutting text into words; `plain` are added tokens that count as text
    (`<think>`); `names` are transformers' (eos_token, bos_token, pad_token, chat_template).
    """
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), cut]) if words else cut
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(specials) + 60,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return _wrapped(tokenizer, names)


def metaspace(specials: Sequence[str], *, prefix: bool = True, kind: str = "bpe", **names: Any) -> Any:
    """SentencePiece's kind, as Llama 2's, Mistral's, Gemma's (no `prefix`) and T5's (`kind` unigram).

    A space is `▁`; with `prefix` one is put before the text, so that the first word is tokenised as any other; what
    the vocabulary lacks is spelt in bytes.
    """
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    first = ["<unk>", *specials, *(byte_tokens if kind == "bpe" else [])]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trainer: Any = trainers.BpeTrainer(vocab_size=len(first) + 90, special_tokens=first, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=len(first) + 90, special_tokens=first, unk_token="<unk>", show_progress=False
        )
    scheme = "first" if prefix else "never"
    if kind == "bpe" and not prefix:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=kind != "bpe")
    letters = ["".join(map(chr, range(32, 127)))]
    tokenizer.train_from_iterator([*TEXT * 4, *letters], trainer)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    if kind == "bpe":  # trained as special tokens to have the lowest ids; bytes are text
        tokenizer = _with_plain_bytes(tokenizer, byte_tokens)
    if names.get("bos_token"):
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return _wrapped(tokenizer, {"unk_token": "<unk>", **names})


def _with_plain_bytes(tokenizer: Tokenizer, byte_tokens: list[str]) -> Tokenizer:
    import json

    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in byte_tokens]
    return Tokenizer.from_str(json.dumps(state))


def _wrapped(tokenizer: Tokenizer, names: dict[str, Any]) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
