"""Files that are odd rather than bad: names, kinds and types that stopped, hung or misled the data commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_rows import good_rows, user
from gadcli.cli.app import run
from gadcli.config.schema import DataConfig
from gadcli.data.batches import open_dataset
from gadcli.data.read.choose import expand

Write = Callable[..., str]


def check(tmp_path: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    findings = tmp_path / "findings.jsonl"
    code = run(["data", "check", *words, "--findings", str(findings), "-q"])
    return code, [json.loads(line) for line in findings.read_text().splitlines()]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "gadcli", "data", "check", str(tmp_path / "pipe.parquet")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 3
    assert "is a pipe or device" in done.stderr


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_name_that_is_not_utf8_is_said_and_breaks_no_report(suffix: str, tmp_path: Path, write: Write) -> None:
    name = os.fsdecode(b"\xff\xfe." + suffix.encode())
    os.rename(write(good_rows(2), f"a.{suffix}"), tmp_path / name)
    code, findings = check(tmp_path, str(tmp_path / name))
    assert (code, findings[0]["reason"]) == (3, "file_unreadable")
    assert f"\\xff\\xfe.{suffix}" in findings[0]["file"]


def test_names_from_a_file_cannot_steer_the_terminal(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content\x1b[2J": [user("q")], "teacher_response": ["a"]}), path)
    assert run(["data", "check", str(path)]) == 3
    out, err = capsys.readouterr()
    assert "content?[2J" in out
    assert "\x1b" not in out + err


def test_what_is_no_data_but_nearly_is_told_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"PK\x03\x04" + bytes(60))
    (tmp_path / "b.jsonl").write_text(json.dumps({"content": user("q"), "teacher_response": "a"}, indent=1))
    assert "unpack it, or save it as CSV, first" in check(tmp_path, str(tmp_path / "a.jsonl"))[1][0]["message"]
    assert "jq -c . FILE > FILE.jsonl" in check(tmp_path, str(tmp_path / "b.jsonl"))[1][0]["message"]


def test_a_glob_finds_the_files_in_folders_named_like_files_once(tmp_path: Path) -> None:
    (tmp_path / "spark.parquet").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("spark.parquet/part-0.parquet", "spark.parquet/_SUCCESS", "other/x.parquet", "z.parquet"):
        (tmp_path / name).write_text("x")
    spark, other, z = (str(tmp_path / n) for n in ("spark.parquet/part-0.parquet", "other/x.parquet", "z.parquet"))
    assert expand([str(tmp_path / "*.parquet")]) == [spark, z]
    assert expand([str(tmp_path / "**" / "*.parquet")]) == [other, spark, z]


def test_a_file_named_twice_counts_its_rows_from_its_own_start(write: Write, tmp_path: Path) -> None:
    first, twice = write(good_rows(3, 50), "first.parquet"), write(good_rows(2), "twice.parquet")
    code, findings = check(tmp_path, first, twice, twice)
    assert code == 0
    assert [(f["file"], f["row"], f["message"]) for f in findings] == [
        (twice, 0, f"repeats row 0 of {twice}"), (twice, 1, f"repeats row 1 of {twice}"),
    ]  # fmt: skip


def test_columns_marked_as_json_are_read_as_their_text(tmp_path: Path, tokenizer: Any) -> None:
    """As DuckDB writes `content::JSON`: the parquet type JSON, which Arrow reads as an extension type."""
    path = tmp_path / "a.parquet"
    texts = pa.array([json.dumps(user("q")), "[{broken", None], pa.string())
    marked = pa.ExtensionArray.from_storage(pa.json_(pa.string()), texts)
    pq.write_table(pa.table({"content": marked, "teacher_response": ["a", "b", "c"]}), path)
    assert isinstance(pq.read_schema(path).field("content").type, pa.JsonType)
    code, findings = check(tmp_path, str(path))
    assert (code, [(f["row"], f["reason"]) for f in findings]) == (3, [(1, "content_json"), (2, "content_null")])
    cfg = DataConfig(train_files=[str(path)], train_batch_size=1, on_bad_row="drop")
    data = open_dataset([], tokenizer, cfg, 2048, "train", tmp_path / "cache")
    assert [row.messages for row in data] == [user("q")]


def test_cleaning_jsonl_keeps_what_it_dropped_and_names_the_columns_it_leaves(tmp_path: Path, capsys: Any) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "clean.parquet"
    rows = [{"content": user("q"), "teacher_response": "a", "id": 1}, {"content": user("\ud800é"), "id": 2}]
    source.write_text("\n".join([json.dumps(rows[0]), json.dumps(rows[1]), "{torn"]))
    assert run(["data", "check", str(source), "--fix", "drop", "-o", str(out), "-q"]) == 0
    assert pq.read_table(out)["teacher_response"].to_pylist() == ["a"]
    dropped = [json.loads(line) for line in (tmp_path / "clean.dropped.jsonl").read_text().splitlines()]
    assert [d["data"] for d in dropped] == [rows[1], "{torn"]
    assert "columns not carried over: id" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_checking_and_counting_do_not_import_pandas(name: str, write: Callable[..., str], model_folder: Path) -> None:
    code = (
        "import sys; from gadcli.cli.app import run; codes = [run(['data', *words, '-q']) for words in "
        "(['check', sys.argv[1]], ['check', sys.argv[1], '-t', sys.argv[2]])]; print(codes, 'pandas' in sys.modules)"
    )
    env: dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, write([*good_rows(20), (None, None)], name), str(model_folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[3, 3] False", done.stderr


@pytest.mark.parametrize("words", [
    ["data", "check", "é.jsonl"], ["data", "head", "é.jsonl", "--json"], ["data", "split", "é.jsonl", "-o", "out"],
    ["train", "seqkd", "--preset", "demo", "--dry-run", "data.train_files=[é.jsonl]"],
])  # fmt: skip
def test_an_ascii_only_locale_reads_names_and_prints_text(words: list[str], tmp_path: Path) -> None:
    rows = [{"content": user(f"é漢 {i}"), "teacher_response": "ü"} for i in range(40)]
    (tmp_path / "é.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LANG", "LC_", "PYTHONIO"))}
    env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "gadcli", *words], env=env, cwd=tmp_path, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--json" not in words or "é漢 0" in done.stdout.decode()


def test_the_presets_student_counts_where_no_tokenizer_is_named(
    write: Write, tmp_path: Path, model_folder: Path, capsys: Any
) -> None:
    path, preset = write(good_rows(20)), tmp_path / "own.yaml"
    preset.write_text(f"common:\n  actor:\n    model:\n      path: {model_folder}\n")
    for command in ("check", "analyze-tokens"):
        assert run(["data", command, path, "--preset", str(preset), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.partition("\n}\n")[2])
    assert run(["data", "analyze-tokens", path, "-t", str(model_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fields"] == told["fields"]
    assert run(["data", "analyze-tokens", path]) == 2
    preset.write_text("common:\n  data:\n    shuffle: true\n")
    assert run(["data", "check", path, "--preset", str(preset)]) == 2
    assert "a preset that names its student" in capsys.readouterr().err
