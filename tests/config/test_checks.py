"""Cross-field checks: each refusal names the cure as an override, and each warning stands for something silent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gadcli.config.checks import check, check_inputs
from gadcli.config.resolve import resolve
from gadcli.errors import ConfigError


def judge(stage: str, *overrides: str, world_size: int = 1, preset: str | None = None) -> list[str]:
    resolved = resolve(stage, preset, overrides=list(overrides))
    return check(resolved.config, world_size, resolved.origins)


@pytest.mark.parametrize(
    ("stage", "overrides", "world_size", "message", "hint"),
    [
        ("gad", ["rollout.n=1"], 1, "rollout.n is 1, but group advantages need 2 or more", "rollout.n=8"),
        ("gad", ["trainer.critic_warmup=-1"], 1, "gad needs a critic", "trainer.critic_warmup=0"),
        ("warmup", ["trainer.critic_warmup=-1"], 1, "warmup needs a critic", "trainer.critic_warmup=10"),
        ("gad", ["actor.objective=sft"], 1, "gad takes policy or best_of_n", "actor.objective=policy"),
        ("gad", ["actor.objective=soda"], 1, "gad takes policy", "gad train seqkd actor.objective=soda"),
        ("seqkd", ["actor.objective=policy"], 1, "seqkd takes sft or soda", "actor.objective=sft"),
        ("seqkd", ["actor.objective=best_of_n"], 1, "seqkd takes sft", "gad train gad actor.objective=best_of_n"),
        ("seqkd", ["actor.objective=soda", "trainer.critic_warmup=0"], 1, "has no critic", "trainer.critic_warmup=-1"),
        ("seqkd", ["actor.objective=soda", "actor.model.lora.dropout=0.1"], 1, "differ by chance", "dropout=0"),
        ("gad", ["actor.objective=best_of_n"], 1, "ranks answers by a trained critic", "--reward-model"),
        ("gad", ["actor.objective=best_of_n", "critic.model.path=c", "rollout.n=1"], 1, "best_of_n needs 2", "n=8"),
        ("gad", ["actor.objective=best_of_n", "critic.model.path=c", "trainer.critic_warmup=5"], 1,
         "does not train the critic", "trainer.critic_warmup=0"),
        ("seqkd", ["trainer.critic_warmup=0"], 1, "seqkd has no critic", "trainer.critic_warmup=-1"),
        # 128 prompts over 3 processes: the nearest multiple of 3 is 129
        ("gad", [], 3, "not divisible by 3 processes", "data.train_batch_size=129"),
        # 128 = 2 * 64; the divisor of 128 nearest to 48 is 32 or 64 (both 16 away), the smaller is offered
        ("gad", ["actor.ppo_mini_batch_size=48"], 1, "does not divide data", "actor.ppo_mini_batch_size=32"),
        ("gad", ["critic.ppo_mini_batch_size=48"], 1, "critic.ppo_mini_batch_size is 48", "ppo_mini_batch_size=32"),
        ("gad", ["actor.ppo_mini_batch_size=2"], 4, "not divisible by 4 processes", "actor.ppo_mini_batch_size=0"),
        ("gad", ["fsdp.replicate=3"], 4, "divide the 4 processes", "fsdp.replicate=1"),
        ("gad", ["rollout.tensor_parallel_size=3"], 4, "divide the 4 processes per machine", "parallel_size=1"),
        # 4 processes on 2 machines: an engine of 4 would span both
        ("gad", ["rollout.tensor_parallel_size=4", "trainer.nnodes=2"], 4, "divide the 2 processes", "size=1"),
        ("gad", ["rollout.tensor_parallel_size=2", "rollout.engine=hf"], 4, "on every process alone", "size=1"),
        ("gad", ["rollout.sleep=true", "trainer.device=cpu"], 1, "it needs both", "rollout.sleep=false"),
        ("gad", ["actor.model.num_layers=2"], 1, "would run all of its layers", "actor.model.num_layers=0"),
        ("gad", ["actor.model.lora.dropout=0.1"], 1, "differ by chance", "actor.model.lora.dropout=0"),
        ("gad", ["critic.model.lora.dropout=0.1"], 1, "score differently", "critic.model.lora.dropout=0"),
        ("gad", ["critic.gradient_penalty=1", "critic.model.gradient_checkpointing=true"], 1,
         "differentiates twice", "critic.model.gradient_checkpointing=false"),
        ("warmup", ["trainer.critic_warmup_until=0.7"], 1, "held-out d_acc", "trainer.test_freq=5"),
        # 1024 + 1025 = 2049 > 2048
        ("gad", ["data.max_response_length=1025"], 1, "1024 + 1025 = 2049", "rollout.max_model_len=2049"),
        ("gad", ["trainer.logger=[consol]"], 1, "trainer.logger holds 'consol'", "[console,tensorboard]"),
        ("gad", ["trainer.keep_best=critic/d_acc"], 1, "only val/… metrics", "trainer.keep_best=val/rouge_l"),
        ("gad", ["trainer.keep_best=val/rouge_l"], 1, "trainer.test_freq is 0", "trainer.test_freq=20"),
    ],
)  # fmt: skip
def test_a_combination_that_cannot_work_is_refused_with_its_cure(
    stage: str, overrides: list[str], world_size: int, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        judge(stage, *overrides, world_size=world_size)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


def test_a_backbone_is_not_cut_to_layers_that_it_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    words = [f"actor.model.path={tmp_path}", "critic.model.num_layers=3"]
    with pytest.raises(ConfigError) as caught:  # the critic starts from the student where no other is named
        judge("warmup", *words)
    assert "critic.model.num_layers is 3" in caught.value.message and "has 2 layers" in caught.value.message
    judge("seqkd", *words)  # has no critic
    judge("warmup", f"actor.model.path={tmp_path}", "critic.model.num_layers=2")


def test_a_refusal_says_where_the_value_was_written(tmp_path: Path) -> None:
    file = tmp_path / "demo.yaml"
    file.write_text("rollout:\n  n: 1\n")
    resolved = resolve("gad", config_file=file)
    with pytest.raises(ConfigError, match=f"{file}:2: rollout.n is 1"):
        check(resolved.config, 1, resolved.origins)


def test_an_engine_spans_ranks_that_split_the_students_heads(tmp_path: Path) -> None:
    shape = {
        "model_type": "llama",
        "hidden_size": 90,
        "num_hidden_layers": 1,
        "num_attention_heads": 9,
        "vocab_size": 9,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    model = f"actor.model.path={tmp_path}"
    with pytest.raises(ConfigError, match="does not divide the student's 9 heads") as refused:
        judge("gad", model, "rollout.tensor_parallel_size=2", world_size=4)
    assert refused.value.hint == "rollout.tensor_parallel_size=1"
    judge("gad", model, "rollout.tensor_parallel_size=3", "data.train_batch_size=126", world_size=6)


def test_the_limit_itself_fits() -> None:
    """And one token or answer beyond it does not."""
    limits = ["data.max_prompt_length=1024", "data.max_response_length=1024"]
    assert not any("max_model_len" in line for line in judge("gad", *limits, "rollout.max_model_len=2048"))
    with pytest.raises(ConfigError, match="max_model_len"):
        judge("gad", *limits, "rollout.max_model_len=2047")
    assert not any("rollout.n" in line for line in judge("gad", "rollout.n=2"))
    with pytest.raises(ConfigError, match=r"rollout\.n is 1"):
        judge("gad", "rollout.n=1")


def test_dropout_and_held_out_releases_are_fine_where_they_act() -> None:
    found = judge("seqkd", "actor.model.lora.dropout=0.1")
    found += judge("warmup", "trainer.critic_warmup_until=0.7", "trainer.test_freq=5")
    found += judge("gad", "critic.gradient_penalty=1")
    assert [line for line in found if "dropout" in line or "critic_warmup_until" in line or "penalty" in line] == []


def test_sft_and_soda_need_no_group() -> None:
    found = judge("seqkd", "rollout.n=1") + judge("seqkd", "rollout.n=1", "actor.objective=soda")
    found += judge("warmup", "rollout.n=1", "actor.objective=sft")
    assert [line for line in found if "rollout.n" in line] == []


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["algorithm.kl_ctrl.kl_coef=0.001"], "algorithm.kl_ctrl.kl_coef=0.001 has no effect"),
        (["algorithm.use_kl_in_reward=true"], "nothing is subtracted"),
        (["actor.use_kl_loss=true", "actor.kl_loss_coef=0"], "the reference is run for nothing"),
        (["rollout.temperature=0.1"], "hardly differ"),
        (["data.train_files=[a.parquet]", "trainer.test_freq=5"], "trainer.test_freq: no effect without held-out rows"),
        (["critic.loss=v1"], "no upper bound"),
        (["critic.values=all", "data.max_response_length=512"], "saturates"),
        (["trainer.tensorboard.host=0.0.0.0"], "reachable from outside"),
        (["trainer.critic_warmup=5", "trainer.total_steps=10"], "half of them or fewer"),
        ([], "untrained discriminator"),
    ],
)
def test_what_is_legal_and_probably_not_meant_is_said(overrides: list[str], warning: str) -> None:
    assert any(warning in line for line in judge("gad", *overrides))
    if overrides:
        assert not any(warning in line for line in judge("gad"))


def test_kl_in_the_reward_makes_its_coefficient_act() -> None:
    lines = judge("gad", "algorithm.kl_ctrl.kl_coef=0.001", "algorithm.use_kl_in_reward=true")
    assert not any("inert" in line for line in lines)


def model_folder(
    path: Path, vocab: dict[str, int], architecture: str = "LlamaForCausalLM", added: str | None = None
) -> Path:
    path.mkdir(parents=True)
    rows = len(vocab) + (added is not None)
    config = {"model_type": "llama", "vocab_size": rows, "architectures": [architecture]}
    (path / "config.json").write_text(json.dumps(config))
    extra = [{"content": added, "id": len(vocab)}] if added else []
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": extra}))
    return path


CRITIC = "LlamaForTokenClassification"


def test_student_and_critic_must_mean_the_same_by_every_id(tmp_path: Path) -> None:
    student = model_folder(tmp_path / "student", {"a": 0, "b": 1})
    same = model_folder(tmp_path / "same", {"b": 1, "a": 0}, CRITIC)  # another order in the file, equal ids
    swapped = model_folder(tmp_path / "swapped", {"a": 1, "b": 0}, CRITIC)
    more = model_folder(tmp_path / "more", {"a": 0, "b": 1}, CRITIC, added="<|im_end|>")
    judge("gad", f"actor.model.path={student}", f"critic.model.path={same}")
    for other, count in ((swapped, 2), (more, 1)):
        with pytest.raises(ConfigError, match=f"{count} tokens have other ids"):
            judge("gad", f"actor.model.path={student}", f"critic.model.path={other}")


def test_sizes_are_compared_where_tokenizers_are_not_there(tmp_path: Path) -> None:
    student = model_folder(tmp_path / "student", {"a": 0, "b": 1})
    critic = model_folder(tmp_path / "critic-of-3", {"a": 0, "b": 1, "c": 2}, CRITIC)
    (critic / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="2 and 3 tokens"):
        judge("gad", f"actor.model.path={student}", f"critic.model.path={critic}")


def test_crossed_roles_are_refused(tmp_path: Path) -> None:
    actor = model_folder(tmp_path / "global_step_5" / "actor" / "huggingface", {"a": 0}).parent
    critic = model_folder(tmp_path / "global_step_5" / "critic" / "huggingface", {"a": 0}, CRITIC).parent
    with pytest.raises(ConfigError, match="a student's checkpoint, not a critic's"):
        judge("gad", f"actor.model.path={actor}", f"critic.model.path={actor}")
    with pytest.raises(ConfigError, match="which is a discriminator"):
        judge("gad", f"actor.model.path={critic}")
    judge("gad", f"actor.model.path={actor}", f"critic.model.path={critic}")


def test_a_real_run_needs_a_student_and_data() -> None:
    with pytest.raises(ConfigError, match=r"actor\.model\.path is empty"):
        check_inputs(resolve("gad").config)
    with pytest.raises(ConfigError, match=r"data\.train_files is empty"):
        check_inputs(resolve("gad", overrides=["actor.model.path=m"]).config)
