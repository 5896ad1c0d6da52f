"""The R1 penalty of a sharded critic whose rows share their prompts: its value and its gradient.

Semantics pinned here: the value is that of each teacher text alone; the gradient is the one finite differences find;
neither micro-batches nor ranks change either; plain attention scores as the fused one does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gadcli.config.schema import ModelConfig
from gadcli.distributed.world import World
from gadcli.model.critic import Critic
from gadcli.model.loading import load_critic
from model.parts import STILL, build_critic, last_gradient, resharded, tiny_rollout, values, worst_relative
from mutants import mutated
from train.training import prepare, steps, train, write_inputs

WEIGHT = 0.7


def norm2_alone(path: str) -> float:
    """The oracle: each teacher text alone through transformers' own forward, no mask, no sharing, no sharding."""
    model: Any = load_critic(path, ModelConfig(), 5, twice_differentiable=True).model
    total = 0.0
    rows = tiny_rollout().rows
    for row in rows:
        embeds = model.model.embed_tokens(torch.tensor([row.prompt_ids + row.teacher_ids]))
        score = model(inputs_embeds=embeds, use_cache=False).logits[0, -1, 0]
        (gradient,) = torch.autograd.grad(score, embeds)
        total += float(gradient.square().sum())
    return total / len(rows)


def penalised(world: World, path: str, cls: type[Critic] = Critic, weight: float = WEIGHT, **settings: Any) -> Critic:
    return build_critic(world, path, cls, optim=STILL, gradient_penalty=weight, **settings)


def test_the_value_is_that_of_each_teacher_text_alone(world: World, model_path: str) -> None:
    metrics = values(penalised(world, model_path).score_and_update(tiny_rollout())[1])
    assert metrics["critic/gradient_penalty"] == pytest.approx(norm2_alone(model_path), rel=1e-4)


def test_a_penalty_on_student_text_would_be_caught(world: World, model_path: str) -> None:
    mutant = mutated("model.critic", "self._penalty(raw[:, -1],", "self._penalty(raw[:, 0],").Critic
    metrics = values(penalised(world, model_path, mutant).score_and_update(tiny_rollout())[1])
    assert abs(metrics["critic/gradient_penalty"] / norm2_alone(model_path) - 1) > 0.01


def penalty_slope(world: World, path: str, cls: type[Critic] = Critic) -> tuple[float, float]:
    """The penalty's slope along its own gradient: (by the gradient, by central differences of the value).

    The gradient of the penalty alone is that of the whole loss less that of the loss without it.
    """
    gradients = []
    for weight in (WEIGHT, 1e-30):  # the second asks for a penalty, and weighs it nothing
        critic = penalised(world, path, cls, weight)
        critic.score_and_update(tiny_rollout())
        gradients.append(last_gradient(critic))
    gradient = {name: gradients[0][name] - gradients[1][name] for name in gradients[0]}
    norm = float(torch.sqrt(sum((g.square().sum() for g in gradient.values()), torch.zeros(()))))
    direction = {name: g / norm for name, g in gradient.items()}
    measured = []
    step = 0.01
    for sign in (1, -1):
        critic = penalised(world, path)
        resharded(critic.model)
        with torch.no_grad():
            for name, p in critic.model.named_parameters():
                if name in direction:  # the scalar head's bias is not trained
                    p.add_(sign * step * direction[name])
        metrics = values(critic.score_and_update(tiny_rollout())[1])
        measured.append(0.5 * WEIGHT * metrics["critic/gradient_penalty"])
    return norm, (measured[0] - measured[1]) / (2 * step)


def test_the_gradient_is_the_one_that_finite_differences_find(world: World, model_path: str) -> None:
    by_gradient, by_differences = penalty_slope(world, model_path)
    assert by_gradient > 0.1
    assert by_gradient == pytest.approx(by_differences, rel=0.01)


def test_half_of_the_gradient_would_be_caught(world: World, model_path: str) -> None:
    mutant = mutated("model.critic", "loss, parts = loss + penalty,", "loss, parts = loss + 0.5 * penalty,").Critic
    by_gradient, by_differences = penalty_slope(world, model_path, mutant)
    assert by_gradient != pytest.approx(by_differences, rel=0.3)


@pytest.mark.parametrize("model", [ModelConfig(), ModelConfig(train_layers=1)])
def test_micro_batches_change_nothing(model: ModelConfig, world: World, model_path: str) -> None:
    found = []
    for budget in (1 << 20, 1):
        critic = penalised(world, model_path, micro_batch_tokens=budget, model=model, loss="final")
        metrics = values(critic.score_and_update(tiny_rollout())[1])
        found.append((last_gradient(critic), metrics["critic/gradient_penalty"]))
    assert worst_relative(found[1][0], found[0][0]) < 2e-5
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


def test_plain_attention_scores_as_the_fused_one_does(world: World, model_path: str) -> None:
    groups = tiny_rollout().pair_groups()
    plain = torch.stack(penalised(world, model_path).score(groups))
    fused = torch.stack(build_critic(world, model_path).score(groups))
    assert torch.allclose(plain, fused, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_two_ranks_penalise_what_one_rank_penalises(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    found = []
    for size in (1, 2):
        run_dir = prepare(
            tmp_path / f"run{size}", inputs, "warmup", "trainer.total_steps=3", "trainer.critic_warmup=3",
            "critic.gradient_penalty=0.5", "data.val_files=[]",
        )  # fmt: skip
        train(run_dir, world=size)
        found.append(steps(run_dir))
    for name in ("critic/gradient_penalty", "critic/grad_norm", "critic/d_loss"):
        for step in (1, 2, 3):
            assert found[1][step][name] == pytest.approx(found[0][step][name], rel=1e-4), (name, step)
