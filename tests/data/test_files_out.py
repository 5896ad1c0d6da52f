"""What `gad data` writes and shows: cleaned copies, splits without leakage, first rows, the mask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_rows import good_rows, user
from gadcli.cli.app import run

Write = Callable[..., str]


def test_fix_drop_keeps_good_rows_and_other_columns_and_what_it_dropped(tmp_path: Path) -> None:
    source, out = tmp_path / "a.parquet", tmp_path / "clean.parquet"
    table = pa.table(
        {
            "id": [10, 11, 12],
            "content": [user("q0"), user("q1"), user("q2")],
            "teacher_response": ["a0", None, "a2"],
        }
    )
    pq.write_table(table, source)
    before = source.read_bytes()
    assert run(["data", "check", str(source), "--fix", "drop", "-o", str(out), "-q"]) == 0
    clean = pq.read_table(out).to_pylist()
    assert [(r["id"], r["teacher_response"]) for r in clean] == [(10, "a0"), (12, "a2")]
    dropped = [json.loads(line) for line in (tmp_path / "clean.dropped.jsonl").read_text().splitlines()]
    assert [(d["row"], d["data"]["id"], d["reasons"][0].split(":")[0]) for d in dropped] == [(1, 11, "teacher_null")]
    assert source.read_bytes() == before
    assert run(["data", "check", str(out), "-q"]) == 0
    assert run(["data", "check", str(source), "--fix", "drop", "-o", str(out), "-q"]) == 2  # never overwrites


def test_fix_trim_cuts_answers_so_that_eos_fits_and_drops_the_rest(
    write: Write, tmp_path: Path, model_folder: Path
) -> None:
    long = "the quick brown fox 你好 " * 20
    path = write([*good_rows(3), (user("q"), long), (user("q"), "")])
    out = tmp_path / "clean.parquet"
    limits = ["-t", str(model_folder), "--max-response-length", "20"]
    assert run(["data", "check", path, *limits, "--fix", "trim", "-o", str(out), "-q"]) == 0
    answers = pq.read_table(out)["teacher_response"].to_pylist()
    assert len(answers) == 4
    assert long.startswith(answers[3])
    assert 10 < len(answers[3]) < len(long)
    assert run(["data", "check", str(out), *limits, "-q"]) == 0


def test_nothing_is_left_behind_when_writing_fails(write: Write, tmp_path: Path) -> None:
    path = write([(user("q"), None)])
    folder = tmp_path / "out"
    assert run(["data", "check", path, "--fix", "drop", "-o", str(folder / "x.parquet"), "-q"]) == 3  # no row is left
    assert list(folder.iterdir()) == []


def test_show_mask_shows_template_trained_tokens_and_eos(write: Write, model_folder: Path, capsys: Any) -> None:
    assert (
        run(["data", "check", write([(user("hi"), "你好 x")]), "-t", str(model_folder), "--show-mask", "1", "-q"]) == 0
    )
    out = capsys.readouterr().out
    assert "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[" in out
    trained = out.split("[[")[1].split("]]")[0].split("|")
    assert "".join(trained).replace("|", "") == "你好 x<im_end>"
    assert "\x1b" not in out  # not a terminal: no colour


def test_a_split_keeps_equal_prompts_together_and_loses_no_row(write: Write, tmp_path: Path) -> None:
    path = write([*good_rows(300), *[(user(f"question {i}"), "another") for i in range(100)]])
    assert run(["data", "split", path, "-o", str(tmp_path / "s"), "--val", "0.1", "--test", "0.1", "-q"]) == 0
    parts = {n: pq.read_table(tmp_path / "s" / f"{n}.parquet").to_pylist() for n in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == 400
    prompts = {n: {r["content"][0]["content"] for r in rows} for n, rows in parts.items()}
    assert not prompts["train"] & prompts["val"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["val"] & prompts["test"]
    # 300 prompts, a tenth each: 30 +- 4 standard deviations (5.2) of a binomial.
    assert 9 < len(prompts["val"]) < 51
    # The same rows as jsonl in another order: the same prompts are held out.
    again = write([(user(f"question {i}"), "x") for i in reversed(range(300))], "again.jsonl")
    assert run(["data", "split", again, "-o", str(tmp_path / "t"), "--val", "0.1", "--test", "0.1", "-q"]) == 0
    held = {r["content"][0]["content"] for r in pq.read_table(tmp_path / "t" / "val.parquet").to_pylist()}
    assert held == prompts["val"]


def test_a_split_by_number_holds_out_that_many_prompts(write: Write, tmp_path: Path) -> None:
    assert run(["data", "split", write(good_rows(50)), "-o", str(tmp_path / "s"), "--val", "7", "-q"]) == 0
    assert pq.read_table(tmp_path / "s" / "val.parquet").num_rows == 7
    assert pq.read_table(tmp_path / "s" / "train.parquet").num_rows == 43
    assert run(["data", "split", write(good_rows(5)), "-o", str(tmp_path / "u"), "--val", "7", "-q"]) == 3


def test_head_prints_rows_of_any_encoding_and_marks_bad_ones(write: Write, capsys: Any) -> None:
    path = write([(user("q0"), "a0"), (user("q1"), ""), (user("q2"), "a2")], "rows.jsonl")
    assert run(["data", "head", path, "-n", "2", "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(s["row"], s.get("teacher"), s["fault"] is not None) for s in shown] == [(0, "a0", False), (1, None, True)]
    assert run(["data", "head", path]) == 0
    assert "teacher: a2" in capsys.readouterr().out


def test_progress_and_messages_go_to_stderr_and_json_alone_to_stdout(write: Write, capsys: Any) -> None:
    assert run(["data", "check", write([*good_rows(3), (user("q"), None)]), "--json"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["counts"] == {"teacher_null": 1}
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 4


def test_wrong_options_are_usage_errors(write: Write, tmp_path: Path, capsys: Any) -> None:
    path = write(good_rows(2))
    for words in (
        ["--fix", "drop"],
        ["--fix", "mend", "-o", "x"],
        ["--max-response-length", "5"],
        ["--truncation", "up"],
    ):
        assert run(["data", "check", path, *words]) == 2
    assert run(["data", "check", str(tmp_path / "nowhere" / "*.parquet")]) == 3
    assert "no such file" in capsys.readouterr().err
