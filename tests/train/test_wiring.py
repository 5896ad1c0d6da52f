"""The first steps of a run held against what they must be, not against another run: errors that agree with themselves.

A run that trains on the wrong rows, samples from the wrong seeds or hands the wrong scores on repeats itself exactly,
so comparing runs does not find it. Here four steps of a warmup stage (the critic alone for two, then both) are recorded
in this process and each claim is derived: from the data's row numbers, from transformers' own forward pass, from the
schedule's formula. MUTANTS lists the errors that each claim was written against; every one of them must fail it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gadcli.checkpoint.manifest import read_manifest
from gadcli.data.batches import TokenizedRow
from gadcli.data.order import BatchOrder
from gadcli.launch import environment
from gadcli.launch.outcome import RankEnd, StopRequest, judge
from gadcli.model.critic import Critic
from gadcli.model.packing import Group
from gadcli.model.rollout_batch import Answer, Rollout
from gadcli.train.build import build_run, close_run
from gadcli.train.probe_set import share_of_rows
from gadcli.train.run import Run
from gadcli.train.stages import train_adversarial
from gadcli.train.steplog import StepLog, length_metrics
from mutants import planted
from tiny import write_tiny_data
from train.in_process import begin, process_as_it_was, to_the_end
from train.training import records

TEMPERATURE, LR, TOLERANCE = 0.5, 1e-3, 1e-4  # tolerance: between two correct float32 log-probs
STEPS, WARMUP, BATCH, ROWS = 4, 2, 2, 24
SETTINGS = [
    f"trainer.total_steps={STEPS}", f"trainer.critic_warmup={WARMUP}", f"data.train_batch_size={BATCH}",
    "data.shuffle=false", "data.truncation=left", "data.max_response_length=6", f"rollout.temperature={TEMPERATURE}",
    "rollout.n=3", "actor.use_kl_loss=true", "actor.kl_loss_coef=0.1", "actor.ppo_epochs=2",
    "critic.ppo_mini_batch_size=1", "trainer.test_freq=2", "trainer.save_freq=2", "trainer.keep_last=3",
    *(f"{role}.optim.{word}" for role in ("actor", "critic")
      for word in (f"lr={LR}", "lr_scheduler=linear", "lr_warmup_steps=0", "min_lr_ratio=0")),
]  # fmt: skip


@dataclass
class Seen:
    """What a run did, step by step."""

    run: Run
    start: Any  # transformers' own copy of the start model
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    drift: dict[int, float] = field(default_factory=dict)  # sampler's against student's log-probs, as it sampled
    before: dict[int, torch.Tensor] = field(default_factory=dict)  # scores [P, G] before the critic's update
    updates: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # what the student's update was given
    moved: dict[int, bool] = field(default_factory=dict)  # whether the student's weights changed

    def metric(self, name: str) -> dict[int, float]:
        """A logged metric by step."""
        steps = [r for r in records(self.run.run_dir) if r["type"] == "step"]
        return {r["step"]: r["metrics"][name] for r in steps if name in r["metrics"]}

    def start_logprobs(self, rollout: Rollout) -> torch.Tensor:
        """[B, T] of the start model at the sampling temperature, by transformers, one answer at a time."""
        out = torch.zeros(len(rollout.lengths), rollout.width)
        pairs = [(row.prompt_ids, a.ids) for row, g in zip(rollout.rows, rollout.answers, strict=True) for a in g]
        for b, (prompt, answer) in enumerate(pairs):
            with torch.no_grad():
                logits = self.start(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logp = (logits / TEMPERATURE).log_softmax(-1)
            out[b, : len(answer)] = logp.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        return out


@pytest.fixture(scope="module")
def start_model(inputs: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(inputs / "model")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose prompts are not among the training rows: 24 to 29 of the same kind."""
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("held-out")
    rows = pq.read_table(write_tiny_data(folder / "all.parquet", ROWS + 6))
    pq.write_table(rows.slice(ROWS), folder / "val.parquet")
    return folder / "val.parquet"


