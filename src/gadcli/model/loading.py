"""Loading, cutting and adapting the student, its reference and the discriminator.

Models keep their Hugging Face names; the passes the trainer needs, `answer_logprobs` and `answer_values`, are attached
as methods that FSDP2 treats as forward passes. Shapes: see `model.packing`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from gadcli.config.schema import LoraConfig, ModelConfig
from gadcli.errors import ConfigError
from gadcli.model.attention import SHARED, SHARED_PLAIN
from gadcli.model.chunked_logprobs import head_logprobs
from gadcli.model.packing import Layout
from gadcli.model.packing_check import choose_layout
from gadcli.model.recompute import keep_less


def answer_logprobs(self: Any, layout: Layout, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every answer token and the entropy where it was drawn, at logits / temperature.

    Returns (logp_N, entropy_N), float32, in the layout's token order.
    """
    hidden_RLH = _backbone(self, layout)
    predictor_NH = hidden_RLH.flatten(0, 1)[layout.predictor_N]
    softcap = getattr(self.config, "final_logit_softcapping", None) or 0.0
    return head_logprobs(predictor_NH, self.lm_head.weight, layout.target_N, temperature, softcap)


def answer_values(self: Any, layout: Layout) -> torch.Tensor:
    """The scalar head's value at every answer token [N], float32; the value at a token has read that token."""
    return _score_head(self, _backbone(self, layout), layout)


def answer_values_and_embeds(self: Any, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """`answer_values`, and the input embeddings [R, L, H] they were computed from, which require grad."""
    embeds_RLH = self.model.embed_tokens(layout.ids_RL)
    if not embeds_RLH.requires_grad:  # frozen embeddings
        embeds_RLH.requires_grad_(True)
    return _score_head(self, _backbone(self, layout, embeds_RLH), layout), embeds_RLH


def _score_head(model: Any, hidden_RLH: torch.Tensor, layout: Layout) -> torch.Tensor:
    """In float32 whatever the layers compute in: bf16 would round a score of 8 to steps of 1/16, whole advantages."""
    own_NH = hidden_RLH.flatten(0, 1)[layout.own_N].float()
    weight, bias = model.score.weight, model.score.bias
    values_N1 = F.linear(own_NH, weight.float(), None if bias is None else bias.float())
    return values_N1[:, 0].clone()  # no view: FSDP2 hooks what a forward pass returns


def _backbone(model: Any, layout: Layout, embeds_RLH: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden states [R, L, H] after the final norm. No KV cache: with one, restarted positions would leak."""
    packed = layout.spans is not None
    # Four dimensions tell transformers to build no mask of its own; our attention reads the layout instead.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.ids_RL.device) if packed else layout.mask_RL
    out = model.model(
        input_ids=layout.ids_RL if embeds_RLH is None else None,
        inputs_embeds=embeds_RLH,
        position_ids=layout.positions_RL,
        attention_mask=mask,
        use_cache=False,
        **({"layout": layout} if packed else {}),
    )
    return out.last_hidden_state


def load_actor(path: str, cfg: ModelConfig, seed: int = 0, *, trainable: bool = True) -> PreTrainedModel:
    """The student (or, with `trainable=False`, its frozen reference) in float32 on the host; adapters are `seed`'s."""
    config = _read_config(path, cfg)
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32, attn_implementation=SHARED)
    _prepare(model, cfg, seed, trainable)
    attach_actor(model)
    choose_layout(model, path, SHARED)
    return model


def attach_actor(model: Any) -> None:
    """The trainer's own pass, `answer_logprobs`, as a method."""
    keep_less(model)
    model.answer_logprobs = types.MethodType(answer_logprobs, model)


def attach_critic(model: Any, *, twice_differentiable: bool = False) -> None:
    """The trainer's own passes, `answer_values` and `answer_values_and_embeds`; the head's weight always trains."""
    if not twice_differentiable:
        keep_less(model)
    model.score.weight.requires_grad_(True)
    if model.score.bias is not None:
        # A loss of score differences gives it a gradient of rounding errors alone, which Adam blows up to whole steps.
        model.score.bias.requires_grad_(False)
    model.answer_values = types.MethodType(answer_values, model)
    model.answer_values_and_embeds = types.MethodType(answer_values_and_embeds, model)


@dataclass(frozen=True)
class LoadedCritic:
    """A discriminator, and whether its scalar head is new (drawn from the seed: its scores are noise until trained)."""

    model: PreTrainedModel
    fresh_head: bool


def load_critic(path: str, cfg: ModelConfig, seed: int, *, twice_differentiable: bool = False) -> LoadedCritic:
    """The discriminator: a backbone with a scalar head, the head drawn from `seed` where the checkpoint has none.

    `twice_differentiable` (a gradient penalty) takes plain attention: the fused kernels have no second derivative.
    """
    attention = SHARED_PLAIN if twice_differentiable else SHARED
    config = _read_config(path, cfg)
    config.num_labels = 1
    config.classifier_dropout = 0.0  # scores must be a function of the text alone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = AutoModelForTokenClassification.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
    _prepare(model, cfg, seed, trainable=True)
    attach_critic(model, twice_differentiable=twice_differentiable)
    choose_layout(model, path, attention)
    return LoadedCritic(model, any(name.startswith("score.") for name in info["missing_keys"]))


def _read_config(path: str, cfg: ModelConfig) -> Any:
    config = AutoConfig.from_pretrained(path)
    if cfg.num_layers:
        if cfg.num_layers > config.num_hidden_layers:
            raise ConfigError(f"{path} has {config.num_hidden_layers} layers, fewer than num_layers={cfg.num_layers}")
        config.num_hidden_layers = cfg.num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: cfg.num_layers]
    return config


def _prepare(model: PreTrainedModel, cfg: ModelConfig, seed: int, trainable: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # old and new log-probs must be the same function of the weights
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.requires_grad_(trainable and not cfg.lora.rank)
    if trainable and cfg.lora.rank:
        _add_lora(model, cfg.lora, seed)
    if trainable and cfg.train_layers:
        _freeze_below(model, cfg.train_layers)
    if trainable and cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # gradient checkpointing acts in train mode only; there is no dropout left to turn on


def _add_lora(model: PreTrainedModel, cfg: LoraConfig, seed: int) -> None:
    targets = [name.strip() for name in cfg.target_modules.split(",")]
    if targets == ["all-linear"]:
        inside = {name.rsplit(".", 1)[-1] for name, m in model.model.named_modules() if isinstance(m, nn.Linear)}
        targets = sorted(inside)  # by name, so that heads (lm_head, score) stay out
    adapter = PeftLoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(adapter, model)


def _freeze_below(model: PreTrainedModel, train_layers: int) -> None:
    """Freeze the embeddings and all but the last `train_layers` layers. A tied head is the embedding: frozen too."""
    model.get_input_embeddings().requires_grad_(False)
    for layer in list(model.model.layers)[:-train_layers]:
        layer.requires_grad_(False)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the frozen base of a LoRA model: the reference policy at no memory of its own."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Log-probs that are compared (with the sampler's, with a later pass) must not depend on an adapter's dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
