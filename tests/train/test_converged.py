"""Semantics pinned: held-out measures decide what is kept and when a run ends (trainer.keep_best, trainer.stop_after).

A real worker on a tiny model with a learning rate that soon ruins it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gadcli.checkpoint.manifest import list_checkpoints, read_manifest
from gadcli.checkpoint.retention import best_checkpoint
from gadcli.model.rollout_batch import teacher_groups
from gadcli.train import loop
from gadcli.train.build import close_run
from gadcli.train.evaluation import evaluate
from train.in_process import begin
from train.training import prepare, records, train


@pytest.fixture(scope="module")
def run_dir(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ["trainer.total_steps=60", "trainer.test_freq=2", "trainer.save_freq=0", "actor.optim.lr=0.1",
                "trainer.keep_best=val/nll", "trainer.stop_after=3"]  # fmt: skip
    run_dir = prepare(tmp_path_factory.mktemp("runs") / "converged", inputs, "seqkd", *settings)
    train(run_dir)
    return run_dir


def nll(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["metrics"]["val/nll"] for r in records(run_dir) if r["type"] == "eval"}


def test_the_run_ends_after_three_evaluations_without_a_better_one(run_dir: Path) -> None:
    found = nll(run_dir)
    best = min(found, key=lambda step: found[step])
    assert list(found) == list(range(2, best + 7, 2)) and max(found) < 60
    (note,) = [r["message"] for r in records(run_dir) if "stop_after" in str(r.get("message"))]
    assert note == "no better val/nll in 3 evaluations (trainer.stop_after): the run ends"


def test_the_best_weights_are_saved_when_they_are_found_and_kept(run_dir: Path) -> None:
    found = nll(run_dir)
    best = min(found, key=lambda step: found[step])
    assert best_checkpoint(run_dir, "val/nll") == run_dir / f"global_step_{best}"
    for path in list_checkpoints(run_dir):
        step = int(path.name.rpartition("_")[2])
        assert read_manifest(path).metrics["val/nll"] == found[step]


def test_a_save_between_evaluations_records_no_figures_of_other_weights(inputs: Path, tmp_path: Path) -> None:
    settings = ["trainer.total_steps=3", "trainer.test_freq=2", "trainer.save_freq=1", "trainer.keep_best=val/nll"]
    run_dir = prepare(tmp_path / "run", inputs, "seqkd", *settings)
    train(run_dir)
    kept = {path.name: read_manifest(path).metrics for path in list_checkpoints(run_dir)}
    found = nll(run_dir)
    assert kept["global_step_3"]["val/nll"] == found[3] and kept["global_step_2"]["val/nll"] == found[2]
    assert all(metrics == {} for name, metrics in kept.items() if name == "global_step_1")
    progress = json.loads((run_dir / "global_step_2" / "trainer" / "trainer.json").read_text())
    assert progress["best"] == found[2] and progress["evals_since_best"] == 0


def test_nll_is_the_held_out_teachers_text_per_token(inputs: Path, tmp_path: Path, left_as_it_was: None) -> None:
    run = begin(tmp_path / "run", inputs, "trainer.critic_warmup=-1", stage="seqkd")
    total, tokens = 0.0, 0
    assert run.val_data is not None
    for group in teacher_groups(list(run.val_data)):
        ids = torch.tensor([group.prompt_ids + group.answers[0]])
        with torch.no_grad():
            logp = run.actor.model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        total -= float(logp[len(group.prompt_ids) - 1 :].sum())
        tokens += len(group.answers[0])
    assert evaluate(run)["val/nll"] == pytest.approx(total / tokens, rel=1e-5)
    close_run(run)


def test_the_best_is_the_lowest_nll_and_the_highest_rouge(inputs: Path, tmp_path: Path, left_as_it_was: None) -> None:
    for metric, values, expected in (
        ("val/nll", [3.0, 2.0, 2.5, 1.0], [True, True, False, True]),
        ("val/rouge_l", [0.1, 0.3, 0.3, 0.2], [True, True, False, False]),
    ):
        run = begin(
            tmp_path / metric[4:], inputs, "trainer.critic_warmup=-1", f"trainer.keep_best={metric}", stage="seqkd"
        )
        found = []
        for value in values:
            run.progress.last_eval = {metric: value}
            found.append(loop._note_best(run))
        assert found == expected
        close_run(run)
