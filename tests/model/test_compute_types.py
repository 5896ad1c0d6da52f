"""What depends on the compute type: frozen weights, the scalar head, equal texts, the noise floor, kernel variants."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gadcli.algo.advantages import group_advantages
from gadcli.config.schema import FsdpConfig, LoraConfig, ModelConfig
from gadcli.distributed.fsdp import shard
from gadcli.distributed.world import World
from gadcli.model import attention
from gadcli.model.critic import first_twins
from gadcli.model.loading import load_actor
from gadcli.model.packing import Group
from model.parts import build_critic, whole

BF16 = torch.finfo(torch.bfloat16).eps


def test_frozen_weights_are_kept_in_the_compute_type_and_trained_ones_in_float32(world: World, model_path: str) -> None:
    cfg = ModelConfig(dtype="bfloat16", lora=LoraConfig(rank=4))
    model = shard(load_actor(model_path, cfg), world, FsdpConfig(), "bfloat16")
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert all((dtype == torch.float32) == (".lora_" in name) for name, dtype in kinds.items())
    reference = shard(load_actor(model_path, ModelConfig(), trainable=False), world, FsdpConfig(), "bfloat16")
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}


def test_scores_are_finer_than_bf16_can_write_them(world: World, model_path: str) -> None:
    """A score that bf16 could hold would be equal to its own rounding."""
    critic = build_critic(world, model_path, model=ModelConfig(dtype="bfloat16"))
    scores = torch.cat(critic.score([Group([5, 6, 7], [[8 + i, 9] for i in range(8)])]))
    assert scores.dtype == torch.float32
    assert int((scores != scores.bfloat16().float()).sum()) >= 6


def test_equal_answers_of_a_group_are_exact_ties_in_bf16(world: World, model_path: str) -> None:
    critic = build_critic(world, model_path, model=ModelConfig(dtype="bfloat16"))
    group = Group([5, 6, 7], [[8, 9], [10, 11, 12], [8, 9], [13], [8, 9]])
    (scores,) = critic.score([group])
    assert scores[0] == scores[2] == scores[4] and len(scores.unique()) == 3
    assert first_twins([group, group]) == [0, 1, 0, 3, 0, 5, 6, 5, 8, 5]


def test_bf16_rounding_is_no_advantage_and_a_real_spread_is() -> None:
    """Scores near 2 that differ by two bf16 steps (2 ** -7 each there), and by sixteen."""
    step = 2 * BF16 / 2
    rounding = torch.tensor([[2.0, 2.0 + step, 2.0 - step, 2.0]])
    spread = 2.0 + 16 * (rounding - 2.0)
    flat, counted = group_advantages(rounding, precision=BF16)
    assert flat.eq(0).all() and counted["critic/zero_std_fraction"].value == 1.0
    assert group_advantages(spread, precision=BF16)[0].abs().amax() > 1
    assert group_advantages(rounding)[0].abs().amax() > 1  # in float32 the same differences are real


def test_attention_may_have_many_variants_and_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.update(options) or function)
    attention._compiled_flex.cache_clear()
    first = attention._compiled_flex()
    assert attention._compiled_flex() is first  # not compiled anew on every call
    attention._compiled_flex.cache_clear()
    assert seen["fullgraph"] is True and torch._dynamo.config.recompile_limit == attention.VARIANTS >= 64


def test_a_layout_keeps_its_masks_through_every_layer(world: World, model_path: str) -> None:
    """FSDP2 would copy the layout for each layer, and the masks it keeps, if it cast inputs."""
    model = shard(load_actor(model_path, ModelConfig()), world, FsdpConfig(), "bfloat16")
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            assert module._get_fsdp_state()._mp_policy.cast_forward_inputs is False
    assert all(whole(p).dtype == torch.float32 for p in model.parameters())