@contextmanager
def recorded_run(run_dir: Path, inputs: Path, held_out: Path, start: Any, *more: str) -> Iterator[Seen]:
    """The whole run, with recorders around what hands something from one part to another."""
    with process_as_it_was():
        run = begin(run_dir, inputs, *SETTINGS, f"data.val_files=[{held_out}]", *more, stage="warmup")
        seen = Seen(run, start)
        sample, learn, update = run.roll_out, run.critic.score_and_update, run.actor.update

        def roll_out(rows: Any, step: int, log: StepLog) -> Rollout:
            rollout = seen.rollouts[step] = sample(rows, step, log)
            ours = run.actor.logprobs(rollout.student_groups(), rollout.width)
            seen.drift[step] = float(((ours - rollout.sampler_logp_BT()) * rollout.mask_BT()).abs().max())
            seen.moved[step] = False
            return rollout

        def score_and_update(rollout: Rollout) -> Any:
            step = run.progress.step + 1
            seen.before[step] = torch.stack(run.critic.score(rollout.pair_groups()))[:, :-1]
            return learn(rollout)

        def actor_update(*given: Any) -> Any:
            step = run.progress.step + 1
            seen.updates[step], seen.moved[step] = given, True
            return update(*given)

        run.roll_out, run.critic.score_and_update, run.actor.update = roll_out, score_and_update, actor_update  # type: ignore[method-assign]
        to_the_end(run)
        yield seen


# ---- claims about the recorded run ----


def rows_come_by_number(seen: Seen) -> None:
    """Unshuffled, two rows a step: step 1 has rows 0 and 1; a file of 24 begins again at step 13."""
    trained = {step: [row.row_id for row in rollout.rows] for step, rollout in seen.rollouts.items()}
    assert trained == {1: [0, 1], 2: [2, 3], 3: [4, 5], 4: [6, 7]}
    assert [row.row_id for row in seen.run.rows_of(13)] == [0, 1]
    assert [row["epoch"] for row in records(seen.run.run_dir) if row["type"] == "step"] == [
        1 / 12,
        2 / 12,
        3 / 12,
        4 / 12,
    ]


def the_sampler_runs_todays_student(seen: Seen) -> None:
    """In every step the sampled tokens' log-probs are the student's own, at the sampling temperature."""
    assert all(gap < TOLERANCE for gap in seen.drift.values()), seen.drift


def log_probs_are_those_that_sampled(seen: Seen) -> None:
    """While the student stands still, the trainer's log-probs are transformers' of the start model at logits / T."""
    first = seen.rollouts[1]
    given = first.sampler_logp_BT()
    assert torch.allclose(given, seen.start_logprobs(first) * first.mask_BT(), atol=TOLERANCE)


def the_student_waits_for_the_critic(seen: Seen) -> None:
    """Steps 1 to critic_warmup teach the critic alone."""
    assert seen.moved == {1: False, 2: False, 3: True, 4: True}
    assert list(seen.metric("actor/pg_loss")) == [3, 4] and list(seen.metric("critic/d_loss")) == [1, 2, 3, 4]


def advantages_come_from_the_scores_before(seen: Seen) -> None:
    """Within each prompt's group, of the scores that the critic gave before this step's update."""
    for step in (3, 4):
        scores_PG = seen.before[step]
        expected = (scores_PG - scores_PG.mean(-1, keepdim=True)) / (scores_PG.std(-1, keepdim=True) + 1e-6)
        assert torch.allclose(seen.updates[step][1], expected, atol=1e-3), step


def the_reference_is_the_start(seen: Seen) -> None:
    """In step 4 too, after the student has moved."""
    rollout = seen.rollouts[4]
    assert torch.allclose(seen.updates[4][3], seen.start_logprobs(rollout) * rollout.mask_BT(), atol=TOLERANCE)


def rates_follow_their_schedules(seen: Seen) -> None:
    """Linear to 0 over each optimiser's own updates, logged as the mean over a step's.

    The student has 2 steps of 2 epochs: rates 1, .75, .5, .25 of lr. The critic has 4 steps of 2 mini-batches.
    """
    assert seen.metric("actor/lr") == pytest.approx({3: 0.875 * LR, 4: 0.375 * LR})
    expected = {step: LR * (1 - (2 * (step - 1) + 0.5) / 8) for step in range(1, 5)}
    assert seen.metric("critic/lr") == pytest.approx(expected)


def lengths_are_counted_and_cut_ones_told(seen: Seen) -> None:
    """Of the answers themselves: one is cut when its last token does not end it."""
    for step, rollout in seen.rollouts.items():
        answers = [answer.ids for group in rollout.answers for answer in group]
        cut = [ids[-1] not in seen.run.eos_ids for ids in answers]
        assert seen.metric("response_length/clip_ratio")[step] == pytest.approx(sum(cut) / len(cut))
        assert seen.metric("response_length/min")[step] == min(map(len, answers))
        assert seen.metric("response_length/max")[step] == max(map(len, answers))
        teacher = [len(row.teacher_ids) for row in rollout.rows]
        assert seen.metric("teacher_length/mean")[step] == pytest.approx(sum(teacher) / len(teacher))


