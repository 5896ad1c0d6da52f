"""Models that gad does not train: what their folder's JSON files tell plan and worker alike, and, for the plan, what
the worker would say besides (does transformers know the type, are all weights there), heard from a child process.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gadcli
from gadcli.config.machine import cache_folder, version_of
from gadcli.config.modelinfo import local_model_dir, read_model_config
from gadcli.config.resolve import dump_yaml
from gadcli.config.schema import GadConfig, ModelConfig
from gadcli.errors import ConfigError, GadError
from gadcli.files import write_atomic

# Rope types whose max_position_embeddings is the scaled length already; the others multiply it by their factor.
SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn")
ADDED_TOKENS_SHOWN = 3
MODULE = "gadcli.model.trial"
PACKAGES = ("torch", "transformers", "peft")
LARGEST_HEADER = 100 << 20  # bytes; safetensors' own limit


def check_model_folder(path: str, folder: Path) -> None:
    """Refuse a folder for what its files say; `path` is what the user calls it.

    Raises ConfigError: quantised weights, a model of more than text, an encoder-decoder, a tokenizer with ids that the
    embedding lacks.
    """
    config = read_model_config(str(folder)) or {}
    _check_kind(path, config)
    _check_tokenizer(path, folder, config)


def check_context(path: str, folder: Path, max_model_len: int) -> None:
    """ConfigError where the model's positions do not reach `max_model_len` tokens."""
    context = context_length(read_model_config(str(folder)) or {})
    if context is not None and context < max_model_len:
        raise ConfigError(
            f"{path} reads {context:,} tokens at most, fewer than prompt and answer may have ({max_model_len:,})",
            f"rollout.max_model_len={context}, and data.max_prompt_length + data.max_response_length within it "
            "(gad eval: --max-prompt-length, --max-response-length)",
        )


def _check_kind(path: str, config: Mapping[str, Any]) -> None:
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = quantised.get("quant_method") or "unnamed method" if isinstance(quantised, Mapping) else quantised
        raise ConfigError(
            f"{path}: its weights are quantised ({method}), and gad trains float weights only",
            "take the model it was made from (its name without -AWQ, -GPTQ, -FP8, -bnb-4bit, …)",
        )
    kind = config.get("model_type", "no model_type")
    if isinstance(config.get("text_config"), Mapping) and set(config) & {"vision_config", "audio_config"}:
        raise ConfigError(
            f"{path}: a model of text and images or sound ({kind}); gad trains text models only",
            "take a text-only model of the family",
        )
    if config.get("is_encoder_decoder"):
        raise ConfigError(f"{path}: an encoder-decoder ({kind}); gad trains decoders only", "take a causal model")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens that the model's positions reach, as vLLM counts them; None where its config does not say."""
    inner = config.get("text_config") or config
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
    lengths = [inner[name] for name in names if isinstance(inner.get(name), int)]
    if not lengths:
        return None
    length = min(lengths)
    if isinstance(longer := inner.get("model_max_length"), int):
        length = max(length, longer)
    rope = inner.get("rope_parameters") or inner.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in (*SCALED_ALREADY, "default") and "gemma3" not in str(inner.get("model_type")):
        length = int(length * (rope.get("factor") or 1))
    return length


def _check_tokenizer(path: str, folder: Path, config: Mapping[str, Any]) -> None:
    """Ids that a text can get must have a row in the embedding; a padding token, which gad never uses, need not."""
    size = (config.get("text_config") or config).get("vocab_size")
    if not isinstance(size, int):
        return
    beyond = sorted((number, token) for token, number in _usable_tokens(folder) if number >= size)
    if beyond:
        shown = ", ".join(f"{token!r} is {number}" for number, token in beyond[:ADDED_TOKENS_SHOWN])
        raise ConfigError(
            f"{path}: its tokenizer has {len(beyond)} ids that its embedding of {size} rows lacks ({shown})",
            "resize the model first: model.resize_token_embeddings(len(tokenizer)), then save_pretrained both",
        )


