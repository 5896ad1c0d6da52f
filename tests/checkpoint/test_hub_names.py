"""Names and pieces of weights as the hub's files have them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from gadcli.checkpoint.hub_names import as_on_hub

SIZES = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8)  # fmt: skip
EXPERTS = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=10)
# family -> config and the hub's names of expert 2's gate, up and down in layer 0 (as in the index of the models named)
FAMILIES = {
    "Qwen/Qwen3-30B-A3B": (Qwen3MoeConfig(**SIZES, **EXPERTS), "model.layers.0.mlp.experts.2.{}.weight",
                           ("gate_proj", "up_proj", "down_proj")),
    "Qwen/Qwen1.5-MoE-A2.7B": (Qwen2MoeConfig(**SIZES, **EXPERTS), "model.layers.0.mlp.experts.2.{}.weight",
                               ("gate_proj", "up_proj", "down_proj")),
    "mistralai/Mixtral-8x7B-v0.1": (MixtralConfig(**SIZES, num_local_experts=3),
                                    "model.layers.0.block_sparse_moe.experts.2.{}.weight", ("w1", "w3", "w2")),
}  # fmt: skip


@pytest.mark.parametrize("hub", FAMILIES)
def test_packed_experts_come_apart_as_the_hubs_files_have_them(hub: str) -> None:
    """Packed, gate and up lie one above the other: [experts, 2 * inner, hidden]."""
    config, pattern, (gate, up, down) = FAMILIES[hub]
    model = AutoModelForCausalLM.from_config(config)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        found |= as_on_hub(model, name, tensor)
    packed = model.model.layers[0].mlp.experts
    inner = packed.gate_up_proj.shape[1] // 2
    assert torch.equal(found[pattern.format(gate)], packed.gate_up_proj[2, :inner])
    assert torch.equal(found[pattern.format(up)], packed.gate_up_proj[2, inner:])
    assert torch.equal(found[pattern.format(down)], packed.down_proj[2])
    assert len([n for n in found if ".experts." in n]) == 9
    assert sum(t.numel() for t in found.values()) == sum(t.numel() for t in model.state_dict().values())


def test_a_dense_models_weights_keep_names_and_storage() -> None:
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES))
    for name, tensor in model.state_dict().items():
        assert {n: t.data_ptr() for n, t in as_on_hub(model, name, tensor).items()} == {name: tensor.data_ptr()}
