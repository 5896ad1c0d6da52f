"""The plan: step arithmetic, parameter counts against transformers' own modules, memory that moves as it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gadcli.config.memory import GIB, LOGITS_CHUNK, Placement, estimate
from gadcli.config.modelinfo import model_shape
from gadcli.config.plan import Plan, count_steps, make_plan
from gadcli.config.resolve import resolve
from gadcli.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
    "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def plan(stage: str, preset: str, *overrides: str, rows: int | None = 1000, world_size: int = 1, **more: Any) -> Plan:
    resolved = resolve(stage, preset, overrides=list(overrides))
    return make_plan(resolved.config, rows, SMOLLM2, None, world_size, origins=resolved.origins, **more)


@pytest.mark.parametrize(
    ("stage", "per_epoch", "total", "left_over"),
    # the notes' 1000 rows: floor(1000/256) = 3 steps an epoch for 4 epochs, 1000 - 768 = 232 left;
    # floor(1000/128) = 7 for 8 epochs, 1000 - 896 = 104 left
    [("seqkd", 3, 12, 232), ("warmup", 7, 56, 104), ("gad", 7, 56, 104)],
)
def test_steps_are_the_floor_of_rows_by_batch_times_epochs(
    stage: str, per_epoch: int, total: int, left_over: int
) -> None:
    steps = count_steps(resolve(stage, "chengla-8b").config, 1000)
    assert (steps.per_epoch, steps.total, steps.left_over) == (per_epoch, total, left_over)


def test_critic_only_steps_and_the_students_add_up() -> None:
    steps = count_steps(resolve("warmup", "chengla-8b").config, 1000)
    assert (steps.critic_only, steps.actor) == (10, 46)


def test_total_steps_takes_the_place_of_epochs() -> None:
    config = resolve("gad", "chengla-8b", overrides=["trainer.total_steps=5"]).config
    assert count_steps(config, 1000).total == 5


@pytest.mark.parametrize("rows", [0, 1, 127])
def test_fewer_rows_than_a_batch_is_an_error_and_never_zero_steps(rows: int) -> None:
    with pytest.raises(DataError, match="do not fill one batch of 128"):
        count_steps(resolve("gad", "chengla-8b").config, rows)


def test_a_long_critic_warmup_is_unusual() -> None:
    # 128 rows: 1 step an epoch, 8 in all, of which the critic takes the first 8
    assert any("critic_warmup=10 of 8 steps" in line for line in plan("warmup", "chengla-8b", rows=128).unusual)
    assert not any("critic_warmup" in line for line in plan("warmup", "chengla-8b", rows=1000).unusual)


META_MODELS = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
out = {}
for name, given in json.load(sys.stdin).items():
    config = AutoConfig.for_model(**given)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
        config.num_labels = 1
        try:
            critic = AutoModelForTokenClassification.from_config(config)
        except ValueError:
            critic = None
    if getattr(config, "tie_word_embeddings", False):
        causal.tie_weights()
    out[name] = [sum(p.numel() for p in causal.parameters()), critic and sum(p.numel() for p in critic.parameters())]
print(json.dumps(out))
"""
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 199, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {**SMALL, "model_type": "llama", "tie_word_embeddings": False},
    "llama tied": {**SMALL, "model_type": "llama", "tie_word_embeddings": True},
    "llama biases": {**SMALL, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {**SMALL, "model_type": "mistral", "head_dim": 24, "tie_word_embeddings": False},
    "qwen2": {**SMALL, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
    "gemma": {**SMALL, "model_type": "gemma", "head_dim": 32},
    "gemma2": {**SMALL, "model_type": "gemma2", "head_dim": 32},
    "gemma3": {**SMALL, "model_type": "gemma3_text", "head_dim": 32},
    "mixtral": {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "tie_word_embeddings": False},
    "qwen3 moe": {
        **SMALL, "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.mark.slow
def test_parameter_counts_equal_those_of_transformers_modules() -> None:
    command = [sys.executable, "-c", META_MODELS]
    done = subprocess.run(command, input=json.dumps(FAMILIES), capture_output=True, text=True, check=True, timeout=240)
    for name, (causal, critic) in json.loads(done.stdout).items():
        shape = model_shape(FAMILIES[name])
        assert shape.causal_params == causal, name
        assert critic is None or shape.critic_params == critic, name


def test_known_models_have_their_known_sizes() -> None:
    assert model_shape(QWEN3_8B).causal_params == 8_190_735_360  # as published: 8.2 B
    assert model_shape(SMOLLM2).causal_params == 134_515_008  # as published: 135 M


def test_a_config_json_without_sizes_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks hidden_size"):
        model_shape({"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9})


def memory(stage: str = "gad", *overrides: str, world_size: int = 1, device: str = "cuda", preset: str = "chengla-8b"):
    config = resolve(stage, preset, overrides=list(overrides)).config
    shape = model_shape(QWEN3_8B)
    critic = shape if config.trainer.critic_warmup >= 0 else None
    return estimate(config, Placement(device, "vllm", world_size, shape, critic, 79.6))


def test_weights_gradients_and_moments_are_16_bytes_a_trained_parameter() -> None:
    actor = memory("seqkd").actor
    assert actor.weights + actor.gradients + actor.optimiser == 16 * 8_190_735_360


def test_a_base_under_adapters_lies_on_one_card_once_in_bf16() -> None:
    """Float32 weights beside a gathered bf16 copy were 6 bytes a weight: for student and critic over 60 GB more."""
    adapters = [f"{role}.model.lora.rank=16" for role in ("actor", "critic")]
    gpu = memory("gad", *adapters)
    assert gpu.critic is not None
    for model in (gpu.actor, gpu.critic):
        assert model.weights + model.gathered == 2 * model.parameters + (4 + 2) * model.trainable
    assert 4 * (gpu.actor.parameters + gpu.critic.parameters) > 60e9


def test_sharding_divides_what_is_resident() -> None:
    one, eight = memory(), memory(world_size=8)
    assert eight.actor.resident * 8 == pytest.approx(one.actor.resident)
    assert eight.training_peak < one.training_peak


@pytest.mark.parametrize(
    "override",
    [
        "actor.model.lora.rank=64", "fsdp.offload_critic=true", "fsdp.offload_reference=true",
        "rollout.gpu_memory_utilization=0.3", "rollout.sleep=true", "actor.use_kl_loss=false",
        "actor.model.train_layers=4",
    ],
)  # fmt: skip
def test_each_advice_lowers_the_training_peak(override: str) -> None:
    assert memory("gad", override, world_size=8).training_peak < memory("gad", world_size=8).training_peak


def test_checkpointing_and_smaller_micro_batches_lower_activations() -> None:
    base = memory("seqkd").actor.activations
    assert memory("seqkd", "actor.model.gradient_checkpointing=false").actor.activations > 3 * base
    assert memory("seqkd", "actor.micro_batch_tokens=4096").actor.activations < base / 2


def test_a_lora_student_needs_no_reference_of_its_own() -> None:
    assert memory("gad").reference is not None
    assert memory("gad", "actor.model.lora.rank=8").reference is None


def test_the_vllm_share_of_a_gpu_covers_its_weights_and_cache() -> None:
    estimated = memory("gad", "rollout.gpu_memory_utilization=0.5", world_size=8)
    share = 0.5 * 79.6 * GIB
    assert estimated.sampler_weights + estimated.kv_cache == pytest.approx(share, abs=1.01 * GIB)


def test_a_sleeping_sampler_leaves_training_its_share_and_waits_in_host_memory() -> None:
    awake, asleep = memory("gad", world_size=8), memory("gad", "rollout.sleep=true", world_size=8)
    assert awake.training_peak - asleep.training_peak == pytest.approx(awake.sampler_weights + awake.kv_cache)
    assert asleep.rollout_peak == awake.rollout_peak
    assert asleep.host_ram - awake.host_ram == pytest.approx(8 * asleep.sampler_weights)


def test_seqkd_without_held_out_rows_has_no_sampler() -> None:
    without, with_rows = memory("seqkd"), memory("seqkd", "data.val_rows=16")
    assert without.sampler_weights == without.kv_cache == 0 and with_rows.sampler_weights > 0


def test_logits_alive_at_once_are_what_the_head_computes() -> None:
    source = (ROOT / "src/gadcli/model/chunked_logprobs.py").read_text()
    (line,) = [line for line in source.splitlines() if line.startswith("CHUNK_LOGITS = ")]
    assert eval(line.partition("=")[2].partition("#")[0]) == LOGITS_CHUNK


def test_saving_in_the_background_copies_weights_and_moments() -> None:
    gpu = [memory("gad", f"trainer.async_save={how}", world_size=8) for how in ("auto", "never")]
    copied = sum(model.resident for model in (gpu[0].actor, gpu[0].critic) if model is not None)
    assert gpu[0].host_ram - gpu[1].host_ram == pytest.approx(8 * copied)
    assert gpu[0].training_peak == gpu[1].training_peak
    cpu = [memory("gad", f"trainer.async_save={how}", device="cpu") for how in ("always", "auto")]
    assert cpu[0].training_peak > cpu[1].training_peak


def test_checkpoints_hold_weights_and_moments_and_one_more_while_writing() -> None:
    estimated = memory("seqkd")
    assert estimated.checkpoint == 12 * 8_190_735_360  # float32 weights + two float32 moments
    assert estimated.checkpoints_kept == 3  # keep_last=2, and the one being written


def test_the_printed_plan_holds_the_numbers_and_marks_overrides() -> None:
    text = "\n".join(plan("warmup", "chengla-8b", "actor.optim.lr=2e-6", dropped=12).render())
    for expected in (
        "1,000 kept, 12 dropped; 7 steps per epoch of 128 prompts x 8 answers; 104 left over", "56 (8 epochs of 7)",
        "critic alone in the first 10", "optim.lr=2e-06*", "clip_ratio_low=0.1", "loss=final", "n=8", "temperature=0.8",
        "runs/chengla-8b-warmup/", "global_step_56/{actor,critic,trainer}", "has no effect", "134.5 M",
    ):  # fmt: skip
        assert expected in " ".join(text.split()), expected


@pytest.mark.parametrize("width", [60, 76, 100])
def test_the_printed_plan_keeps_its_width(width: int) -> None:
    free = {"ram": 20.0, "disk": 50.0, "device": 80.0}
    for line in plan("gad", "chengla-8b", world_size=8, device="cuda", free_gb=free).render(width):
        assert len(line) <= max(width, 66), line  # the table and the title are 66 wide at most


def test_a_plan_without_data_or_model_says_so() -> None:
    resolved = resolve("gad", "chengla-8b")
    bare = make_plan(resolved.config, None, None, None, 1)
    text = "\n".join(bare.render())
    assert "no training file given" in text
    assert "config.json is not on this machine" in text
    assert json.loads(json.dumps(bare.to_json()))["steps"]["total"] is None


def test_plan_json_agrees_with_what_is_printed() -> None:
    made = plan("warmup", "chengla-8b")
    data = json.loads(json.dumps(made.to_json()))
    assert data["steps"] == {"per_epoch": 7, "total": 56, "critic_only": 10, "actor": 46, "epochs": 8}
    assert data["models"] == {"student": 134_515_008, "critic": model_shape(SMOLLM2).critic_params}
    assert data["disk_bytes"] == data["memory"]["checkpoint"] * 3
    # 128 prompts x 8 answers x 256 tokens
    assert data["tokens_per_step"]["sampled"] == 262_144


def test_what_does_not_fit_is_said_with_the_way_out() -> None:
    free = {"device": 24.0, "ram": 1.0, "disk": 1.0}
    lines = plan("gad", "chengla-8b", "data.max_response_length=256", device="cuda", free_gb=free).unusual
    small = [line for line in lines if "of disk" in line or "host memory" in line]
    assert len(small) == 2
    big = memory("gad")
    assert big.training_peak / GIB > 80  # an 8B student, reference and critic on one GPU: 16 + 4 + 16 bytes a parameter
