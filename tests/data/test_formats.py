"""Files and rows as others write them: all of them come out as the same rows, and what was guessed is said."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from data_rows import user
from gadcli.data.check import account, open_files, scan_rows
from gadcli.data.read.findings import Summary
from gadcli.data.read.rows import Row

ROWS = [(user(f"question {i} é\u2028"), f"answer {i}") for i in range(5)]
RECORDS = [{"content": c, "teacher_response": t} for c, t in ROWS]
LINES = "\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS)
KEYS = ("content", "teacher_response")


def read(path: Path, keys: tuple[str, str] = KEYS) -> tuple[list[Row | None], Summary]:
    """A file's rows, None where one is bad, and what was found."""
    summary, rows = Summary(), []
    for batch in scan_rows(open_files([str(path)], keys, summary), summary):
        account(batch, summary)
        rows += batch.rows
    return rows, summary


def said(summary: Summary) -> list[str]:
    return [f.message for found in summary.examples.values() for f in found if f.level == "note"]


def table() -> pa.Table:
    return pa.table({"content": [c for c, _ in ROWS], "teacher_response": [t for _, t in ROWS]})


def arrow_stream(path: Path) -> None:
    with ipc.new_stream(path, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)


def arrow_file(path: Path) -> None:
    with ipc.new_file(path, table().schema, options=ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table(), max_chunksize=2)


def comma_separated(path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([KEYS, *([json.dumps(c), t] for c, t in ROWS)])


KINDS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_text(LINES),
    "lines.json": lambda path: path.write_text(LINES + "\n"),
    "crlf.jsonl": lambda path: path.write_bytes(LINES.replace("\n", "\r\n").encode() + b"\r\n\r\n"),
    "bom.jsonl": lambda path: path.write_text(LINES, encoding="utf-8-sig"),
    "utf16.jsonl": lambda path: path.write_text(LINES, encoding="utf-16"),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "gzip.jsonl": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES.encode())),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES.encode())),
    "a.jsonl.zst": lambda path: path.write_bytes(pa.compress(LINES.encode(), codec="zstd", asbytes=True)),
    "list.json": lambda path: path.write_text(json.dumps(RECORDS)),
    "pretty.json": lambda path: path.write_text(json.dumps(RECORDS, indent=2, ensure_ascii=False)),
    "list.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(RECORDS).encode())),
    "a.csv": comma_separated,
    "a.arrow": arrow_stream,
    "file.arrow": arrow_file,
    "a.parquet": lambda path: pq.write_table(table(), path),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path / name)
    rows, summary = read(tmp_path / name)
    assert [(r.messages, r.answers, r.tools) for r in rows if r] == [(c, [t], None) for c, t in ROWS]
    assert not summary.counts


def test_a_list_is_read_item_by_item_however_the_pieces_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gadcli.data.read import records

    monkeypatch.setattr(records, "READ_BYTES", 7)
    KINDS["pretty.json"](tmp_path / "a.json")
    assert [r.answers for r in read(tmp_path / "a.json")[0] if r] == [[t] for _, t in ROWS]


