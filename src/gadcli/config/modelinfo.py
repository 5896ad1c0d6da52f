"""What a model is, from its config.json alone: counts of parameters and bytes, without torch or transformers.

Covers the Llama family's layout: Llama, Mistral, Qwen2, Qwen3, Gemma 1-3, SmolLM, and the mixtures of experts among
them. The counts are tested against transformers' own modules.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gadcli.errors import ConfigError

# Layers with norms around attention and MLP on both sides (4 instead of 2), and with norms on queries and keys.
FOUR_NORMS = ("gemma2", "gemma3", "gemma3_text")
QK_NORMS = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text")
QKV_BIAS = ("qwen2", "qwen2_moe")
TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3", "gemma3_text")
HEAD_DIM_DEFAULT = {"gemma": 256, "gemma2": 256, "gemma3": 256, "gemma3_text": 256, "qwen3": 128, "qwen3_moe": 128}


@dataclass(frozen=True)
class ModelShape:
    """The numbers that decide memory and work. All counts are of scalars unless said otherwise."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    experts: int = 0  # 0: one dense MLP a layer
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norms: int = 2
    gated_silu: bool = False  # one dense MLP of silu(gate) * up a layer

    @property
    def attention_params(self) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = self.hidden * (q + 2 * kv) + q * self.hidden
        biases = (q + 2 * kv) * self.qkv_bias + self.hidden * self.out_bias
        return weights + biases + 2 * self.head_dim * self.qk_norm

    @property
    def mlp_params(self) -> int:
        one = 3 * self.hidden * self.intermediate + (2 * self.intermediate + self.hidden) * self.mlp_bias
        return one * self.experts + self.hidden * self.experts if self.experts else one

    @property
    def layer_params(self) -> int:
        return self.attention_params + self.mlp_params + self.norms * self.hidden

    @property
    def embedding_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def backbone_params(self) -> int:
        """Embedding, layers and the final norm, without a head."""
        return self.embedding_params + self.layers * self.layer_params + self.hidden

    @property
    def causal_params(self) -> int:
        """With the vocabulary head; a tied head is the embedding and counts once."""
        return self.backbone_params + (0 if self.tied else self.embedding_params)

    @property
    def critic_params(self) -> int:
        """With a scalar head (weight and bias)."""
        return self.backbone_params + self.hidden + 1

    def lora_params(self, rank: int) -> int:
        """Adapters on every linear layer of the backbone: rank * (in + out) each."""
        q, kv, h, i = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        attention = (h + q) + 2 * (h + kv) + (q + h)
        return rank * self.layers * (attention + 3 * (h + i) * max(self.experts, 1))

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize

    def cut(self, num_layers: int) -> ModelShape:
        """Only the first layers; 0 keeps all."""
        return replace(self, layers=min(num_layers, self.layers)) if num_layers else self


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape from a parsed config.json; ConfigError names what is missing."""
    config = config.get("text_config") or config
    kind = str(config.get("model_type", ""))
    missing = [k for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size") if k not in config]
    if missing:
        raise ConfigError(f"a model's config.json ({kind or 'no model_type'}) lacks {', '.join(missing)}")
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    intermediate = config.get("intermediate_size", 4 * hidden)
    if experts:
        intermediate = config.get("moe_intermediate_size", intermediate)
    attention_bias = bool(config.get("attention_bias", False))
    return ModelShape(
        model_type=kind,
        hidden=hidden,
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or HEAD_DIM_DEFAULT.get(kind) or hidden // heads),
        intermediate=int(intermediate),
        vocab=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", kind in TIED_BY_DEFAULT)),
        experts=experts,
        qkv_bias=attention_bias or kind in QKV_BIAS,
        out_bias=attention_bias and kind not in QKV_BIAS,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=kind in QK_NORMS,
        norms=4 if kind in FOUR_NORMS else 2,
        gated_silu=not experts and (config.get("hidden_act") or config.get("hidden_activation") or "silu") == "silu",
    )


def local_model_dir(path: str) -> Path | None:
    """The folder with a local model's config.json: the path (or that file), a checkpoint's huggingface/, or the hub's
    cache."""
    if not path:
        return None
    folder = Path(path).expanduser()
    if folder.name == "config.json" and folder.is_file():
        return folder.parent
    for candidate in (folder, folder / "huggingface"):
        if (candidate / "config.json").is_file():
            return candidate
    if path.count("/") == 1 and not folder.exists():
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{path.replace('/', '--')}" / "snapshots"
        found = sorted(hub.glob("*/config.json"), key=lambda file: file.stat().st_mtime)
        if found:
            return found[-1].parent
    return None


def read_model_config(path: str) -> dict[str, Any] | None:
    """A model's config.json where it is on this machine, else None (a hub name never fetched, a .gguf file)."""
    folder = local_model_dir(path)
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / 'config.json'}: holds no model's config")
    return config
