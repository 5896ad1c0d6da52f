"""What the worker would say of a run's models, heard without loading their weights: `python -m gadcli.model.trial`.

For the plan, whose process knows no torch. Reads the run's config.yaml on stdin and answers with one JSON line:
{"notes": […]} or {"error": …, "hint": …}. Models are read by the worker's own code, on torch's meta device: names and
shapes alone. How a family computes is asked of a toy of it with random weights.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gadcli.config.modelinfo import local_model_dir
from gadcli.config.resolve import load_resolved
from gadcli.config.schema import GadConfig, ModelConfig
from gadcli.errors import GadError
from gadcli.model.attention import SHARED, SHARED_PLAIN
from gadcli.model.loading import (
    adapter_targets,
    attach_actor,
    attach_critic,
    critic_class,
    load_actor,
    load_critic,
    read_config,
)
from gadcli.model.packing_check import choose_layout

# A family at toy size: whatever of these its config has.
TOY = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "pad_token_id": None,
    "num_hidden_layers": 2, "layer_types": lambda own: own[:2], "no_rope_layers": lambda own: own[:2],
}  # fmt: skip
SPREAD = 0.3  # of a toy's weights: what a family does beside the usual must show in its outputs


def main() -> None:
    try:
        answer: dict[str, Any] = {"notes": try_models(load_resolved(Path("/dev/stdin")))}
    except GadError as error:
        answer = {"error": error.message, "hint": error.hint or ""}
    print(json.dumps(answer))


def try_models(cfg: GadConfig) -> list[str]:
    """What a user should know of the models that are on this machine. Raises ConfigError as the worker would."""
    notes = _try(cfg.actor.model, cfg.actor.model.path, SHARED, critic=False)
    if cfg.trainer.critic_warmup >= 0:
        attention = SHARED_PLAIN if cfg.critic.gradient_penalty else SHARED
        notes += _try(cfg.critic.model, cfg.critic.model.path or cfg.actor.model.path, attention, critic=True)
    return notes


def _try(cfg: ModelConfig, path: str, attention: str, *, critic: bool) -> list[str]:
    folder = local_model_dir(path)
    if folder is None:
        return []
    folder = folder.resolve()  # as `config.model_refusals` looks for it in messages
    if next(folder.glob("*.safetensors"), None):  # else a checkpoint of ours: its tensors are of our own making
        if critic:
            load_critic(str(folder), cfg, 0, on_meta=True)
        else:
            load_actor(str(folder), cfg, on_meta=True)
    toy = _toy(read_config(str(folder), ModelConfig()), critic)
    if toy is None:  # a family that cannot be made small this way: the worker asks the model itself
        return []
    if cfg.lora.rank:
        adapter_targets(toy, cfg.lora)
    toy.set_attn_implementation(attention)
    choose_layout(toy, str(folder), attention)
    return [toy.gad_note] if toy.gad_note else []


def _toy(config: Any, critic: bool) -> Any:
    """A random model of the family, small, in float32; None where its parts do not fit together at that size."""
    config = copy.deepcopy(config)
    for name, value in TOY.items():
        own = getattr(config, name, None)
        if own is not None:
            setattr(config, name, value(own) if callable(value) else value)
    if critic:
        config.num_labels, config.classifier_dropout = 1, 0.0
    torch.manual_seed(0)
    try:
        model = critic_class(config)(config) if critic else AutoModelForCausalLM.from_config(config)
    except (ValueError, RuntimeError, AssertionError, TypeError):
        return None
    (attach_critic if critic else attach_actor)(model)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=SPREAD)
    return model.float().eval()


if __name__ == "__main__":
    main()
