"""Semantics pinned: the objectives soda (a snapshot, kept, exact at resume) and best_of_n (a fixed critic ranks).

The real worker on a tiny model.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gadcli.data.batches import TokenizedRow
from gadcli.errors import CheckpointError
from gadcli.model import rollout_batch
from gadcli.model.packing import Group
from gadcli.model.rollout_batch import Answer, Rollout
from gadcli.train.build import close_run
from gadcli.train.soda import SNAPSHOT_FILE, begin_file, read_snapshot, take_snapshot
from gadcli.train.stages import train_adversarial
from mutants import mutated
from train.in_process import begin, tensors_of
from train.training import manifest_hashes, prepare, records, start, steps, train

SODA = ["actor.objective=soda", "actor.soda.beta=0.5", "trainer.total_steps=6", "trainer.save_freq=3",
        "trainer.test_freq=0", "rollout.max_num_seqs=10"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = prepare(tmp_path_factory.mktemp("runs") / "soda", inputs, "seqkd", *SODA)
    train(run_dir)
    return run_dir


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / SNAPSHOT_FILE).read_text().splitlines()]


def test_soda_starts_without_a_preference_and_learns_one(whole: Path) -> None:
    found = steps(whole)
    assert found[1]["actor/soda_loss"] == pytest.approx(math.log(2), abs=1e-4)  # the student is its own reference
    assert found[1]["actor/soda_teacher_gain"] == pytest.approx(0.0, abs=1e-3)
    assert found[1]["actor/soda_acc"] == 0.5 or abs(found[1]["actor/soda_margin"]) < 1e-4
    assert found[6]["actor/soda_margin"] > 0.5 and found[6]["actor/soda_acc"] > 0.9
    assert found[6]["actor/soda_loss"] < found[3]["actor/soda_loss"] < found[1]["actor/soda_loss"]
    assert not (whole / "global_step_6" / "critic").exists()


def test_the_snapshot_is_one_answer_to_every_training_row_sampled_before_the_first_step(whole: Path) -> None:
    header, *lines = lines_of(whole)
    assert header["temperature"] == 1.0 and [line["row"] for line in lines] == list(range(24))
    assert all(1 <= len(line["ids"]) <= 16 and len(line["logp"]) == 2 for line in lines)
    notes = [(i, r) for i, r in enumerate(records(whole)) if "start model's answers" in str(r.get("message"))]
    first_step = next(i for i, r in enumerate(records(whole)) if r["type"] == "step")
    assert len(notes) == 1 and notes[0][0] < first_step and "to 24 prompts" in notes[0][1]["message"]


@pytest.mark.slow
def test_a_resumed_run_reads_the_same_snapshot_and_ends_in_the_same_bits(whole: Path, tmp_path: Path) -> None:
    again = tmp_path / "soda"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "global_step_6")
    (again / "latest").write_text("3")
    train(again, resume=True)
    assert manifest_hashes(again, 6) == manifest_hashes(whole, 6) and steps(again) == steps(whole)
    assert (again / SNAPSHOT_FILE).read_bytes() == (whole / SNAPSHOT_FILE).read_bytes()


@pytest.mark.slow
def test_two_processes_sample_and_learn_what_one_does(whole: Path, inputs: Path, tmp_path: Path) -> None:
    two = prepare(tmp_path / "soda", inputs, "seqkd", *SODA)
    train(two, world=2)
    ours, theirs = lines_of(two), lines_of(whole)
    assert [line.get("ids") for line in ours] == [line.get("ids") for line in theirs]
    one_step, other_step = steps(two)[6], steps(whole)[6]
    for name in ("actor/soda_loss", "actor/soda_margin", "actor/soda_acc", "actor/grad_norm"):
        assert one_step[name] == pytest.approx(other_step[name], rel=1e-3, abs=1e-4), name


def test_a_snapshot_that_is_cut_short_is_completed_before_training_and_refused_after(
    whole: Path, tmp_path: Path
) -> None:
    again = tmp_path / "soda"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "global_step_6")
    shutil.rmtree(again / "global_step_3")
    complete = (again / SNAPSHOT_FILE).read_bytes()
    (again / SNAPSHOT_FILE).write_bytes(complete[:-20])  # the last line is torn, as by a kill
    train(again, resume=True)
    assert (again / SNAPSHOT_FILE).read_bytes() == complete  # row 23 is sampled again, from its own seed
    (again / SNAPSHOT_FILE).write_bytes(complete[:-20])
    shutil.rmtree(again / "global_step_6")
    (again / "latest").write_text("3")
    (worker,) = start(again, resume=True)
    assert worker.wait(240) == 4
    assert "1 rows are missing" in json.loads((again / "logs" / "rank_0.exit.json").read_text())["message"]


def test_the_snapshots_log_probs_are_the_start_models(inputs: Path, tmp_path: Path, left_as_it_was: None) -> None:
    run = begin(tmp_path / "run", inputs, "actor.objective=soda", "trainer.critic_warmup=-1", stage="seqkd")
    snapshot = take_snapshot(run)
    assert snapshot is not None
    row = run.train_data[5]
    (group,), logp_P2 = snapshot.pairs([row])
    assert group.prompt_ids == row.prompt_ids and group.answers[0] == row.teacher_ids
    for answer, kept in zip(group.answers, logp_P2[0].tolist(), strict=True):
        ids = torch.tensor([row.prompt_ids + answer])
        with torch.no_grad():
            logp = run.actor.model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        assert kept == pytest.approx(float(logp[len(row.prompt_ids) - 1 :].sum()), abs=1e-3)
    close_run(run)


def test_a_snapshot_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SNAPSHOT_FILE
    begin_file(path, {"seed": 1, "temperature": 1.0})
    assert read_snapshot(path, {"seed": 1, "temperature": 1.0}).offsets == {}
    with pytest.raises(CheckpointError, match="another temperature"):
        read_snapshot(path, {"seed": 1, "temperature": 0.5})


# -- best of n ---------------------------------------------------------------------------------------------------------


def two_prompts() -> tuple[Rollout, torch.Tensor]:
    rows = [TokenizedRow(i, [i], [9], [], "") for i in range(2)]
    answers = [[Answer([10 * p + g], [0.0], True) for g in range(3)] for p in range(2)]
    return Rollout(rows, answers), torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.5, -1.0]])


def check_best(module: Any = rollout_batch) -> None:
    rollout, scores_PG = two_prompts()
    groups = [(g.prompt_ids, g.answers, g.row_id) for g in module.best_groups(rollout, scores_PG)]
    assert groups == [([0], [[1]], 0), ([1], [[10]], 1)]  # the first of equals


def test_the_best_answer_of_each_group_is_taken_and_mutants_take_another() -> None:
    check_best()
    for old, new in [("scores_PG.argmax(-1)", "scores_PG.argmin(-1)"), ("[group[best].ids]", "[row.teacher_ids]")]:
        with pytest.raises(AssertionError):
            check_best(mutated("model.rollout_batch", old, new))


def recorded(owner: Any, method: str) -> list[tuple[tuple[Any, ...], Any]]:
    """(arguments, result) of each call of a method from now on."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    plain = getattr(owner, method)

    def call(*given: Any) -> Any:
        calls.append((given, plain(*given)))
        return calls[-1][1]

    setattr(owner, method, call)
    return calls


def test_best_of_n_learns_its_best_answers_and_leaves_the_critic_alone(
    inputs: Path, tmp_path: Path, left_as_it_was: None
) -> None:
    """The student's weights after a step are those of a supervised step on the answers that score highest."""
    own = ["actor.objective=best_of_n", "trainer.total_steps=1", f"critic.model.path={inputs / 'model'}"]
    run = begin(tmp_path / "run", inputs, *own)
    before = {name: tensor.clone() for name, tensor in tensors_of(run).items()}
    learnt, sampled = recorded(run.actor, "sft_update"), recorded(run, "roll_out")
    train_adversarial(run)
    after = tensors_of(run)
    ((groups,), _), (_, rollout) = learnt[0], sampled[0]
    for group, row, answers in zip(groups, rollout.rows, rollout.answers, strict=True):
        scores = run.critic.score([Group(row.prompt_ids, [a.ids for a in answers])])[0]
        assert group.answers == [answers[int(scores.argmax())].ids]
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("actor/") for name in changed)
    run.records.end(0, "done")
    close_run(run)
    (metrics,) = steps(tmp_path / "run").values()
    assert metrics["actor/best_of_n_gain"] > 0 and metrics["actor/sft_loss"] > 0 and "critic/score_std" in metrics
