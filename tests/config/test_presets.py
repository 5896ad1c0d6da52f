"""The shipped presets hold exactly the numbers that their sources give, and presets extend one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from gadcli.config.checks import check
from gadcli.config.presets import preset_names
from gadcli.config.resolve import resolve
from gadcli.config.schema import STAGES
from gadcli.config.tree import flatten
from gadcli.errors import ConfigError

KEYS = (
    "actor.optim.lr", "critic.optim.lr", "actor.use_kl_loss", "actor.kl_loss_coef", "algorithm.kl_ctrl.kl_coef",
    "actor.entropy_coeff", "actor.policy_loss.loss_mode", "actor.clip_ratio_low", "actor.clip_ratio_high",
    "actor.ppo_epochs", "critic.loss", "data.train_batch_size", "trainer.total_epochs", "data.max_response_length",
    "rollout.max_model_len", "rollout.n", "rollout.temperature", "trainer.critic_warmup", "actor.objective",
)  # fmt: skip
# The notes' recommended settings; None where the stage does not use the key.
POLICY = (True, 0.001, 0.001, 0, "gspo", 0.1, 0.1, 2, "final", 128, 8, 256, 2048, 8, 0.8)
CHENGLA = {
    "seqkd": (5e-6, None, False, 0, 0, 0, None, None, None, 1, None, 256, 4, 256, 2048, 8, 0.8, -1, "sft"),
    "warmup": (3e-6, 1e-6, *POLICY, 10, "policy"),
    "gad": (3e-6, 1e-6, *POLICY, 0, "policy"),
}


def values(preset: str, stage: str) -> dict[str, object]:
    return flatten(resolve(stage, preset).config)


@pytest.mark.parametrize("stage", STAGES)
def test_chengla_8b_has_the_notes_numbers(stage: str) -> None:
    found = values("chengla-8b", stage)
    for key, expected in zip(KEYS, CHENGLA[stage], strict=True):
        assert expected is None or found[key] == expected, key


def test_chengla_8b_v0_has_the_first_settings() -> None:
    found = values("chengla-8b-v0", "warmup")
    expected = {
        "actor.optim.lr": 1e-6, "critic.optim.lr": 5e-6, "data.train_batch_size": 256, "trainer.total_epochs": 2,
        "data.max_response_length": 512, "rollout.max_model_len": 2550, "actor.clip_ratio_low": 3e-4,
        "actor.clip_ratio_high": 4e-4, "critic.loss": "v2",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected


def test_gad_paper_has_the_papers_numbers() -> None:
    expected = {
        "data.train_batch_size": 256, "rollout.n": 8, "rollout.temperature": 0.8, "data.max_prompt_length": 2048,
        "data.max_response_length": 1536, "data.truncation": "right", "actor.optim.lr": 1e-6, "critic.optim.lr": 1e-6,
        "actor.grad_clip": 0.2, "critic.grad_clip": 0.2, "critic.loss": "original", "critic.values": "last",
        "actor.clip_ratio_low": 0.2, "actor.clip_ratio_high": 0.2, "actor.kl_loss_coef": 0.001,
        "actor.use_kl_loss": True, "actor.ppo_mini_batch_size": 0, "actor.ppo_epochs": 1, "actor.objective": "policy",
    }  # fmt: skip
    found = values("gad-paper", "gad")
    assert {key: found[key] for key in expected} == expected
    assert found["actor.policy_loss.loss_mode"] == "ppo"
    assert values("gad-paper", "seqkd")["actor.optim.lr"] == 5e-6
    assert values("gad-paper", "warmup")["actor.objective"] == "sft"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_passes_the_checks(preset: str, stage: str) -> None:
    check(resolve(stage, preset).config, world_size=2 if preset == "demo" else 8)


def test_the_inert_kl_coefficient_of_the_notes_is_said_to_be_inert() -> None:
    assert any("kl_coef=0.001 has no effect" in warning for warning in check(resolve("gad", "chengla-8b").config, 1))


def test_a_file_goes_over_all_that_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("common:\n  rollout: {n: 2}\ngad:\n  rollout: {n: 3, top_p: 0.5}\n")
    (tmp_path / "child.yaml").write_text("extends: ./base.yaml\ncommon:\n  rollout: {n: 4}\n")
    # the child's common goes over its parent's gad section; top_p is inherited
    resolved = resolve("gad", str(tmp_path / "child.yaml"))
    assert (resolved.config.rollout.n, resolved.config.rollout.top_p) == (4, 0.5)
    assert resolved.origins["rollout.n"].endswith("child.yaml:3")
    assert resolved.origins["rollout.top_p"].endswith("base.yaml:4")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("extends: ./me.yaml\n", "extends itself"),
        ("commn:\n  rollout: {n: 4}\n", "unknown key commn"),
        ("gad: 3\n", "gad must hold keys"),
        ("seqkd:\n  rollout: {nn: 4}\n", "unknown key rollout.nn"),  # though gad is asked for
        ("extends: [a]\n", "must be one text"),
    ],
)
def test_a_broken_preset_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "me.yaml").write_text(text)
    with pytest.raises(ConfigError, match=complaint.replace("[", r"\[")):
        resolve("gad", str(tmp_path / "me.yaml"))


def test_an_unknown_preset_offers_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("gad", "chengla-8")
    assert "did you mean chengla-8b" in str(caught.value.hint)
