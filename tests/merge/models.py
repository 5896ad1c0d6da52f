"""Small models for the merge tests: a Llama of 2 layers, tied or not, a critic, LoRA. Seeded; no download."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

RANK, ALPHA = 4, 6


def llama_config(**changes: object) -> LlamaConfig:
    """vocab 37 and intermediate 50: nothing divides by 2 or 3 evenly, so every chunking is uneven."""
    values = dict(vocab_size=37, hidden_size=24, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)  # fmt: skip
    return LlamaConfig(**(values | changes))


def build(kind: str) -> tuple[nn.Module, tuple[int, int] | None]:
    """(model, adapter's (rank, alpha)) of "untied", "tied", "critic", "bf16", "lora", "peft", "peft-critic"."""
    torch.manual_seed(7)
    if "critic" in kind:
        model: nn.Module = LlamaForTokenClassification(llama_config(num_labels=1))
    else:
        model = LlamaForCausalLM(llama_config(tie_word_embeddings=kind == "tied"))
    if kind == "bf16":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8 if parameter.dim() > 1 else 1)  # so that attention looks at positions
        model = model.to(torch.bfloat16)
    if kind not in ("lora", "peft", "peft-critic"):
        return model, None
    # TOKEN_CLS makes peft keep two heads: the base's, and under modules_to_save the one that is trained
    task = "TOKEN_CLS" if kind == "peft-critic" else None
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], task_type=task)
    if kind != "lora":  # verl wraps the whole model, so that keys start with base_model.model.
        from peft import get_peft_model

        model = get_peft_model(model, lora)
    else:
        inject_adapter_in_model(lora, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                "lora_B" in name or "score.modules_to_save" in name
            ):  # zero at the start: a fused adapter would change nothing
                parameter.normal_(std=0.3)
            if "lora_" in name:
                parameter.data = parameter.data.float()
    return model, (RANK, ALPHA)