def _usable_tokens(folder: Path) -> Iterator[tuple[str, int]]:
    """(token, id) of what a rendered conversation may hold: all text, and the special tokens that the template or the
    tokenizer itself writes."""
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    except (OSError, ValueError):  # none, or unreadable: whoever loads it will say so
        return
    special = {token["content"] for token in tokenizer.get("added_tokens", []) if token.get("special")}
    written = _written(folder)
    for token, number in vocabulary_of(tokenizer).items():
        if token not in special or token in written:
            yield token, number


def _written(folder: Path) -> str:
    """What rendering may write by itself: the text of the template, and BOS and EOS."""
    template = folder / "chat_template.jinja"
    settings = _settings(folder)
    named = [settings.get("bos_token"), settings.get("eos_token"), settings.get("chat_template")]
    text = template.read_text(encoding="utf-8", errors="replace") if template.is_file() else ""
    return "\n".join([text, *map(str, named)])


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def vocabulary_of(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token to id of a parsed tokenizer.json, added tokens included."""
    vocab = tokenizer.get("model", {}).get("vocab") or {}
    if isinstance(vocab, list):  # unigram models: [token, score] pairs
        vocab = {token: index for index, (token, _) in enumerate(vocab)}
    return {**vocab, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}}


def try_models(cfg: GadConfig) -> list[str]:
    """Notes on the models that are on this machine; none are loaded. Raises ConfigError as the worker would.

    A child process, which may import torch, is asked (`model.trial`); its answer is kept in the cache folder by all it
    depends on, so that a second plan of the same models costs nothing.
    """
    folders = {path: folder for path in _paths(cfg) if (folder := local_model_dir(path))}
    if not folders:
        return []
    kept = cache_folder() / "trials" / f"{_key(cfg, folders)}.json"
    if kept.is_file():
        text = kept.read_text()
    else:
        text = json.dumps(_ask(cfg), ensure_ascii=False)
        for number, folder in enumerate(folders.values()):  # the same model elsewhere gets the same answer
            text = text.replace(str(folder.resolve()), f"<model {number}>")
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, text)
    for number, path in enumerate(folders):
        text = text.replace(f"<model {number}>", json.dumps(path, ensure_ascii=False)[1:-1])
    answer = json.loads(text)
    if "error" in answer:
        raise ConfigError(answer["error"], answer["hint"] or None)
    notes: list[str] = answer["notes"]
    return notes


def _ask(cfg: GadConfig) -> dict[str, Any]:
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", MODULE], input=dump_yaml(cfg, {}), capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not answers:
        said = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise GadError(f"{MODULE} ended with {done.returncode}: {said[:200]}", "--debug; please report this")
    answer: dict[str, Any] = json.loads(answers[-1])
    return answer


def _paths(cfg: GadConfig) -> list[str]:
    critic = [cfg.critic.model.path] if cfg.trainer.critic_warmup >= 0 and cfg.critic.model.path else []
    return [cfg.actor.model.path, *critic]


def _key(cfg: GadConfig, folders: dict[str, Path]) -> str:
    """Configs, tensors' names and shapes, settings, versions; not where the folders are."""
    digest = hashlib.sha256()
    digest.update(repr([(name, version_of(name)) for name in PACKAGES]).encode())
    digest.update((Path(gadcli.__file__).parent / "model" / "trial.py").read_bytes())
    settings = (cfg.trainer.critic_warmup >= 0, cfg.critic.gradient_penalty > 0)
    digest.update(repr([settings, _part(cfg.actor.model), _part(cfg.critic.model)]).encode())
    for folder in folders.values():
        digest.update((folder / "config.json").read_bytes())
        for header in _headers(folder):
            digest.update(header)
    return digest.hexdigest()[:24]


def _part(model: ModelConfig) -> tuple[Any, ...]:
    return model.num_layers, model.lora.rank > 0, model.lora.target_modules


def _headers(folder: Path) -> Iterator[bytes]:
    """The JSON that each safetensors file begins with: names, types and shapes of its tensors."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            prefix = stream.read(8)
            size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            yield file.name.encode() + stream.read(min(size, LARGEST_HEADER))
