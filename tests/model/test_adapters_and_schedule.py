"""What is trained and how fast: LoRA (its reference, its merge), frozen layers, cut layers, the learning rate.

Semantics pinned here: with adapters off the model is the base, bit for bit; only adapters move; what the sampler is
sent is base plus delta; train_layers freezes everything below; the schedule is a function of the update alone.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gadcli.config.schema import LoraConfig, ModelConfig, OptimConfig
from gadcli.distributed.world import World
from gadcli.model import optim
from gadcli.model.actor import Actor, Reference
from gadcli.model.loading import load_actor
from gadcli.model.rollout_batch import Rollout, teacher_groups
from gadcli.rollout import weight_sync as sync
from model.parts import build_actor, build_critic, local, moved, spread_advantages, tiny_rollout, weights, whole
from mutants import mutated

ROUNDING = 1e-5


def adapted(world: World, path: str, rollout: Rollout, **lora: Any) -> Actor:
    """A LoRA actor after one update, its adapters far enough from zero to be seen."""
    actor = build_actor(world, path, model=ModelConfig(lora=LoraConfig(rank=4, **lora)), optim=OptimConfig(lr=0.05))
    actor.update(rollout, spread_advantages(rollout), None, None)
    return actor


# ---- LoRA ----


def test_adapters_are_drawn_from_the_seed_and_leave_the_global_generator_alone(model_path: str) -> None:
    def drawn(seed: int) -> torch.Tensor:
        loaded = load_actor(model_path, ModelConfig(lora=LoraConfig(rank=4)), seed)
        return torch.cat([p.flatten() for name, p in loaded.named_parameters() if "lora_A" in name])

    before = torch.get_rng_state()
    first, other, again = drawn(3), drawn(4), drawn(3)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_with_adapters_off_the_actor_is_the_base_model_exactly(world: World, model_path: str) -> None:
    rollout = tiny_rollout()
    groups = rollout.student_groups()
    base_BT = build_actor(world, model_path).logprobs(groups, rollout.width)
    actor = adapted(world, model_path, rollout)
    reference_BT = actor.logprobs(groups, rollout.width, reference=Reference(actor.model, adapters=True))
    assert torch.equal(reference_BT, base_BT)
    # The mutant is a reference whose adapters stay on. And afterwards they are on again.
    left_on_BT = actor.logprobs(groups, rollout.width, reference=Reference(actor.model, adapters=False))
    assert float((left_on_BT - base_BT).abs().max()) > 0.01
    assert torch.equal(actor.logprobs(groups, rollout.width), left_on_BT)


def test_what_becomes_of_the_checkpoints_file_does_not_matter(world: World, model_path: str, tmp_path: Path) -> None:
    """Loaded weights are mapped from it; those that never train would follow whatever is written there."""
    own = shutil.copytree(model_path, tmp_path / "model")
    actor = build_actor(world, str(own), lora=4)
    rollout = tiny_rollout()
    before = actor.logprobs(rollout.student_groups(), rollout.width)
    weights_file = own / "model.safetensors"
    with weights_file.open("r+b") as file:
        file.seek(weights_file.stat().st_size // 3)
        file.write(bytes(weights_file.stat().st_size // 2))
    assert torch.equal(actor.logprobs(rollout.student_groups(), rollout.width), before)


def test_only_adapters_move(world: World, model_path: str) -> None:
    rollout = tiny_rollout()
    actor = build_actor(world, model_path, lora=4)
    before = weights(actor.model)
    for _ in range(2):  # A has no gradient while B is still zero
        actor.update(rollout, spread_advantages(rollout), None, None)
    changed = moved(before, weights(actor.model))
    assert changed == {name for name in before if ".lora_" in name}
    assert len(changed) == 28  # 7 linears x 2 layers x (A, B)
    critic = build_critic(world, model_path, model=ModelConfig(lora=LoraConfig(rank=4)))
    before = weights(critic.model)
    for _ in range(2):
        critic.score_and_update(rollout)
    changed = moved(before, weights(critic.model))
    assert changed == {name for name in before if ".lora_" in name} | {"score.weight"}  # its bias stays as it is


def merged_difference(world: World, path: str, module: ModuleType) -> float:
    """Largest |log-prob difference| between an adapted actor and a plain model with the weights it would be sent."""
    rollout = tiny_rollout()
    groups = rollout.student_groups()
    actor = adapted(world, path, rollout, alpha=2.5)  # a scale that is no whole number: 2.5 / 4
    plain = build_actor(world, path)
    sent = dict(module.full_tensors(actor.model))
    own = dict(plain.model.named_parameters())
    assert own.keys() == sent.keys() - {"lm_head.weight"}  # tied: sent, but not a parameter of its own
    with torch.no_grad():
        for name, p in own.items():
            local(p).copy_(sent[name])
    difference = actor.logprobs(groups, rollout.width) - plain.logprobs(groups, rollout.width)
    return float(difference.abs().max())


def test_merged_weights_give_the_adapted_models_logprobs(world: World, model_path: str) -> None:
    assert merged_difference(world, model_path, sync) < 1e-4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ lora_delta(", "+ 0 * lora_delta("),  # the base alone
        ('float(layer.scaling["default"])', 'int(layer.scaling["default"] + 1)'),  # the scale rounded
    ],
)
def test_a_wrong_merge_would_be_caught(old: str, new: str, world: World, model_path: str) -> None:
    assert merged_difference(world, model_path, mutated("rollout.weight_sync", old, new)) > 1e-2


def test_dropout_acts_in_supervised_updates_and_never_in_logprobs_that_are_compared(
    world: World, model_path: str
) -> None:
    rollout = tiny_rollout()
    groups = rollout.student_groups()
    actor = adapted(world, model_path, rollout)
    dropping = build_actor(world, model_path, model=ModelConfig(lora=LoraConfig(rank=4, dropout=0.5)))
    with torch.no_grad():
        for p, own in zip(actor.model.parameters(), dropping.model.parameters(), strict=True):
            local(own).copy_(local(p))
    plain_BT = actor.logprobs(groups, rollout.width)
    assert torch.equal(dropping.logprobs(groups, rollout.width), plain_BT)
    assert dropping.model.training
    losses = {dropping.sft_update(teacher_groups(rollout.rows))["actor/sft_loss"].value for _ in range(1)}
    losses.add(actor.sft_update(teacher_groups(rollout.rows))["actor/sft_loss"].value)
    assert len(losses) == 2


# ---- layers ----


def trained(world: World, path: str, train_layers: int, module: ModuleType | None = None) -> set[str]:
    """Parameters that one policy update moves in a model of two layers."""
    rollout = tiny_rollout()
    actor = build_actor(world, path, model=ModelConfig(train_layers=train_layers))
    if module is not None:
        actor.model.requires_grad_(True)
        module._freeze_below(actor.model, train_layers)
        actor.optimizer = optim.Optimizer(actor.model, OptimConfig(lr=1e-3), 0.0, 1)
    before = weights(actor.model)
    actor.update(rollout, spread_advantages(rollout), None, None)
    return moved(before, weights(actor.model))


def test_train_layers_moves_the_last_layers_and_what_lies_above_them(world: World, model_path: str) -> None:
    everything = trained(world, model_path, 0)
    assert "model.embed_tokens.weight" in everything and "model.layers.0.mlp.up_proj.weight" in everything
    upper = {name for name in everything if name.startswith("model.layers.1.")} | {"model.norm.weight"}
    assert trained(world, model_path, 1) == upper  # the tied head is the embedding: frozen with it
    assert len(upper) == 10  # 7 linears, 2 norms, the final norm


def test_freezing_the_wrong_end_would_be_caught(world: World, model_path: str) -> None:
    mutant = mutated("model.loading", "model.model.layers)[:-train_layers]", "model.model.layers)[train_layers:]")
    assert "model.layers.0.mlp.up_proj.weight" in trained(world, model_path, 1, mutant)


def test_a_critic_cut_to_one_layer_keeps_a_trainable_head(world: World, model_path: str) -> None:
    critic = build_critic(world, model_path, model=ModelConfig(num_layers=1, train_layers=1))
    assert {name.split(".")[2] for name, _ in critic.model.named_parameters() if ".layers." in name} == {"0"}
    before = weights(critic.model)
    critic.score_and_update(tiny_rollout())
    changed = moved(before, weights(critic.model))
    assert {"score.weight", "model.layers.0.mlp.up_proj.weight"} <= changed
    assert "model.embed_tokens.weight" not in changed


# ---- the learning rate ----

# By hand, lr 1, 2 updates of warm-up, 10 in all, floor 0.2: warm-up 1/2, 2/2; then progress p = (u - 2) / 8.
# linear .2 + .8 (1 - p): u=2 -> 1, u=6 -> .2 + .8 * .5 = .6, u=10 -> .2.  cosine .2 + .4 (1 + cos pi p): u=4 (p=1/4)
# -> .2 + .4 * (1 + sqrt(1/2)) = .882843, u=6 -> .6.
BY_HAND = {
    "constant": {0: 0.5, 1: 1.0, 2: 1.0, 9: 1.0, 50: 1.0},
    "linear": {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.8, 6: 0.6, 10: 0.2, 50: 0.2},
    "cosine": {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.2 + 0.4 * (1 + math.sqrt(0.5)), 6: 0.6, 10: 0.2, 50: 0.2},
}


def wrong_rates(module: ModuleType) -> list[tuple[str, int]]:
    """Where a module's lr_at differs from the table."""
    wrong = []
    for shape, table in BY_HAND.items():
        cfg = OptimConfig(lr=1.0, lr_scheduler=shape, lr_warmup_steps=2, min_lr_ratio=0.2)
        wrong += [(shape, u) for u, lr in table.items() if abs(module.lr_at(u, 10, cfg) - lr) > 1e-12]
    return wrong


