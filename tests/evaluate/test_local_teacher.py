"""Semantics pinned: a local model answers like an endpoint: same file, journal, statuses, resume; seeds by key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from gadcli.chat.tokenize import ChatTokenizer
from gadcli.evaluate.local_teacher import new_lines, reply_of, seed_of
from gadcli.model.rollout_batch import Answer
from tiny import write_tiny_model
from train.training import environment


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"content": [{"role": "user", "content": f"What does {i} do?"}]} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return path


def collect(model: str, prompts: Path, out: Path, *more: str, code: int = 0) -> dict[str, Any]:
    words = [sys.executable, "-m", "gadcli", "data", "collect", str(prompts), "--model", model, "-o", str(out),
             "--engine", "hf", "--max-tokens", "12", "--exclude", "none", "--json", *more]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment(), check=False)
    assert done.returncode == code, done.stderr[-2000:]
    return json.loads(done.stdout) if code == 0 else {"error": done.stderr}


@pytest.mark.slow
def test_a_local_models_answers_have_an_endpoints_columns_and_are_sampled_once(
    model_path: str, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.parquet"
    first = collect(model_path, prompts, out, "--n", "2")
    assert (first["total"], first["reused"], first["repeated"]) == (12, 0, 1)
    rows = pq.read_table(out).to_pylist()
    assert set(rows[0]) == {"content", "teacher_response", "status", "finish_reason", "model", "prompt_tokens",
                            "completion_tokens", "reasoning"}  # fmt: skip
    assert [row["content"][0]["content"] for row in rows[:3]] == ["What does 0 do?"] * 2 + ["What does 1 do?"]
    assert len({row["teacher_response"] for row in rows}) > 8  # two answers to one prompt differ
    assert all((row["status"] == "truncated") == (row["finish_reason"] == "length") for row in rows)
    assert all(0 < row["completion_tokens"] <= 12 for row in rows)
    again = collect(model_path, prompts, out, "--n", "2")
    assert (again["reused"], again["requests"]) == (12, 0)
    journal = out.with_name(out.name + ".journal.jsonl")
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:5]))  # as killed after five answers
    resumed = collect(model_path, prompts, out, "--n", "2")
    assert (resumed["reused"], resumed["requests"]) == (5, 7)
    assert pq.read_table(out).to_pylist() == rows


@pytest.mark.slow
def test_greedy_answers_are_the_models_own(model_path: str, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "greedy.parquet"
    collect(model_path, prompts, out, "--temperature", "0", "--limit", "1")
    (row,) = pq.read_table(out).to_pylist()
    chat = ChatTokenizer.from_folder(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    ids = chat.encode([chat.prompt_text([{"role": "user", "content": "What does 0 do?"}])])[0]
    prompt_tokens = len(ids)
    with torch.no_grad():
        while len(ids) - prompt_tokens < 12 and ids[-1] not in chat.end_ids[:1] * (len(ids) > prompt_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    answer = [token for token in ids[prompt_tokens:] if token not in chat.end_ids]
    assert row["teacher_response"] == chat.backend.decode(answer, skip_special_tokens=True)
    assert row["prompt_tokens"] == prompt_tokens and row["completion_tokens"] == len(ids) - prompt_tokens


@pytest.mark.slow
def test_a_prompt_over_the_models_length_is_rejected_and_the_others_answered(model_path: str, tmp_path: Path) -> None:
    path, out = tmp_path / "prompts.jsonl", tmp_path / "answers.parquet"
    texts = ["Hello?", "word " * 600]  # the tiny model was made for 512 tokens
    path.write_text("".join(json.dumps({"content": [{"role": "user", "content": t}]}) + "\n" for t in texts))
    found = collect(model_path, path, out)
    assert found["counts"].get("rejected") == 1 and len(pq.read_table(out)) == 1


def test_an_endpoints_options_are_refused_for_a_local_model(model_path: str, prompts: Path, tmp_path: Path) -> None:
    found = collect(model_path, prompts, tmp_path / "x.parquet", "--price-in", "1", code=2)
    assert "are an endpoint's" in found["error"]


def test_an_answers_seed_is_its_keys_alone() -> None:
    key = "0123456789abcdef"
    assert seed_of(key) == 0x0123456789AB and seed_of(f"{key}-2") == seed_of(key) + 1


def test_statuses_are_those_of_an_endpoint(tmp_path: Path) -> None:
    chat = ChatTokenizer.from_folder(write_tiny_model(tmp_path / "model", text="I'm sorry, I can't help with that."))
    end = chat.end_id

    def status(text: str, finished: bool = True) -> tuple[str, str]:
        ids = chat.encode([text])[0] if text else []
        reply = reply_of(Answer(ids + [end] * finished, [], finished), 3, chat, "m")
        assert reply.text == text
        return reply.status, reply.finish_reason

    assert status("It returns 3.") == ("ok", "stop") and status("It ret", finished=False) == ("truncated", "length")
    assert status("I'm sorry, I can't help with that.") == ("refused", "stop") and status("") == ("empty", "stop")


def test_only_whole_lines_are_taken(tmp_path: Path) -> None:
    path, seen = tmp_path / "answers", [0]
    assert new_lines(path, seen, 0) == []
    path.write_bytes(b"one\ntw")
    assert new_lines(path, seen, 0) == [b"one"]
    path.write_bytes(b"one\ntwo\n")
    assert new_lines(path, seen, 0) == [b"two"] and new_lines(path, seen, 0) == []
