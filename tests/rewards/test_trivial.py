"""What the plan says of rewards that a trivial answer maximises."""

from __future__ import annotations

from pathlib import Path

import pytest

from gadcli.config.resolve import resolve
from gadcli.config.rewards import reward_specs
from gadcli.config.schema import DataConfig
from gadcli.errors import ConfigError
from gadcli.launch.stage import StageRequest, prepare
from gadcli.rewards.build import RewardSet
from gadcli.rewards.trivial import Example, reward_notes, trivial_scores
from tiny import write_tiny_data, write_tiny_model

ROWS = [
    Example(0, [{"role": "user", "content": "give json"}], '{"a": 1}'),
    Example(1, [{"role": "user", "content": "[1]"}], "[2, 3]"),
]


def test_each_kind_of_answer_is_scored(tmp_path: Path) -> None:
    """The second prompt is valid JSON itself; an endless answer is several values, so it is not."""
    means = trivial_scores(RewardSet(reward_specs([{"kind": "parses", "language": "json"}]), tmp_path), ROWS)
    expected = {"teacher": 1.0, "empty": 0.0, "prompt repeated": 0.5, "another row's answer": 1.0, "endless": 0.0}
    assert means == {"parses": expected}


def test_a_reward_that_pays_more_for_nothing_than_for_the_teacher_is_called_out(tmp_path: Path) -> None:
    data = DataConfig(train_files=[str(write_tiny_data(tmp_path / "d.parquet", 8))])
    (tmp_path / "r.py").write_text("def f(p, answers, r):\n    return [-float(len(a)) for a in answers]\n")
    brief = {"name": "brief", "kind": "python", "function": f"{tmp_path}/r.py:f"}
    (note,) = reward_notes(reward_specs([brief]), data)
    assert note.startswith("reward brief pays more for empty")
    assert "endless" not in note.partition(" than ")[0]
    (note,) = reward_notes(reward_specs([brief | {"weight": -1.0}]), data)  # a penalty for brevity
    assert note.startswith("reward brief pays more for prompt repeated and endless")


def test_the_plan_shows_it_and_a_broken_function_ends_with_2_before_a_model_loads(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    write_tiny_data(tmp_path / "d.parquet", 24)
    (tmp_path / "r.py").write_text("def f(p, answers, r):\n    return [1.0 / len(a) for a in answers]\n")
    words = (
        f"data.train_files={tmp_path}/d.parquet", f"actor.model.path={tmp_path}/model",
        f"trainer.output_dir={tmp_path}/runs", "trainer.exp_name=x", "rollout.max_model_len=300",
        "data.max_prompt_length=200", "data.max_response_length=100", "data.train_batch_size=4",
    )  # fmt: skip
    length = "rewards=[{kind: discriminator}, {kind: length}]"
    plan = prepare(StageRequest("gad", overrides=(*words, length), dry_run=True)).plan
    assert any(line.startswith("reward length, by kind of answer: teacher 1,") for line in plan.unusual)
    broken = f"rewards=[{{kind: discriminator}}, {{name: f, kind: python, function: '{tmp_path}/r.py:f'}}]"
    with pytest.raises(ConfigError, match=r"reward f .*ZeroDivisionError"):
        prepare(StageRequest("gad", overrides=(*words, broken), dry_run=True))


def test_a_judge_is_not_asked_by_the_plan_but_its_address_is_checked() -> None:
    judge = {"kind": "judge", "endpoint": "ftp://host/v1", "model": "m"}
    with pytest.raises(ConfigError, match="not an http"):
        reward_notes(reward_specs([judge]), DataConfig())
    assert reward_notes(reward_specs([judge | {"endpoint": "http://127.0.0.1:9/v1"}]), DataConfig()) == []


def test_a_stage_that_ignores_rewards_says_so() -> None:
    from gadcli.config.checks import check

    config = resolve("seqkd", overrides=["rewards=[{kind: length}]"]).config
    assert any("rewards do nothing" in line for line in check(config))
    config = resolve("gad", overrides=["rewards=[{kind: length}]"]).config
    assert any("lists no discriminator" in line for line in check(config))
