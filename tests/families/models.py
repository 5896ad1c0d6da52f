"""The matrix: families of models at two layers, random weights, with their own kind of tokenizer, template and ends.

Templates are shortened, but keep what sets a family apart: who writes BOS, which roles are refused, what ends an
answer, what opens the assistant's turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers import AutoModelForCausalLM

from families.tokenizers_of import LLAMA3_WORDS, byte_level, metaspace

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN2 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}<|assistant|>\n{% endif %}"
)
STARCODER2 = (
    "{% for m in messages %}### {{ 'Response' if m['role'] == 'assistant' else 'Instruction' }}\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Response\n{% endif %}"
)
GRANITE = (
    "{% for m in messages %}<|start_of_role|>{{ m['role'] }}<|end_of_role|>"
    "{{ m['content'] }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
WINDOW = 24  # tokens: below the tests' texts, so that sliding windows show


@dataclass(frozen=True)
class Family:
    """How one family's folder is made. `ends` are the tokens of generation_config.json's eos_token_id."""

    title: str
    config: type
    tokenizer: Callable[[], Any]
    ends: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


def _chatml(eos: str = "<|im_end|>", template: str = CHATML, **more: Any) -> Callable[[], Any]:
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return lambda: byte_level(specials, eos_token=eos, pad_token="<|endoftext|>", chat_template=template, **more)


def _llama2(template: str = INST) -> Any:
    return metaspace(("<s>", "</s>"), bos_token="<s>", eos_token="</s>", chat_template=template)


def _llama3() -> Any:
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return byte_level(
        specials, words=LLAMA3_WORDS, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA3
    )


def _gemma() -> Any:
    specials = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
    return metaspace(
        specials, prefix=False, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=GEMMA
    )


def _phi3() -> Any:
    specials = ("<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>")
    return metaspace(specials, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=PHI3)


def _glm4() -> Any:
    specials = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    return byte_level(specials, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=GLM4)


def _olmo2() -> Any:
    return byte_level(
        ("<|endoftext|>", "<|pad|>"), bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>",
        chat_template=OLMO2,
    )  # fmt: skip


def _starcoder2() -> Any:
    return byte_level(("<|endoftext|>",), eos_token="<|endoftext|>", chat_template=STARCODER2)


def _granite() -> Any:
    specials = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")
    return byte_level(specials, eos_token="<|end_of_text|>", pad_token="<|end_of_text|>", chat_template=GRANITE)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1000000.0}
GEMMA_SETTINGS = {"query_pre_attn_scalar": 32, "sliding_window": WINDOW, "hidden_activation": "gelu_pytorch_tanh"}

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", tf.LlamaConfig, _llama2, ("</s>",)),
    "llama3": Family("Llama 3 (scaled rope)", tf.LlamaConfig, _llama3, ("<|end_of_text|>", "<|eot_id|>"),
                     {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": Family("Mistral", tf.MistralConfig, _llama2, ("</s>",), {"sliding_window": WINDOW}),
    "qwen2": Family("Qwen2", tf.Qwen2Config, _chatml(template=QWEN2), ("<|im_end|>", "<|endoftext|>"),
                    {"tie_word_embeddings": True}),
    "qwen25base": Family("Qwen2.5 base", tf.Qwen2Config, _chatml("<|endoftext|>", QWEN2), ("<|endoftext|>",)),
    "qwen3": Family("Qwen3", tf.Qwen3Config, _chatml(template=QWEN3, plain=("<think>", "</think>")),
                    ("<|im_end|>", "<|endoftext|>")),
    "qwen3moe": Family("Qwen3-MoE", tf.Qwen3MoeConfig, _chatml(template=QWEN3, plain=("<think>", "</think>")),
                       ("<|im_end|>", "<|endoftext|>"), MOE),
    "mixtral": Family("Mixtral", tf.MixtralConfig, _llama2, ("</s>",),
                      {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": Family("Gemma 2", tf.Gemma2Config, _gemma, ("<eos>", "<end_of_turn>"),
                     {**GEMMA_SETTINGS, "tie_word_embeddings": True, "attn_logit_softcapping": 50.0,
                      "final_logit_softcapping": 30.0}),
    "gemma3": Family("Gemma 3 (text)", tf.Gemma3TextConfig, _gemma, ("<eos>", "<end_of_turn>"),
                     {**GEMMA_SETTINGS, "tie_word_embeddings": True}),
    "phi3": Family("Phi-3", tf.Phi3Config, _phi3, ("<|endoftext|>", "<|end|>", "<|assistant|>"),
                   {"head_dim": None}),
    "glm4": Family("GLM-4", tf.Glm4Config, _glm4, ("<|endoftext|>", "<|user|>", "<|observation|>")),
    "olmo2": Family("OLMo 2", tf.Olmo2Config, _olmo2, ("<|endoftext|>",), {"head_dim": None}),
    "smollm3": Family("SmolLM3", tf.SmolLM3Config, _chatml(), ("<|im_end|>",),
                      {"head_dim": None, "no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "starcoder2": Family("StarCoder2", tf.Starcoder2Config, _starcoder2, ("<|endoftext|>",),
                         {"head_dim": None, "tie_word_embeddings": True, "sliding_window": WINDOW}),
    "granite": Family("Granite", tf.GraniteConfig, _granite, ("<|end_of_text|>",),
                      {"head_dim": None, "logits_scaling": 3.0, "embedding_multiplier": 2.0,
                       "residual_multiplier": 0.5, "attention_multiplier": 0.1, "tie_word_embeddings": True}),
    "yarn": Family("Qwen2.5 with YaRN", tf.Qwen2Config, _chatml(template=QWEN2), ("<|im_end|>", "<|endoftext|>"),
                   {"rope_parameters": YARN}),
}  # fmt: skip


def write_family(folder: Path, name: str, *, seed: int = 0, scale: float = 3.0) -> Path:
    """A hub-like folder of the family: config, safetensors, tokenizer with its template, generation config."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in family.ends]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(family, tokenizer))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:  # large enough that no two tokens look alike
                p.mul_(scale)
    model.save_pretrained(folder)
    generation = {"eos_token_id": ends if len(ends) > 1 else ends[0], "do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def _config(family: Family, tokenizer: Any) -> Any:
    """Head size 32 is the smallest that vLLM's CPU attention takes; two key-value heads under four."""
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 3, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(family.ends[0]),
    }  # fmt: skip
    settings |= family.settings
    if settings["head_dim"] is None:  # families that have no such key
        del settings["head_dim"]
    return family.config(**settings)
