"""Models that cannot take the packed layout: asked at loading, forwarded in padded rows with a note, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gadcli.config.schema import ModelConfig
from gadcli.distributed.world import World
from gadcli.errors import ConfigError
from gadcli.model.loading import load_actor, load_critic
from gadcli.model.packing import lay_out, lay_out_padded
from model.parts import STILL, build_actor, last_gradient, spread_advantages, tiny_rollout, values, worst_relative
from model.test_layout import TOLERANCE, gradients, plain_logprobs, some_groups
from mutants import mutated
from tiny import write_tiny_model


@pytest.fixture(scope="module")
def sinks(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("sinks"), "gpt_oss"))


def test_attention_sinks_fall_back_to_padded_rows_and_say_so(sinks: str) -> None:
    model: Any = load_actor(sinks, ModelConfig())
    assert not model.gad_shares
    assert "gpt_oss cannot share a prompt" in model.gad_note
    groups = [group for group in some_groups() if all(group.answers)]
    logp_N, _ = model.answer_logprobs(lay_out_padded(groups), 0.8)
    oracle = torch.cat([plain_logprobs(model, group, 0.8) for group in groups])
    assert float((logp_N - oracle).detach().abs().max()) < TOLERANCE
    logp_N.sum().backward()
    padded = gradients(model)
    oracle.sum().backward()
    assert worst_relative(padded, gradients(model)) < TOLERANCE


def test_the_same_model_in_the_packed_layout_would_be_wrong(sinks: str) -> None:
    """What the question at loading is for: no error is raised, the numbers are simply others."""
    model: Any = load_actor(sinks, ModelConfig())
    groups = some_groups()[:1]
    model.set_attn_implementation("gad_shared")
    packed = model.answer_logprobs(lay_out(groups), 1.0)[0]
    model.set_attn_implementation("eager")
    oracle = torch.cat([plain_logprobs(model, group, 1.0) for group in groups])
    assert float((packed - oracle).detach().abs().max()) > 100 * TOLERANCE


def test_a_critic_of_such_a_model_falls_back_too(sinks: str) -> None:
    critic: Any = load_critic(sinks, ModelConfig(), 5).model
    assert not critic.gad_shares and critic.gad_note
    twice: Any = load_critic(sinks, ModelConfig(), 5, twice_differentiable=True).model
    assert twice.config._attn_implementation == "eager"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_as_that(value: float, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model", "llama")
    file = path / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="outputs are not finite"):
        load_actor(str(path), ModelConfig())


def test_micro_batches_of_padded_rows_change_nothing(sinks: str, world: World) -> None:
    found = []
    for budget in (1 << 20, 1):
        actor = build_actor(world, sinks, optim=STILL, micro_batch_tokens=budget)
        rollout = tiny_rollout()
        metrics = values(actor.update(rollout, spread_advantages(rollout), None, None))
        found.append((last_gradient(actor), metrics["actor/entropy"]))
    assert worst_relative(found[1][0], found[0][0]) < TOLERANCE
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


def test_a_head_that_is_more_than_a_matrix_is_refused(tmp_path: Path) -> None:
    path = str(write_tiny_model(tmp_path, "cohere"))
    with pytest.raises(ConfigError, match="type cohere is not computed as it computes itself"):
        load_actor(path, ModelConfig())


def test_a_question_that_accepts_everything_would_be_caught(sinks: str) -> None:
    mutant = mutated("model.packing_check", "TOLERANCE = 2e-3", "TOLERANCE = 1e9")
    model: Any = load_actor(sinks, ModelConfig())
    mutant.choose_layout(model, sinks, "gad_shared")
    assert model.gad_shares
