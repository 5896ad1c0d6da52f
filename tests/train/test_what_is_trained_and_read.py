"""Several teacher answers, answers that think, and chats trained on every turn, in the real loop on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gadcli.model.rollout_batch import Answer, teacher_groups
from gadcli.train.build import close_run
from gadcli.train.run import Run
from gadcli.train.steplog import length_metrics
from train.in_process import begin, process_as_it_was

ROOM = ("data.max_response_length=40", "rollout.max_model_len=160")
THOUGHT = "<think>\nwhy\n</think>\n\n"


def write(path: Path, rows: list[tuple[list[dict[str, str]], Any]]) -> str:
    path.write_text("".join(json.dumps({"content": c, "teacher_response": t}) + "\n" for c, t in rows))
    return str(path)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture
def built(inputs: Path, tmp_path: Path) -> Iterator[Any]:
    """built(rows, *overrides, stage=…) -> a Run that trains on these rows."""
    runs: list[Run] = []

    def builder(rows: list[tuple[list[dict[str, str]], Any]], *overrides: str, stage: str = "gad") -> Run:
        file = write(tmp_path / "rows.jsonl", rows)
        run = begin(tmp_path / "run", inputs, f"data.train_files=[{file}]", *ROOM, *overrides, stage=stage)
        runs.append(run)
        return run

    with process_as_it_was():
        yield builder
        close_run(runs[0])


def test_the_critic_meets_one_of_the_answers_per_step_by_seed_and_step(built: Any) -> None:
    answers = {f"q {i}": [f"a {i} {k}" for k in range(3)] for i in range(6)}
    run = built([([user(q)], found) for q, found in answers.items()], "trainer.total_epochs=20")
    met: dict[str, list[str]] = {q: [] for q in answers}
    for step in range(1, 31):
        rows = run.rows_of(step)
        assert [row.teacher for row in rows] == [row.teacher for row in run.rows_of(step)]  # as after a resume
        for row in rows:
            met[row.messages[0]["content"]].append(row.teacher)
    assert run.order.steps_per_epoch == 3  # 6 prompts, 2 per step
    for question, found in met.items():
        assert len(found) == 10 and set(found) == set(answers[question])  # each of three is missed with chance 0.02
    run.cfg.trainer.seed += 1
    assert any(row.teacher not in met[row.messages[0]["content"]][:1] for s in (1, 2, 3) for row in run.rows_of(s))


def test_seqkd_trains_on_all_answers_in_turn(built: Any) -> None:
    run = built([([user(f"q {i}")], [f"a {i} {k}" for k in range(2)]) for i in range(4)], stage="seqkd")
    assert run.order.steps_per_epoch == 4  # 8 answers, 2 per step
    epoch = [row.teacher for step in range(1, 5) for row in run.rows_of(step)]
    assert sorted(epoch) == [f"a {i} {k}" for i in range(4) for k in range(2)]


def test_thinking_is_left_out_of_what_the_critic_reads_and_of_lengths_and_the_student_keeps_it(built: Any) -> None:
    run = built([([user(f"q {i}")], f"{THOUGHT}a {i}") for i in range(4)], "critic.reads=answer")
    rows = run.rows_of(1)
    assert [run.tokenizer.decode(row.read_ids) for row in rows] == [f"{r.teacher.partition(THOUGHT)[2]}<|im_end|>"
                                                                    for r in rows]  # fmt: skip
    assert all(run.tokenizer.decode(row.teacher_ids).startswith(THOUGHT) for row in rows)
    thinking = run.tokenizer(f"{THOUGHT}two", add_special_tokens=False).input_ids
    sampled = [[Answer(list(thinking), [0.0] * len(thinking), True)] for _ in rows]
    (answer,) = run.read_groups(rows, sampled)[0]
    assert run.tokenizer.decode(answer.read_ids) == "two" and answer.ids == thinking
    found = length_metrics(rows, None, 16)["teacher_length/mean"]
    assert found.value == sum(len(row.read_ids) for row in rows) / len(rows) < len(rows[0].teacher_ids)


def test_all_is_read_unless_asked_otherwise(built: Any) -> None:
    run = built([([user(f"q {i}")], f"{THOUGHT}a {i}") for i in range(4)])
    assert all(row.read_ids is row.teacher_ids for row in run.rows_of(1))


def test_each_turn_of_a_chat_is_learnt_from_and_nothing_else(built: Any) -> None:
    chat = [user("one?"), {"role": "assistant", "content": "1"}, user("two?")]
    run = built([(chat, f"{i}") for i in range(4)], "data.turns=each", stage="seqkd")
    rows = run.rows_of(1)
    assert [run.tokenizer.decode(rows[0].teacher_ids[a:b]) for a, b in rows[0].untrained] == [
        "\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n"
    ]
    total, count = 0.0, 0
    for row in rows:  # by hand: -log p of every token of "1<|im_end|>" and of the last answer with its end
        ids = torch.tensor([row.prompt_ids + row.teacher_ids])
        with torch.no_grad():
            logp = torch.log_softmax(run.actor.model(input_ids=ids, use_cache=False).logits[0, :-1].float(), -1)
        first = len(row.prompt_ids)
        trained = [i for i in range(len(row.teacher_ids)) if not any(a <= i < b for a, b in row.untrained)]
        total -= sum(float(logp[first + i - 1, row.teacher_ids[i]]) for i in trained)
        count += len(trained)
    assert count == sum(row.n_trained for row in rows)
    metrics = run.actor.sft_update(teacher_groups(rows))
    assert metrics["actor/sft_loss"].value == pytest.approx(total / count, rel=1e-5)
