"""A run with rewards beside the discriminator: what they were asked, what was learned from, what was logged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gadcli.errors import ConfigError
from train.in_process import begin, process_as_it_was, to_the_end
from train.training import steps as steps_of

REWARD = """
import json
def f(prompts, answers, rows):
    scores = [-float(row["tokens"]) for row in rows]
    with open({path!r}, "a") as file:
        file.write(json.dumps([[p[-1]["content"], a, r["row_id"], r["tokens"], r["teacher_response"]]
                               for p, a, r in zip(prompts, answers, rows)]) + "\\n")
    return scores
"""


def test_the_student_learns_from_the_mixture_and_each_part_is_logged(tmp_path: Path, inputs: Path) -> None:
    """Weight 0 for the discriminator, and minus the tokens for a function: the advantages are those of the lengths."""
    asked = tmp_path / "asked.jsonl"
    (tmp_path / "mine.py").write_text(REWARD.format(path=str(asked)))
    entries = (
        f"rewards=[{{kind: discriminator, weight: 0}}, {{name: brief, kind: python, function: '{tmp_path}/mine.py:f'}}]"
    )
    with process_as_it_was():
        run = begin(
            tmp_path / "r", inputs, entries, "algorithm.adv_estimator=dr_grpo", "trainer.total_steps=2",
            "trainer.test_freq=0", "trainer.save_freq=0",
        )  # fmt: skip
        rows = {row.row_id: row for row in (run.train_data[i] for i in range(len(run.train_data)))}
        to_the_end(run)
    batches = [json.loads(line) for line in asked.read_text().splitlines()]
    steps = list(steps_of(tmp_path / "r").values())
    assert len(batches) == len(steps) == 2
    for batch, metrics in zip(batches, steps, strict=True):
        assert len(batch) == 4  # two prompts, two answers each, a prompt's answers beside each other
        assert batch[0][2] == batch[1][2] != batch[2][2] == batch[3][2]
        for prompt, _, row_id, _, teacher in batch:
            assert (prompt, teacher) == (rows[row_id].messages[-1]["content"], rows[row_id].teacher)
        lengths = [float(item[3]) for item in batch]
        gaps = [abs(lengths[0] - lengths[1]), abs(lengths[2] - lengths[3])]
        assert metrics["critic/advantages/max"] == pytest.approx(max(gaps) / 2)
        assert metrics["critic/advantages/min"] == pytest.approx(-max(gaps) / 2)
        assert metrics["reward/brief/mean"] == pytest.approx(-sum(lengths) / 4)
        assert metrics["response_length/mean"] == pytest.approx(sum(lengths) / 4)
        assert metrics["reward/brief/std"] == pytest.approx(sum(gaps) / 2 / 2**0.5)  # of two: their gap over sqrt 2
        if max(gaps):
            assert metrics["reward/brief/share"] == pytest.approx(1.0)
            assert metrics["reward/discriminator/share"] == pytest.approx(0.0)


def test_a_reward_that_raises_ends_the_run_before_any_weight_moves(tmp_path: Path, inputs: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(p, a, r):\n    raise RuntimeError('no licence')\n")
    entries = f"rewards=[{{kind: discriminator}}, {{name: bad, kind: python, function: '{tmp_path}/mine.py:f'}}]"
    with process_as_it_was():
        run = begin(tmp_path / "r", inputs, entries)
        with pytest.raises(ConfigError, match=r"reward bad .*no licence"):
            to_the_end(run)
        assert run.actor.optimizer.updates == 0


def test_the_discriminator_alone_in_the_list_changes_nothing(tmp_path: Path, inputs: Path) -> None:
    """Bit for bit the run without `rewards`."""
    found = []
    for name, more in (("plain", []), ("listed", ["rewards=[{kind: discriminator}]"])):
        with process_as_it_was():
            to_the_end(begin(tmp_path / name, inputs, *more, "trainer.total_steps=2"))
        found.append({
            step: {key: value for key, value in metrics.items() if not key.startswith("reward/")}
            for step, metrics in steps_of(tmp_path / name).items()
        })  # fmt: skip
    assert found[0] == found[1]
