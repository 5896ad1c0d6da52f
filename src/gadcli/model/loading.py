"""Loading, cutting and adapting the student, its reference and the discriminator.

Models keep their Hugging Face names; the passes the trainer needs, `answer_logprobs` and `answer_values`, are attached
as methods that FSDP2 treats as forward passes. Shapes: see `model.packing`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GenericForTokenClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

from gadcli.config.model_refusals import check_model_folder
from gadcli.config.modelinfo import read_model_config
from gadcli.config.reading import split_items
from gadcli.config.schema import LoraConfig, ModelConfig
from gadcli.errors import ConfigError
from gadcli.model.attention import SHARED, SHARED_PLAIN
from gadcli.model.chunked_logprobs import head_logprobs
from gadcli.model.packing import Layout
from gadcli.model.packing_check import choose_layout
from gadcli.model.recompute import keep_less

KNOWN_TO_WORK = (
    "docs/families.md lists the families that are tried: Llama, Qwen, Mistral, Gemma, Phi-3, GLM-4, OLMo 2, …"
)


def answer_logprobs(self: Any, layout: Layout, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every answer token and the entropy where it was drawn, at logits / temperature.

    Returns (logp_N, entropy_N), float32, in the layout's token order.
    """
    hidden_RLH = _backbone(self, layout)
    predictor_NH = hidden_RLH.flatten(0, 1)[layout.predictor_N]
    # Two things that families do to logits, by the names in their configs; `packing_check` refuses what else there is.
    softcap = getattr(self.config, "final_logit_softcapping", None) or 0.0
    if divisor := getattr(self.config, "logits_scaling", None):
        predictor_NH = predictor_NH / divisor
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


def load_actor(
    path: str, cfg: ModelConfig, seed: int = 0, *, trainable: bool = True, on_meta: bool = False
) -> PreTrainedModel:
    """The student (or, with `trainable=False`, its frozen reference) in float32 on the host; adapters are `seed`'s.

    `on_meta` reads names and shapes but no weights, for a plan to hear what would be refused. Raises ConfigError.
    """
    config = read_config(path, cfg)
    model, info = _read_model(AutoModelForCausalLM, path, config, SHARED, on_meta)
    lost = [name for name in info["unexpected_keys"] if not name.endswith("inv_freq")]
    if lost and not cfg.num_layers:
        raise ConfigError(
            f"{path}: {len(lost)} of its tensors belong to no part of a {config.model_type} model ({min(lost)})",
            "they would be lost; is it quantised, or another kind of model than its config.json says?",
        )
    _check_parts(model, path, "lm_head")
    _prepare(model, cfg, seed, trainable)
    if not on_meta:
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


def load_critic(
    path: str, cfg: ModelConfig, seed: int, *, twice_differentiable: bool = False, on_meta: bool = False
) -> LoadedCritic:
    """The discriminator: a backbone with a scalar head, the head drawn from `seed` where the checkpoint has none.

    `twice_differentiable` (a gradient penalty) takes plain attention: the fused kernels have no second derivative.
    `on_meta` as for `load_actor`. Raises ConfigError.
    """
    attention = SHARED_PLAIN if twice_differentiable else SHARED
    config = read_config(path, cfg)
    config.num_labels = 1
    config.classifier_dropout = 0.0  # scores must be a function of the text alone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = _read_model(critic_class(config), path, config, attention, on_meta)
    _check_parts(model, path, "score")
    _prepare(model, cfg, seed, trainable=True)
    if not on_meta:
        attach_critic(model, twice_differentiable=twice_differentiable)
        choose_layout(model, path, attention)
    return LoadedCritic(model, any(name.startswith("score.") for name in info["missing_keys"]))


def critic_class(config: Any) -> Any:
    """The family's model with a scalar head; made of its backbone where transformers has none (Gemma 3, OLMo 2)."""
    known = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(config), None)
    if known is not None:
        return known
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    name = causal.__name__.replace("ForCausalLM", "ForTokenClassification")
    own = next(base for base in causal.__mro__ if base.__name__.endswith("PreTrainedModel"))
    return type(name, (GenericForTokenClassification, own), {"config_class": type(config)})


