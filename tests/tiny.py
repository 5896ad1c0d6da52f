"""Two-layer models of several families with random weights, and a byte-level BPE trained on the spot, in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "gemma3-window", "gemma2", "mistral")
WINDOW = 6  # shorter than the texts of tests


def tiny_tokenizer(text: str = "What does a function do? It returns a value.", vocabulary: int = 320) -> Any:
    """Bytes and a few merges learnt from `text`; answers end with <|im_end|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE
    )


def tiny_config(family: str, vocab_size: int, *, tied: bool, layers: int = 2) -> Any:
    """Head size 32, the smallest that vLLM's CPU attention takes; two KV heads under four."""
    shared: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
        "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    if family == "gemma3":
        return Gemma3TextConfig(**shared, layer_types=["full_attention"] * layers, query_pre_attn_scalar=32)
    if family == "gemma3-window":
        kinds = (["sliding_attention", "full_attention"] * layers)[:layers]
        return Gemma3TextConfig(**shared, layer_types=kinds, query_pre_attn_scalar=32, sliding_window=WINDOW)
    if family == "gemma2":  # sliding windows, capped attention scores, capped logits
        return Gemma2Config(
            **shared, query_pre_attn_scalar=32, sliding_window=WINDOW, attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        )  # fmt: skip
    if family == "gpt_oss":  # attention sinks, which our attention does not know
        return GptOssConfig(**shared, num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW)
    if family == "qwen3_moe":
        return Qwen3MoeConfig(**shared, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    if family == "cohere":  # logits times a number of the config, which our head does not know
        del shared["head_dim"]
        return CohereConfig(**shared, logit_scale=0.3)
    if family == "mistral":
        return MistralConfig(**shared, sliding_window=WINDOW)
    return {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family](**shared)


def write_tiny_model(folder: Path, family: str = "llama", *, tied: bool = True, seed: int = 0, layers: int = 2,
                     **tokenizer_options: Any) -> Path:  # fmt: skip
    """A Hugging Face folder with weights large enough that no two tokens look alike."""
    tokenizer = tiny_tokenizer(**tokenizer_options)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, len(tokenizer), tied=tied, layers=layers))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
    model.save_pretrained(folder)
    return folder


def write_tiny_data(path: Path, rows: int = 24) -> Path:
    """Questions of several lengths with short answers."""
    content = [[{"role": "user", "content": f"What does {i} do{'?' * (1 + i % 5)}"}] for i in range(rows)]
    teacher = [f"It returns {i}{'.' * (i % 4)}" for i in range(rows)]
    pq.write_table(pa.table({"content": content, "teacher_response": teacher}), path)
    return path
