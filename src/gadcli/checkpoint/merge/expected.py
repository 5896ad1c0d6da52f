"""Which tensors a model of a given config must have, with shapes: computed for the common families, no torch.

Llama, Mistral, Qwen2 and Qwen3 are spelled out here (a test compares them with transformers' own meta-device models);
any other family is asked of transformers on the meta device.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from gadcli.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
_SIZES = dict.fromkeys(
    ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim"), 2**31
) | {"num_hidden_layers": 10_000}
_OWN_CONFIG = "put the model's own config.json into huggingface/ beside the shards"
_LAYER = re.compile(r"\.layers\.(\d+)\.")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def expected_shapes(config: Mapping[str, Any], *, critic: bool, model: Any = None) -> Shapes:
    """Name -> shape of every weight the model must have, a tied head left out. model: as `meta_model` gives it.

    CheckpointError for a config whose sizes are not sizes.
    """
    _check_sizes(config)
    model = model or meta_model(config, critic=critic)
    if model is None:
        return _decoder(config, critic)
    tied = set() if critic or not model.config.tie_word_embeddings else {"lm_head.weight"}
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def _check_sizes(config: Mapping[str, Any]) -> None:
    for key in _SIZES:
        size = config.get(key)
        # a foreign config is not believed: 10^9 layers would be listed until memory is gone
        if size is not None and (type(size) is not int or not 0 < size <= _SIZES[key]):
            raise CheckpointError(f"config.json: {key} is {str(size)[:40]!r}", _OWN_CONFIG)


def _decoder(config: Mapping[str, Any], critic: bool) -> Shapes:
    try:
        kind = config["model_type"]
        hidden, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
        heads, inner = config["num_attention_heads"], config["intermediate_size"]
        kv_heads = config.get("num_key_value_heads") or heads
        default = 128 if kind == "qwen3" else hidden // heads
        head_dim = config.get("head_dim") or default
    except KeyError as error:
        raise CheckpointError(f"config.json has no {error.args[0]}", _OWN_CONFIG) from error
    attention_bias = bool(config.get("attention_bias", False)) and kind != "mistral"
    qkv_bias = kind == "qwen2" or attention_bias
    out_bias = attention_bias and kind != "qwen2"
    mlp_bias = bool(config.get("mlp_bias", False)) and kind == "llama"
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        linears = [
            ("self_attn.q_proj", heads * head_dim, hidden, qkv_bias),
            ("self_attn.k_proj", kv_heads * head_dim, hidden, qkv_bias),
            ("self_attn.v_proj", kv_heads * head_dim, hidden, qkv_bias),
            ("self_attn.o_proj", hidden, heads * head_dim, out_bias),
            ("mlp.gate_proj", inner, hidden, mlp_bias),
            ("mlp.up_proj", inner, hidden, mlp_bias),
            ("mlp.down_proj", hidden, inner, mlp_bias),
        ]
        for name, rows, columns, bias in linears:
            shapes[f"{at}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{at}{name}.bias"] = (rows,)
        shapes[f"{at}input_layernorm.weight"] = (hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
        if kind == "qwen3":
            shapes[f"{at}self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{at}self_attn.k_norm.weight"] = (head_dim,)
    if critic:
        shapes["score.weight"] = (1, hidden)
        shapes["score.bias"] = (1,)
    elif not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def meta_model(config: Mapping[str, Any], *, critic: bool) -> Any:
    """transformers' modules of a config on the meta device; None for the families spelled out here, or for no family.

    CheckpointError for a model type that transformers does not know.
    """
    _check_sizes(config)
    if config.get("model_type") in (None, *FAMILIES):
        return None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    # A copy to the bottom: transformers completes nested settings (rope) in place.
    values = copy.deepcopy({k: v for k, v in config.items() if k not in ("model_type", "auto_map")})
    try:
        parsed = AutoConfig.for_model(config.get("model_type", ""), **values)
        with torch.device("meta"):
            return (AutoModelForTokenClassification if critic else AutoModelForCausalLM).from_config(parsed)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"transformers knows no model of type {config.get('model_type')!r} like this: {str(error)[:100]}",
            "its config.json must be the model's own",
        ) from error


def compare(
    found: Mapping[str, tuple[int, ...]], wanted: Shapes, what: str = "the tensors do not fit the config"
) -> None:
    """CheckpointError listing missing, unexpected and misshapen tensors; None if all fit."""
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    shaped = sorted(n for n in wanted.keys() & found.keys() if tuple(found[n]) != wanted[n])
    parts = [
        f"{len(names)} {kind} ({names[0]}{' …' if len(names) > 1 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shaped))
        if names
    ]
    if parts:
        raise CheckpointError(
            f"{what}: {', '.join(parts)}",
            f"{_OWN_CONFIG}; --no-verify writes it anyway",
        )


def compare_with_base(
    found: Mapping[str, tuple[str, tuple[int, ...]]], base: Mapping[str, tuple[str, tuple[int, ...]]],
    config: Mapping[str, Any], *, critic: bool,
) -> tuple[str, list[str]]:  # fmt: skip
    """Holds the output's (dtype, shape) by name against those of the base's own files.

    Returns what was found equal and notes on the rest: a head that training untied, and parts of the base that the
    trained model does not have. CheckpointError for a name or shape that the base does not have.
    """
    heads = ("lm_head.", "score.", "v_head.")

    def kept(name: str) -> bool:
        layer = _LAYER.search(name)
        cut = layer is not None and int(layer[1]) >= int(config.get("num_hidden_layers") or 1 << 30)
        return not cut and not (critic and name.startswith(heads))

    wanted = {name: value for name, value in base.items() if kept(name)}
    compared = {name: value for name, value in found.items() if name in wanted or not name.startswith(heads)}
    compare(
        {name: value[1] for name, value in compared.items()},
        {name: value[1] for name, value in wanted.items() if name in compared},
        "the tensors are not those of the base's files",
    )
    lost = sorted(wanted.keys() - found.keys())
    notes = [f"{len(lost)} tensors of the base are no part of the trained model: left out ({lost[0]})"] if lost else []
    same = all(value[0] == wanted[name][0] for name, value in compared.items())
    return f"names, shapes{' and dtypes' if same else ''} as in the base's files", notes