def evaluations_see_held_out_rows(seen: Seen) -> None:
    """Those of the validation file, all of them, whatever was trained on."""
    lines = [json.loads(line) for line in (seen.run.run_dir / "samples.jsonl").read_text().splitlines()]
    prompts = {line["prompt"] for line in lines if line["kind"] == "val"}
    assert prompts == {f"What does {i} do{'?' * (1 + i % 5)}" for i in range(ROWS, ROWS + 6)}


def checkpoints_hold_their_own_evaluation(seen: Seen) -> None:
    """Saved after steps 2 and 4, each with that step's held-out metrics, by which the best one is kept."""
    evals = {r["step"]: r["metrics"] for r in records(seen.run.run_dir) if r["type"] == "eval"}
    saved = {int(p.name.rpartition("_")[2]): read_manifest(p).metrics for p in seen.run.run_dir.glob("global_step_*")}
    assert sorted(saved) == sorted(evals) == [2, 4]
    assert all(saved[step].get("val/rouge_l") == evals[step]["val/rouge_l"] for step in saved)


def a_resumed_run_stands_where_it_was(seen: Seen) -> None:
    """From the checkpoint of step 2: two steps done, four updates of the critic, none of the student, rows 4 and 5."""
    run = build_run(seen.run.cfg, seen.run.run_dir, resume_from=seen.run.run_dir / "global_step_2")
    assert (run.progress.step, run.critic.optimizer.updates, run.actor.optimizer.updates) == (2, 4, 0)
    assert run.progress.train_seconds > 0
    assert [row.row_id for row in run.rows_of(run.progress.step + 1)] == [4, 5]
    run.records.end(0, "done")
    close_run(run)


def seeds_tell_run_step_and_row_apart(seen: Seen) -> None:
    """Another answer in a second epoch, to an equal prompt in another row, in a run of another seed; else the same."""
    run = build_run(replace(seen.run.cfg, stage="gad"), seen.run.run_dir.with_name("seeds"), resume_from=None)
    assert run.sampler is not None
    run.sampler.load(run.actor.model)
    row = run.rows_of(1)[0]

    def answers(step: int = 1, row_id: int = row.row_id, others: int = 0) -> list[list[int]]:
        rows = [*run.rows_of(5)[:others], replace(row, row_id=row_id)]
        return [answer.ids for answer in run.roll_out(rows, step, StepLog(step)).answers[-1]]

    first = answers()
    assert answers() == first and answers(others=1) == first
    assert len({tuple(ids) for ids in first}) > 1  # the answers to one prompt differ
    assert answers(step=13) != first and answers(row_id=23) != first
    run.cfg.trainer.seed += 1
    assert answers() != first
    run.records.end(0, "done")
    close_run(run)


# ---- claims about parts ----


def answers_are_measured_in_tokens() -> None:
    """Two of two tokens and one that end, one of three that is cut; teachers of two and five tokens."""
    rows = [TokenizedRow(i, [7] * 9, [7] * n, [], "") for i, n in enumerate((2, 5))]
    ended, cut = (lambda n: Answer([7] * n, [0.0] * n, finished=True)), Answer([7] * 3, [0.0] * 3, finished=False)
    found = length_metrics(rows, Rollout(rows, [[ended(2), cut], [ended(1), ended(2)]]), 3)
    assert {name: mean.value for name, mean in found.items()} == {
        "response_length/mean": 2.0, "response_length/max": 3.0, "response_length/min": 1.0,
        "response_length/clip_ratio": 0.25, "teacher_length/mean": 3.5,
    }  # fmt: skip


def epochs_are_shuffled_anew() -> None:
    """Each visits every row once, in an order of its own that is not the file's."""
    order = BatchOrder(ROWS, BATCH, seed=1, shuffle=True)
    first, second = ([i for step in range(at, at + 12) for i in order.rows(step)] for at in (0, 12))
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first != second and list(range(ROWS)) not in (first, second)


def ranks_share_held_out_rows() -> None:
    ranks = [SimpleNamespace(world=SimpleNamespace(rank=rank, size=3)) for rank in range(3)]
    assert [share_of_rows(run, 7) for run in ranks] == [[0, 3, 6], [1, 4], [2, 5]]  # type: ignore[arg-type]