def test_the_schedule_is_as_computed_by_hand() -> None:
    assert wrong_rates(optim) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cfg.lr * (update + 1) /", "cfg.lr * update /"),  # a first update that does not move
        ("total_updates - cfg.lr_warmup_steps)", "total_updates)"),  # a span that forgets the warm-up
        ("0.5 * (1.0 + math.cos", "0.5 * (1.0 - math.cos"),  # upside down
        ("cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * falling", "falling"),  # no floor
    ],
)
def test_a_wrong_schedule_would_be_caught(old: str, new: str) -> None:
    assert wrong_rates(mutated("model.optim", old, new))


def test_the_optimiser_uses_the_schedule_and_clips_to_the_norm(world: World, model_path: str) -> None:
    rollout = tiny_rollout()
    cfg = OptimConfig(lr=1e-2, lr_scheduler="linear", lr_warmup_steps=2, beta1=0.0, weight_decay=0.0)
    actor = build_actor(world, model_path, optim=cfg, grad_clip=1e-3)
    logs = [actor.sft_update(teacher_groups(rollout.rows)) for _ in range(4)]
    # of 100 updates, 2 of them warm-up: lr/2, lr, lr, lr (1 - 1/98)
    assert [log["actor/lr"].value for log in logs] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2 * 97 / 98])
    assert logs[-1]["actor/grad_norm"].value > 1e-2  # as measured, before the clip
    moments = [whole(actor.optimizer.adamw.state[p]["exp_avg"]) for p in actor.optimizer.parameters]
    clipped = math.sqrt(sum(float(m.square().sum()) for m in moments))
    assert clipped == pytest.approx(1e-3, rel=1e-2)
