"""Both samplers on a tiny model: what decides a draw, what an answer holds, and the proof that weights arrived.

Semantics pinned here: a prompt's seed alone decides its answers, whatever else is in the batch; the answers of one
prompt differ; EOS is part of an answer that ended, and an answer cut at max_tokens is not finished; log-probs are those
of the actor at the sampling temperature; after `load` the sampler runs the actor's weights, and the probe says so
with figures when it does not. In all of these tests the folder's generation_config.json asks for penalties, warpers and
ends of its own, and gets none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gadcli.config.schema import RolloutConfig
from gadcli.distributed.world import World
from gadcli.errors import SyncError
from gadcli.launch.environment import engine_variables, free_port
from gadcli.rollout import hf_sampler as rollout_hf
from gadcli.rollout.hf_sampler import HfSampler
from gadcli.rollout.sampler import Sampling
from gadcli.rollout.weight_sync import whole_layers
from model.parts import TEMPERATURE, build_actor
from mutants import mutated
from rollout.sampler_checks import (
    MAX_TOKENS,
    PROMPTS,
    SEEDS,
    check_draws,
    check_frequencies,
    check_second_sync,
    check_sync,
    make_hostile,
    partly_trained,
)
from tiny import write_tiny_model
from train.training import environment

Z = 5.0  # standard deviations: a correct sampler is beyond them once in 3.5 million
LOGP = 2e-5  # float32, another order of summation


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama whose generation_config.json would change every draw."""
    return str(make_hostile(write_tiny_model(tmp_path_factory.mktemp("hostile"))))


def hf(world: World, path: str, cls: type[HfSampler] = HfSampler, eos: int = 1) -> HfSampler:
    return cls(RolloutConfig(max_num_seqs=8, max_model_len=64), path, world, [eos], torch.float32)


def assert_draws(found: dict[str, Any]) -> None:
    """What holds for the draws of any sampler (see `sampler_checks.check_draws`)."""
    assert found["again"] == found["ids"]
    assert found["alone"] == found["ids"]
    assert found["backwards"] == found["ids"][::-1]
    assert found["other_seed"] != found["ids"]
    assert all(len({tuple(answer) for answer in group}) == 4 for group in found["ids"])
    assert found["logp_difference"] < LOGP
    # the first token of the first answer is made EOS: that answer is this token alone, and it is finished
    eos = found["ids"][0][0][0]
    for group, ended, finished in zip(found["ids"], found["with_eos"], found["finished"], strict=True):
        for answer, cut, done in zip(group, ended, finished, strict=True):
            if answer[-1] == 1:  # ended by the first EOS; what would have followed is not known
                continue
            assert done == (eos in answer)
            assert cut == (answer[: answer.index(eos) + 1] if eos in answer else answer)
            assert len(cut) == MAX_TOKENS or done
    finished = [done for group in found["finished"] for done in group]
    assert finished[0] and not all(finished)


def assert_frequencies(found: list[dict[str, float]]) -> None:
    """Pearson's statistic is below its quantile at Z by Wilson and Hilferty: (X / k)^(1/3) is nearly normal, of mean
    1 - 2 / 9k and variance 2 / 9k."""
    for one in found:
        k = one["freedom"]
        assert k >= 5 and one["mass"] < 1 + 1e-4
        assert one["chi2"] < k * (1 - 2 / (9 * k) + Z * (2 / (9 * k)) ** 0.5) ** 3


def assert_sync(found: dict[str, Any]) -> None:
    """What holds for any sampler's weights (see `sampler_checks.check_sync`)."""
    assert found["after_load"] < 1e-4
    assert "after syncing weights for step 2, sampler and actor differ: largest |log-prob difference|" in found["stale"]
    assert "tolerance 0.001" in found["stale"]
    assert found["after_reload"] < 1e-4
    assert found["after_lora"] < 1e-4
    assert found["lora_is_seen"] > 0.01
    assert found["greedy"] == found["greedy_by_hand"]


def test_transformers_draws_by_seed_alone(world: World, model_path: str) -> None:
    assert_draws(check_draws(lambda eos: hf(world, model_path, eos=eos), build_actor(world, model_path)))


def test_draws_from_the_global_generator_would_be_caught(world: World, model_path: str) -> None:
    mutant = mutated("rollout.hf_sampler", "exponential_(generator=g)", "exponential_()").HfSampler
    found = check_draws(lambda eos: hf(world, model_path, mutant, eos), build_actor(world, model_path))
    assert found["again"] != found["ids"]
    assert found["alone"] != found["ids"]


def test_transformers_draws_as_often_as_its_logprobs_say(world: World, model_path: str) -> None:
    assert_frequencies(check_frequencies(hf(world, model_path)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("generation_config=GenerationConfig()", "generation_config=None"),  # the folder's word reaches the rollout
        ("scores.float() / self.temperature", "scores.float()"),  # logits that were not divided
        ("logits_BV.gather(1, drawn_B1) - logits_BV.logsumexp", "scores.gather(1, drawn_B1) - scores.logsumexp"),
    ],
)
def test_draws_of_another_distribution_would_be_caught(world: World, model_path: str, old: str, new: str) -> None:
    sampler = hf(world, model_path, mutated("rollout.hf_sampler", old, new).HfSampler)

    def check() -> None:
        assert_frequencies(check_frequencies(sampler))
        found = check_draws(lambda eos: sampler, build_actor(world, model_path))
        assert found["logp_difference"] < LOGP

    with pytest.raises((AssertionError, ValueError)):
        check()