@pytest.mark.parametrize("name", ["cut.json", "cut.jsonl.gz", "cut.arrow"])
def test_a_file_that_breaks_off_is_an_error_and_not_a_shorter_file(name: str, tmp_path: Path) -> None:
    whole = tmp_path / name.replace("cut", "whole")
    KINDS[{"json": "list.json", "gz": "a.jsonl.gz", "arrow": "a.arrow"}[name.rsplit(".", maxsplit=1)[-1]]](whole)
    data = whole.read_bytes()
    (tmp_path / name).write_bytes(data[: -len(data) // 4])
    assert read(tmp_path / name)[1].counts["file_unreadable"] == 1


def test_a_torn_line_or_field_costs_its_row_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES.replace('{"content": [{"role": "user", "content": "question 2', "{torn"))
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\nq0,a0\nq1\nq2,\xff\nq3,a3\n")
    assert [row is None for row in read(tmp_path / "a.jsonl")[0]] == [False, False, True, False, False]
    rows, summary = read(tmp_path / "a.csv")
    assert [row and (row.messages, row.answers) for row in rows] == [
        (user("q0"), ["a0"]),
        None,
        None,
        (user("q3"), ["a3"]),
    ]
    assert (summary.counts["content_json"], summary.counts["teacher_utf8"]) == (1, 1)


TEACHER = "teacher_response"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
SYSTEM = {"role": "system", "content": "brief"}
# (name, record, what is said, messages, answers)
LAYOUTS: list[tuple[str, dict[str, Any], str, list[dict[str, Any]], list[str]]] = [
    ("plain text", {"content": "hi [1]", TEACHER: "a"}, "plain text", user("hi [1]"), ["a"]),
    ("messages", {"messages": [SYSTEM, *user("q"), {"role": "assistant", "content": "a"}]}, "chat messages",
     [SYSTEM, *user("q")], ["a"]),
    ("messages as JSON", {"messages": json.dumps([*user("q"), {"role": "assistant", "content": "a"}])}, "chat messages",
     user("q"), ["a"]),
    ("ShareGPT", {"conversations": [
        {"from": "system", "value": "brief"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "b"},
        {"from": "human", "value": "r"}, {"from": "gpt", "value": "a"}]}, "ShareGPT",
     [SYSTEM, *user("q"), {"role": "assistant", "content": "b"}, *user("r")], ["a"]),
    ("ShareGPT with a system column", {"system": "brief", "conversations": [
        {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "ShareGPT", [SYSTEM, *user("q")], ["a"]),
    ("Alpaca", {"instruction": "add", "input": "1 2", "output": "3"}, "Alpaca", user("add\n1 2"), ["3"]),
    ("Alpaca without input", {"instruction": "add", "input": "", "output": "3"}, "Alpaca", user("add"), ["3"]),
    ("Alpaca with history", {"instruction": "add", "output": "3", "history": [["q", "b"]], "system": "brief"}, "Alpaca",
     [SYSTEM, *user("q"), {"role": "assistant", "content": "b"}, *user("add")], ["3"]),
    ("Dolly", {"instruction": "add", "context": "1 2", "response": "3"}, "Alpaca", user("add\n1 2"), ["3"]),
    ("verl", {"prompt": user("q"), TEACHER: "a", "reward_model": {"style": "rule"}}, "verl", user("q"), ["a"]),
    ("TRL", {"prompt": user("q"), "completion": [{"role": "assistant", "content": "a"}]}, "prompt-completion",
     user("q"), ["a"]),
    ("content parts", {"content": user([{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]),
                       TEACHER: [{"type": "text", "text": "a"}]}, "", user("q!"), ["a"]),
    ("a message as answer", {"content": user("q"), TEACHER: [{"role": "assistant", "content": "a"}]}, "",
     user("q"), ["a"]),
    ("reasoning beside the answer", {"content": user("q"), TEACHER: {"content": "a", "reasoning_content": "h"}},
     "reasoning is left out", user("q"), ["a"]),
    ("several answers", {"content": user("q"), TEACHER: ["a", "b"]}, "", user("q"), ["a", "b"]),
    ("null keys", {"content": [{"role": "user", "content": "q", "name": None, "tool_calls": None}],
                   TEACHER: "a"}, "", user("q"), ["a"]),
    ("tools", {"content": [
        {"role": "developer", "content": "brief"}, *user("q"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "12", "tool_call_id": "1"}], TEACHER: "a"}, "",
     [{"role": "developer", "content": "brief"}, *user("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]},
      {"role": "tool", "content": "12", "tool_call_id": "1"}], ["a"]),
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("name", "record", "note", "messages", "answers"), LAYOUTS, ids=[row[0] for row in LAYOUTS])
def test_every_layout_is_read_and_said(
    name: str, record: dict[str, Any], note: str, messages: Any, answers: list[str], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(record) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([record]), path)
    rows, summary = read(path)
    assert [row and (row.messages, row.answers) for row in rows] == [(messages, answers)], summary.lines()
    assert [note in s for s in said(summary)] == [True] * bool(note)


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]], ids=["list", "JSON", "list of JSON"]
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tools_are_kept_in_any_encoding(tools: Any, suffix: str, tmp_path: Path) -> None:
    records = [{"content": user("q"), "teacher_response": "a", "tools": t} for t in (tools, None)]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    assert [row and row.tools for row in read(path)[0]] == [[TOOL], None]


# (name, record, reason, field)
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("an image", {"content": user([{"type": "image_url"}]), TEACHER: "a"}, "message_type", "content"),
    ("a blank plain prompt beside others", {"content": " ", TEACHER: "a"}, "content_empty", "content"),
    ("no last answer", {"messages": user("q")}, "teacher_null", "messages"),
    ("one of several is blank", {"content": user("q"), TEACHER: ["a", " "]}, "teacher_blank", f"{TEACHER}[1]"),
    ("one of several is null", {"content": user("q"), TEACHER: ["a", None]}, "teacher_null", f"{TEACHER}[1]"),
    ("no answers", {"content": user("q"), TEACHER: []}, "teacher_null", TEACHER),
    ("several messages", {"content": user("q"), TEACHER: [
        {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}, "teacher_type", TEACHER),
    ("an answer that calls a tool", {"content": user("q"), TEACHER: {
        "role": "assistant", "content": "", "tool_calls": [CALL]}}, "teacher_type", TEACHER),
    ("tools that are none", {"content": user("q"), TEACHER: "a", "tools": "a hammer"}, "tools_json", "tools"),
    ("an unknown speaker", {"conversations": [
        {"from": "narrator", "value": "q"}, {"from": "gpt", "value": "a"}]}, "role_unknown", "conversations"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "record", "reason", "where"), BAD, ids=[row[0] for row in BAD])
def test_what_cannot_be_read_is_named(
    name: str, record: dict[str, Any], reason: str, where: str, tmp_path: Path
) -> None:
    good = {"content": "plain", "teacher_response": "a"} if record.get("content") == " " else record
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(record) + "\n")
    rows, summary = read(tmp_path / "a.jsonl")
    assert rows[1] is None
    assert (summary.examples[reason][-1].field, summary.examples[reason][-1].row) == (where, 1)


def test_a_column_that_was_asked_for_is_never_replaced_by_a_guess(tmp_path: Path) -> None:
    record = {"prompt": "q", "completion": "c", "response": "r"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert [r and r.answers for r in read(tmp_path / "a.jsonl", ("content", "response"))[0]] == [["r"]]
    assert [r and r.answers for r in read(tmp_path / "a.jsonl", ("prompt", "completion"))[0]] == [["c"]]
    for keys in (("question", "teacher_response"), ("content", "answer")):
        assert read(tmp_path / "a.jsonl", keys)[1].counts["column_missing"] > 0


def test_a_column_of_json_stays_one_when_a_row_is_broken_and_plain_text_may_look_like_json(tmp_path: Path) -> None:
    def contents(*prompts: str) -> list[Any]:
        lines = (json.dumps({"content": p, "teacher_response": "a"}) for p in prompts)
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        return [row and row.messages for row in read(tmp_path / "a.jsonl")[0]]

    as_json = json.dumps(user("q"))
    assert contents(as_json, '[{"role"', "plain") == [user("q"), None, None]
    assert contents('[{"role"', as_json) == [None, user("q")]
    for text in ("[1, 2] sort this", "[1, 2]", '"quoted"', "{not json", "[INST] hi"):
        assert contents(text, "and") == [user(text), user("and")]


def test_plain_rows_and_rows_with_tools_go_through_a_cleaned_copy_whole(tmp_path: Path) -> None:
    """The second file needs more than messages of role and content: what was written by then is kept."""
    from gadcli.cli.app import run

    tools = {"content": LAYOUTS[-1][1]["content"], "teacher_response": ["a", "b"], "tools": [TOOL]}
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.jsonl").write_text(json.dumps(tools))
    out = tmp_path / "clean.parquet"
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert run(["data", "check", *paths, "--fix", "drop", "-o", str(out), "-q"]) == 0
    expected = [row for path in paths for row in read(Path(path))[0]]
    found = read(out)[0]
    assert [r and (r.messages, r.answers, r.tools) for r in found] == [
        r and (r.messages, r.answers, r.tools) for r in expected
    ]