def a_rank_is_told_its_own_place() -> None:
    """Rank 5 of 8, the second on its machine of 4."""
    env = environment.rank_env({"HOME": "/h"}, 5, 8, 1, 4)
    assert env == {"HOME": "/h", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def the_first_failure_is_the_one_told() -> None:
    record = {"code": 3, "message": "its own", "hint": ""}
    ends = [RankEnd(0, 6, 2.0, record={**record, "code": 6}), RankEnd(1, 3, 1.0, record=record)]
    assert judge(ends, Path("/nowhere"), StopRequest()).code == 3


RUN_CLAIMS: list[Callable[[Seen], None]] = [
    rows_come_by_number, the_sampler_runs_todays_student, log_probs_are_those_that_sampled,
    the_student_waits_for_the_critic, advantages_come_from_the_scores_before, the_reference_is_the_start,
    rates_follow_their_schedules, lengths_are_counted_and_cut_ones_told, evaluations_see_held_out_rows,
    checkpoints_hold_their_own_evaluation, a_resumed_run_stands_where_it_was, seeds_tell_run_step_and_row_apart,
]  # fmt: skip
PART_CLAIMS: list[Callable[[], None]] = [
    answers_are_measured_in_tokens, epochs_are_shuffled_anew, ranks_share_held_out_rows,
    a_rank_is_told_its_own_place, the_first_failure_is_the_one_told,
]  # fmt: skip

SEED = "request_seed(self.cfg.trainer.seed, step, row.row_id)"
LEARN = "scores, critic_log = run.critic.score_and_update(rollout)"
AFTER = "scores = Scores.of(torch.stack(run.critic.score(rollout.pair_groups())))"
# By the claim that each breaks: (what is wrong, module, line, its mutant).
MUTANTS: dict[Callable[..., None], list[tuple[str, str, str, str]]] = {
    rows_come_by_number: [
        ("step t trains on the rows of step t+1", "train.run", "order.rows(step - 1)", "order.rows(step)"),
        ("the record's epoch is a step ahead", "train.loop", "epoch=log.step /", "epoch=(log.step + 1) /"),
    ],
    seeds_tell_run_step_and_row_apart: [
        ("seeds ignore the step", "train.run", SEED, SEED.replace("step", "0")),
        ("prompts share a seed", "train.run", SEED, SEED.replace("row.row_id", "0")),
        ("every run has the same seeds", "train.run", SEED, SEED.replace("self.cfg.trainer.seed", "0")),
        ("seeds by place in the batch", "train.run", f"{SEED} for row in rows",
         f"{SEED.replace('row.row_id', 'i')} for i, row in enumerate(rows)"),
    ],
    lengths_are_counted_and_cut_ones_told: [
        ("clip_ratio inverted", "train.steplog", "not answer.finished", "answer.finished"),
    ],
    answers_are_measured_in_tokens: [
        ("the longest is the shortest", "train.steplog", 'extreme_of(lengths, "max")', 'extreme_of(lengths, "min")'),
        ("teachers measured by their prompts", "train.steplog", "len(row.read_ids)", "len(row.prompt_ids)"),
    ],
    rates_follow_their_schedules: [
        ("the student's ignores critic_warmup", "train.build", "- max(0, cfg.trainer.critic_warmup)", "- 0"),
        ("the student's ignores ppo_epochs", "train.build", "steps * cfg.actor.ppo_epochs *", "steps *"),
        ("the critic's ignores mini-batches", "train.build", "(cfg.data.train_batch_size // size)\n    return C",
         "1\n    return C"),
    ],
    the_sampler_runs_todays_student: [
        ("log-probs at temperature 1", "train.build", "        cfg.rollout.temperature,\n", "        1.0,\n"),
        ("the sampler keeps the start's weights", "train.run", "self.synced_step != self.actor.optimizer.updates",
         "self.synced_step < 0"),
    ],
    log_probs_are_those_that_sampled: [
        ("sampling at temperature 1", "rollout.sampler", "cfg.temperature if temperature is None",
         "1.0 if temperature is None"),
    ],
    the_student_waits_for_the_critic: [
        ("the student learns a step early", "train.run", "step > self.cfg.trainer.critic_warmup",
         "step >= self.cfg.trainer.critic_warmup"),
    ],
    advantages_come_from_the_scores_before: [
        ("scores from after the critic's update", "train.stages", LEARN,
         f"critic_log = run.critic.score_and_update(rollout)[1]; {AFTER}"),
        ("advantages of another prompt's group", "train.stages", "        rewards_PG,\n",
         "        rewards_PG.roll(1, 0),\n"),
    ],
    the_reference_is_the_start: [
        ("the reference is the student of today", "train.stages", "rollout.width, reference=run.reference)",
         "rollout.width)"),
    ],
    evaluations_see_held_out_rows: [
        ("evaluation on training rows", "train.evaluation", "read(run.val_data[i])", "read(run.train_data[i])"),
        ("val_files are not opened", "train.build", "open_dataset(cfg.data.val_files,",
         "open_dataset(cfg.data.train_files,"),
    ],
    checkpoints_hold_their_own_evaluation: [
        ("checkpoints do not know their evaluation", "train.saving", "dict(run.progress.last_eval)", "{}"),
        ("saved a step early", "train.loop", "step % trainer.save_freq", "(step + 1) % trainer.save_freq"),
    ],
    a_resumed_run_stands_where_it_was: [
        ("a resumed schedule begins anew", "train.saving", 'int(trainer["updates"][name])', "0"),
        ("a resumed run repeats its last step", "train.saving", "key, trainer[key])",
         'key, trainer[key] if key != "step" else 1)'),
    ],
    epochs_are_shuffled_anew: [
        ("every epoch in the first one's order", "data.order", "self.seed, epoch)", "self.seed, 0)"),
    ],
    ranks_share_held_out_rows: [
        ("every rank evaluates all rows", "train.probe_set", "range(run.world.rank, total, run.world.size)",
         "range(0, total)"),
    ],
    a_rank_is_told_its_own_place: [
        ("a rank's place on its machine is its rank", "launch.environment", "str(local_rank)", "str(rank)"),
    ],
    the_first_failure_is_the_one_told: [("the last failure is told", "launch.outcome", "return min(", "return max(")],
}  # fmt: skip
CASES = [(claim, *mutant[1:]) for claim, mutants in MUTANTS.items() for mutant in mutants]
NAMES = [name for mutants in MUTANTS.values() for name, *_ in mutants]


@pytest.fixture(scope="module")
def whole(inputs: Path, held_out: Path, start_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    with recorded_run(tmp_path_factory.mktemp("whole") / "run", inputs, held_out, start_model) as seen:
        yield seen


@pytest.mark.parametrize("claim", RUN_CLAIMS, ids=lambda claim: claim.__name__)
def test_in_the_first_steps(claim: Callable[[Seen], None], whole: Seen) -> None:
    claim(whole)


@pytest.mark.parametrize("claim", PART_CLAIMS, ids=lambda claim: claim.__name__)
def test_of_its_parts(claim: Callable[[], None]) -> None:
    claim()


@pytest.mark.parametrize(("claim", "module", "old", "new"), CASES, ids=NAMES)
def test_a_mutant_breaks_its_claim(
    claim: Callable[..., None], module: str, old: str, new: str,
    inputs: Path, held_out: Path, start_model: Any, tmp_path: Path,
) -> None:  # fmt: skip
    with planted(module, old, new):
        if claim in PART_CLAIMS:
            with pytest.raises(AssertionError):
                claim()
        else:
            with recorded_run(tmp_path / "run", inputs, held_out, start_model) as seen, pytest.raises(AssertionError):
                claim(seen)


# ---- other settings ----


def test_where_one_token_is_the_limit_every_answer_is_cut(inputs: Path, tmp_path: Path, left_as_it_was: None) -> None:
    """Of 320 tokens the random student does not draw the end first."""
    run = begin(tmp_path / "run", inputs, "data.truncation=left", "data.max_response_length=1", "data.val_files=[]")
    train_adversarial(run)
    logged = [r["metrics"]["response_length/clip_ratio"] for r in records(run.run_dir) if r["type"] == "step"]
    assert logged == [1.0, 1.0, 1.0]
    run.records.end(0, "done")
    close_run(run)


def test_the_supervised_objective_learns_the_teachers_text(inputs: Path, tmp_path: Path, left_as_it_was: None) -> None:
    run = begin(tmp_path / "run", inputs, "actor.objective=sft", "data.val_files=[]", stage="warmup")
    learnt: list[list[Group]] = []
    update = run.actor.sft_update
    run.actor.sft_update = lambda groups: (learnt.append(list(groups)), update(groups))[1]  # type: ignore[method-assign]
    train_adversarial(run)
    assert learnt and isinstance(run.critic, Critic)
    for step, groups in enumerate(learnt, start=1):
        assert [group.answers for group in groups] == [[row.teacher_ids] for row in run.rows_of(step)]
        assert all(group.answers[0][-1] in run.eos_ids for group in groups)
    run.records.end(0, "done")
    close_run(run)