def read_config(path: str, cfg: ModelConfig) -> Any:
    """transformers' config of a folder, cut to `cfg.num_layers`. ConfigError where it cannot be used."""
    check_model_folder(path, Path(path))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise _unknown_type(path, str(error)) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{path}: transformers has no language model of type {config.model_type}", KNOWN_TO_WORK)
    if cfg.num_layers:
        if cfg.num_layers > config.num_hidden_layers:
            raise ConfigError(f"{path} has {config.num_hidden_layers} layers, fewer than num_layers={cfg.num_layers}")
        config.num_hidden_layers = cfg.num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: cfg.num_layers]
    return config


def _unknown_type(path: str, said: str) -> ConfigError:
    raw = read_model_config(path) or {}
    if "auto_map" in raw:
        return ConfigError(
            f"{path}: needs Python code of its own (auto_map in config.json), and gad never runs a model's code",
            KNOWN_TO_WORK,
        )
    if kind := raw.get("model_type"):
        message = f"{path}: transformers {transformers.__version__} cannot read a model of type {kind!r}"
        return ConfigError(f"{message}: {said.splitlines()[0][:120]}", KNOWN_TO_WORK)
    return ConfigError(f"{path}: its config.json names no model_type", "is it a model's folder?")


def _read_model(kind: Any, path: str, config: Any, attention: str, on_meta: bool) -> tuple[Any, dict[str, Any]]:
    """(model, transformers' report) of a folder in which every weight but a scalar head is found. ConfigError."""
    place = {"device_map": "meta"} if on_meta else {}
    try:
        model, info = kind.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False,
            generation_config=GenerationConfig(), output_loading_info=True, **place,
        )  # fmt: skip
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        if "memory" in str(error):
            raise
        said = " ".join(str(error).split())[:160]
        raise ConfigError(f"{path}: transformers cannot load it: {said}", "is the folder whole?") from error
    if missing := [name for name in info["missing_keys"] if not name.startswith("score.")]:
        raise ConfigError(
            f"{path}: {len(missing)} weights of the model are not in its files ({min(missing)})",
            "they would start as noise: copy or download the folder again",
        )
    return model, info


def _check_parts(model: Any, path: str, head: str) -> None:
    """The parts of a model that gad's own passes name."""
    inner = getattr(model, "model", None)
    parts = {"model.layers": getattr(inner, "layers", None), "model.embed_tokens": getattr(inner, "embed_tokens", None),
             head: getattr(model, head, None)}  # fmt: skip
    if absent := [name for name, part in parts.items() if part is None]:
        kind = model.config.model_type
        raise ConfigError(f"{path}: a model of type {kind} has no {', '.join(absent)}, which gad needs", KNOWN_TO_WORK)


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
    adapter = PeftLoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=adapter_targets(model, cfg)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(adapter, model)


def adapter_targets(model: Any, cfg: LoraConfig) -> list[str]:
    """The linear layers that adapters go on, by name: those of the decoder layers.

    Raises ConfigError for any name that is none of them: peft would leave out a misspelt one, and our passes read the
    head and the embeddings past an adapter.
    """
    linears = [name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)]
    names = sorted({name.rpartition(".")[2] for name in linears})
    wanted = split_items(cfg.target_modules.strip().removeprefix("[").removesuffix("]")) or []
    if wanted == ["all-linear"]:
        return names
    hint = f"target_modules={','.join(names)}, or all-linear for all of them"
    for target in wanted:
        if any(f".{name}".endswith(f".{target}") for name in linears):
            continue
        here = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{target}")]
        what = f"{here[0]} cannot carry an adapter" if here else "no such linear layer in the model"
        raise ConfigError(f"lora.target_modules names {target}: {what}", hint)
    if not wanted:
        raise ConfigError(f"lora.target_modules is {cfg.target_modules!r}", hint)
    return wanted


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
