"""trainer.overlap: the next answers are drawn beside the critic's update, and nothing else changes.

Pinned here: weights, moments and metrics are those without overlap, bit for bit, in every regime and at two ranks · the
order of updates is the documented one · both really run at once · answers are of the weights that learn from them, and
older ones are seen, thrown away and drawn anew · a stopped, a killed and a resumed run are the uninterrupted one · an
error or a hang beside the update ends the run as it does in the open.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gadcli.checkpoint.manifest import latest_valid, read_trainer
from gadcli.errors import DataError
from gadcli.model.critic import Critic
from gadcli.rollout.hf_sampler import HfSampler
from gadcli.train import loop, worker
from gadcli.train.build import build_run, close_run
from gadcli.train.loop import finish, finish_step
from gadcli.train.overlap import begin_drawing, end_drawing, take_ahead
from gadcli.train.run import Run
from gadcli.train.stages import update_actor
from gadcli.train.steplog import StepLog
from train.in_process import SETTINGS, begin, process_as_it_was, send_in, to_the_end
from train.training import (
    end_of_hung_worker,
    manifest_hashes,
    prepare,
    records,
    start,
    steps,
    train,
)

pytestmark = pytest.mark.usefixtures("left_as_it_was")

PLAIN = ["trainer.test_freq=0", "trainer.save_freq=0"]
SEVERAL = ["data.train_batch_size=4", "critic.ppo_mini_batch_size=2", "actor.ppo_mini_batch_size=2",
           "actor.ppo_epochs=2", "actor.use_kl_loss=true"]  # fmt: skip
REGIMES: dict[str, tuple[str, list[str]]] = {
    "one mini-batch": ("gad", []),
    "several mini-batches": ("gad", SEVERAL),
    "critic alone, then both": ("warmup", ["trainer.critic_warmup=2"]),
    "the student by the teacher's text": ("warmup", ["actor.objective=sft", "trainer.critic_warmup=1"]),
    "lora, reference": ("gad", ["actor.model.lora.rank=4", "actor.use_kl_loss=true"]),
}


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three uninterrupted steps with overlap, evaluated and saved after each."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with process_as_it_was():
        to_the_end(begin(run_dir, inputs, "trainer.overlap=true"))
    return run_dir


def without(metrics: dict[int, dict[str, float]], *names: str) -> dict[int, dict[str, float]]:
    return {step: {k: v for k, v in found.items() if k not in names} for step, found in metrics.items()}


def answers(run_dir: Path) -> list[Any]:
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return [(row["step"], row["kind"], row["prompt"], row["student"], row["student_score"]) for row in rows]


# ---- the same results ----


@pytest.mark.parametrize("regime", list(REGIMES))
def test_overlap_gives_the_weights_moments_and_metrics_of_a_run_without_it(
    regime: str, inputs: Path, tmp_path: Path
) -> None:
    stage, settings = REGIMES[regime]
    found = {}
    for overlap in ("false", "true"):
        run_dir = tmp_path / overlap
        with process_as_it_was():
            to_the_end(begin(run_dir, inputs, *PLAIN, *settings, f"trainer.overlap={overlap}", stage=stage))
        found[overlap] = steps(run_dir)
    assert without(found["true"], "rollout/staleness") == found["false"]
    assert manifest_hashes(tmp_path / "true", 3) == manifest_hashes(tmp_path / "false", 3)
    assert answers(tmp_path / "true") == answers(tmp_path / "false")
    assert [m["rollout/staleness"] for m in found["true"].values()] == [0, 0, 0]
    assert all("rollout/staleness" not in m for m in found["false"].values())
    assert found["true"][3]["critic/d_loss"] != found["true"][1]["critic/d_loss"]  # something was learnt


def test_the_order_of_updates_is_the_documented_one(inputs: Path, tmp_path: Path) -> None:
    """Against that order written by hand, one thing after the other: scores, student, weights, answers, critic."""
    to_the_end(begin(tmp_path / "threaded", inputs, *PLAIN, "trainer.overlap=true"))
    run = begin(tmp_path / "by-hand", inputs, *PLAIN)
    drawn = None
    for step, rows in loop.steps(run):
        log = StepLog(step, run.on_phase)
        if drawn is None:
            run.sync_sampler(step, log)
            drawn = run.draw(rows, step)
        rollout = drawn
        scores = run.critic.score_pairs(rollout)
        update_actor(run, rollout, scores.student_PG, log)
        if step < 3:
            run.sync_sampler(step + 1, StepLog(step + 1))
            drawn = run.draw(run.rows_of(step + 1), step + 1)
        log.add(run.critic.update(rollout))
        finish_step(run, log, rows, rollout, scores)
    finish(run)
    run.records.end(0, "done")
    close_run(run)
    names = ("rollout/staleness", "rollout/sync_probe")
    assert without(steps(tmp_path / "threaded"), *names) == without(steps(tmp_path / "by-hand"), *names)
    assert manifest_hashes(tmp_path / "threaded", 3) == manifest_hashes(tmp_path / "by-hand", 3)


def test_drawing_and_the_critics_update_run_at_once(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the other to have begun; one after the other would wait for ever."""
    drawing, learning = threading.Event(), threading.Event()
    generate, update = HfSampler.generate, Critic.update
    threads = []

    def generate_beside(self: HfSampler, *arguments: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        if not threads[-1]:
            drawing.set()
            assert learning.wait(60), "the critic's update has not begun beside the drawing"
        return generate(self, *arguments)

    def update_beside(self: Critic, rollout: Any) -> Any:
        learning.set()
        assert run.progress.step == 2 or drawing.wait(60), "drawing has not begun beside the critic's update"
        found = update(self, rollout)
        learning.clear()
        drawing.clear()
        return found

    monkeypatch.setattr(HfSampler, "generate", generate_beside)
    monkeypatch.setattr(Critic, "update", update_beside)
    run = begin(tmp_path / "run", inputs, *PLAIN, "trainer.overlap=true", "data.val_files=[]")
    to_the_end(run)
    assert threads == [True, False, False]  # steps 1, 2 and 3; nothing is drawn for a step 4
    hidden = [r["metrics"].get("rollout/hidden_s") for r in records(tmp_path / "run") if r["type"] == "step"]
    assert hidden[0] is not None and hidden[1] is not None and hidden[2] is None


# ---- staleness ----


def one_step(run: Run, *, early: bool) -> StepLog:
    """Step 1, with step 2's answers begun before the student's update (the mutant) or after it; then step 2's take."""
    log = StepLog(1)
    run.sync_sampler(1, log)
    rollout = run.draw(run.rows_of(1), 1)
    scores = run.critic.score_pairs(rollout)
    drawing = begin_drawing(run, 2, log) if early else None
    update_actor(run, rollout, scores.student_PG, log)
    drawing = drawing or begin_drawing(run, 2, log)
    assert drawing is not None
    run.critic.update(rollout)
    run.ahead = end_drawing(run, drawing, log)
    run.progress.step = 1
    return StepLog(2)


def test_answers_of_the_weights_that_learn_are_taken(inputs: Path, tmp_path: Path) -> None:
    run = begin(tmp_path / "run", inputs, *PLAIN, "trainer.overlap=true")
    log = one_step(run, early=False)
    rollout = take_ahead(run, 2, log)
    assert rollout is not None and rollout.rows[0].row_id == run.rows_of(2)[0].row_id
    assert log.values["rollout/staleness"] == 0 and log.values["rollout/sync_probe"] < 1e-3
    assert run.ahead is None and take_ahead(run, 2, log) is None  # used once


def test_answers_of_older_weights_are_told_and_drawn_anew(inputs: Path, tmp_path: Path) -> None:
    run = begin(tmp_path / "run", inputs, *PLAIN, "trainer.overlap=true", *SEVERAL)
    log = one_step(run, early=True)
    assert run.ahead is not None
    old = run.ahead.rollout
    assert take_ahead(run, 2, log) is None
    assert log.values["rollout/staleness"] == 4  # two epochs of two mini-batches
    (note,) = [r for r in records(tmp_path / "run") if r.get("kind") == "note" and "4 updates old" in r["message"]]
    assert note["step"] == 2 and "drawn anew" in note["message"]
    # What they would have done: the sampler's log-probs are not those of the actor that would learn from them.
    mine = run.actor.logprobs(old.student_groups(), old.width)
    gap = (mine - old.sampler_logp_BT()).abs()[old.mask_BT().bool()].max()
    assert gap > 0.01


def test_answers_of_another_step_are_not_taken(inputs: Path, tmp_path: Path) -> None:
    run = begin(tmp_path / "run", inputs, *PLAIN, "trainer.overlap=true")
    one_step(run, early=False)
    assert take_ahead(run, 3, StepLog(3)) is None


# ---- stopped, killed, resumed ----


@pytest.mark.parametrize(
    ("phase", "time_", "number"),
    [("critic", 1, signal.SIGTERM), ("critic", 2, signal.SIGINT), ("sync", 1, signal.SIGHUP),
     ("rollout", 1, signal.SIGTERM), ("save", 1, signal.SIGTERM)],
)  # fmt: skip
def test_a_signal_in_any_phase_saves_and_the_rest_is_bit_equal(
    phase: str, time_: int, number: signal.Signals, inputs: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run = begin(run_dir, inputs, "trainer.overlap=true", f"trainer.save_freq={int(phase == 'save')}")
    send_in(run, phase, number, time_)
    to_the_end(run)
    assert run.stop.number == number and list(steps(run_dir)) == [1, 2]
    saved = latest_valid(run_dir, pytest.fail)
    assert saved == run_dir / "global_step_2"
    resumed = build_run(run.cfg, run_dir, resume_from=saved)
    assert resumed.ahead is None  # what was drawn for step 3 is lost, and drawn again
    to_the_end(resumed)
    assert steps(run_dir) == steps(whole)
    assert manifest_hashes(run_dir, 3) == manifest_hashes(whole, 3)
    assert answers(run_dir) == answers(whole)


def test_a_checkpoint_says_what_the_sampler_had_before_the_next_answers(inputs: Path, tmp_path: Path) -> None:
    """Said otherwise, the resumed step would find the sampler in sync, and its record would lack the proof."""
    run_dir = tmp_path / "run"
    run = begin(run_dir, inputs, *PLAIN, "trainer.overlap=true")
    send_in(run, "critic", signal.SIGTERM)
    to_the_end(run)
    trainer = read_trainer(run_dir / "global_step_2")
    assert trainer["synced_updates"] == 1 and trainer["updates"]["actor"] == 2
    assert run.synced_step == 2


@pytest.mark.slow
def test_two_ranks_killed_between_saves_learn_what_one_rank_learns_without_overlap(
    inputs: Path, tmp_path: Path
) -> None:
    settings = [*SETTINGS, "trainer.total_steps=4", "trainer.save_freq=2", "trainer.test_freq=0",
                "actor.use_kl_loss=true"]  # fmt: skip
    with process_as_it_was():
        to_the_end(begin(tmp_path / "plain", inputs, *settings))
    run_dir = prepare(tmp_path / "overlap", inputs, "gad", *settings, "trainer.overlap=true")
    workers = start(run_dir, world=2)
    deadline = time.monotonic() + 150
    while not (run_dir / "global_step_2" / "MANIFEST.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for one in workers:
        one.send_signal(signal.SIGKILL)
    for one in workers:
        one.wait()
    train(run_dir, world=2, resume=True)
    one_rank, two_ranks = steps(tmp_path / "plain"), without(steps(run_dir), "rollout/staleness")
    assert list(one_rank) == list(two_ranks) == [1, 2, 3, 4]
    for step, expected in one_rank.items():
        assert two_ranks[step] == pytest.approx(expected, rel=1e-4, abs=1e-5), step


# ---- errors and hangs ----


def too_large() -> None:
    torch.empty(2**50)


def a_bad_row() -> None:
    raise DataError("row 7 cannot be read", "look at it")


def a_bug() -> None:
    raise ZeroDivisionError("in the sampler")


@pytest.mark.parametrize(("fails", "code"), [(too_large, 6), (a_bad_row, 3), (a_bug, 1)])
def test_an_error_beside_the_update_ends_the_run_as_in_the_open(
    fails: Any, code: int, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = HfSampler.generate, []

    def second_fails(self: HfSampler, *arguments: Any) -> Any:
        calls.append(threading.current_thread() is threading.main_thread())
        if len(calls) == 2:
            fails()
        return generate(self, *arguments)

    monkeypatch.setattr(HfSampler, "generate", second_fails)
    found = []
    for overlap in ("false", "true"):
        run_dir = prepare(
            tmp_path / overlap, inputs, "gad", *SETTINGS, *PLAIN, f"trainer.overlap={overlap}", "data.val_files=[]"
        )
        calls.clear()
        with process_as_it_was():
            assert worker.guarded(run_dir, False) == code
        assert calls == [True, overlap == "false"]
        found.append(json.loads((run_dir / "logs" / "rank_0.exit.json").read_text()))
        assert records(run_dir)[-1]["type"] == "end"
    assert found[0] == found[1]


def test_an_error_of_the_critic_is_the_runs_though_answers_are_being_drawn(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, failed = HfSampler.generate, threading.Event()

    def draws_until_it_failed(self: HfSampler, *arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            assert failed.wait(60)
        return generate(self, *arguments)

    monkeypatch.setattr(HfSampler, "generate", draws_until_it_failed)
    monkeypatch.setattr(Critic, "update", lambda self, rollout: a_bad_row())
    run_dir = prepare(tmp_path / "run", inputs, "gad", *SETTINGS, *PLAIN, "trainer.overlap=true", "data.val_files=[]")
    try:
        assert worker.guarded(run_dir, False) == 3
    finally:
        failed.set()
    record = json.loads((run_dir / "logs" / "rank_0.exit.json").read_text())
    assert record["message"] == "row 7 cannot be read"


@pytest.mark.slow
def test_a_sampler_that_hangs_beside_the_update_ends_with_7(inputs: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, *PLAIN, "trainer.overlap=true", "fsdp.timeout_s=3", "data.val_files=[]"]
    run_dir = prepare(tmp_path / "run", inputs, "gad", *settings)
    record, stderr = end_of_hung_worker(
        run_dir,
        "import threading\n"
        "from gadcli.rollout.hf_sampler import HfSampler\n"
        "generate = HfSampler.generate\n"
        "def hangs_in_a_thread(self, *arguments):\n"
        "    if threading.current_thread() is not threading.main_thread():\n"
        "        threading.Event().wait()\n"
        "    return generate(self, *arguments)\n"
        "HfSampler.generate = hangs_in_a_thread",
    )
    assert "in step 1, phase rollout" in record["message"]
    assert "hangs_in_a_thread" in stderr  # the stacks of all threads