def test_transformers_runs_the_weights_it_was_given(world: World, model_path: str) -> None:
    sampler = hf(world, model_path)
    assert_sync(check_sync(sampler, build_actor(world, model_path), build_actor(world, model_path, lora=4)))


def test_what_training_moves_is_all_that_a_second_sync_needs(world: World, model_path: str) -> None:
    found = check_second_sync(hf(world, model_path), partly_trained(world, model_path))
    assert max(found.values()) < 1e-4


@pytest.mark.parametrize(
    ("old", "new"),
    [("if p.requires_grad}", "if p.dim() == 1}"), ('".weight" if ".lora_" in name', '"" if ".lora_" in name')],
)
def test_a_second_sync_that_leaves_out_what_moved_would_be_caught(
    world: World, model_path: str, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    monkeypatch.setattr(rollout_hf, "changing_names", mutated("rollout.weight_sync", old, new).changing_names)
    with pytest.raises((SyncError, AssertionError)):
        check_second_sync(hf(world, model_path), partly_trained(world, model_path))


def test_a_packed_layer_is_sent_whole_or_not_at_all() -> None:
    names = [f"model.layers.{i}.{module}" for i in (0, 1) for module in (
        "self_attn.q_proj.weight", "self_attn.q_proj.bias", "self_attn.k_proj.weight", "self_attn.k_proj.bias",
        "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight",
    )]  # fmt: skip
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    moved = {"model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"}
    assert whole_layers(names, moved, packed) == {
        "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.bias",
        "model.layers.0.self_attn.o_proj.weight",
    }  # fmt: skip
    assert whole_layers(names, moved, {}) == moved | {"model.layers.1.self_attn.q_proj.bias"}
    assert whole_layers(names, set(), packed) == set()


def test_a_sync_that_forgets_a_weight_would_be_caught(world: World, model_path: str) -> None:
    model = build_actor(world, model_path).model
    del model.model.layers[1]
    with pytest.raises(AssertionError, match="did not send"):
        hf(world, model_path).load(model)


def test_top_k_and_top_p_leave_only_the_most_probable_token(world: World, model_path: str) -> None:
    """top_k 1, or a nucleus smaller than the first token: sampling becomes greedy, whatever the seeds."""
    sampler = hf(world, model_path)
    greedy = sampler.generate(PROMPTS, Sampling(2, 0.0, 1.0, -1, MAX_TOKENS), SEEDS)
    for top_p, top_k in ((1.0, 1), (1e-6, -1)):
        drawn = sampler.generate(PROMPTS, Sampling(2, TEMPERATURE, top_p, top_k, MAX_TOKENS), SEEDS)
        assert [[a.ids for a in group] for group in drawn] == [[a.ids for a in group] for group in greedy]


@pytest.mark.slow
def test_vllm_draws_by_seed_alone_and_runs_the_weights_it_was_given(model_path: str, tmp_path: Path) -> None:
    """The real engine in a process of its own, since it takes the process group with it when it goes."""
    pytest.importorskip("vllm")
    env = {key: value for key, value in environment().items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(Path(__file__).with_name("sampler_checks.py")), model_path, str(tmp_path / "found")]
    done = subprocess.run(command, env=env | engine_variables(), capture_output=True, text=True, timeout=280)
    assert (tmp_path / "found").exists(), done.stderr[-3000:]
    found = json.loads((tmp_path / "found").read_text())
    assert_draws(found["draws"])
    assert_frequencies(found["frequencies"])
    assert_sync(found["sync"])
    assert max(found["second"].values()) < 1e-4 and len(found["second"]) == 3
    assert found["environment_kept"]


@pytest.mark.slow
def test_two_ranks_that_share_an_engine_get_the_answers_to_their_own_prompts(model_path: str, tmp_path: Path) -> None:
    """rollout.tensor_parallel_size=2 with the real engine: weights split over two ranks, requests of both in one."""
    pytest.importorskip("vllm")
    script = Path(__file__).with_name("team_checks.py")
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        store = {"GAD_STORE_FILE": str(tmp_path / "store"), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        env = environment() | engine_variables() | place | store
        log = (tmp_path / f"log.{rank}").open("wb")
        command = [sys.executable, str(script), model_path, str(tmp_path / "found")]
        ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    for rank, process in enumerate(ranks):
        process.wait(280)
        assert (tmp_path / f"found.{rank}").exists(), (tmp_path / f"log.{rank}").read_text()[-3000:]
    found = [json.loads((tmp_path / f"found.{rank}").read_text()) for rank in range(2)]
    assert [(f["groups"], f["answers"]) for f in found] == [(2, 8), (3, 12)]
    for one in found:
        assert one["probe"] < 1e-4 and one["logp_difference"] < 1e-4
