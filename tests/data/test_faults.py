"""Rows 1-26 of the fault matrix: each bad file or row is named, all in one pass, and ends with exit 3 (22: exit 6).

Every case runs the real command line. The files are written by pyarrow here; test_encodings has other writers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_rows import good_rows, user
from gadcli.cli.app import run
from gadcli.config.schema import DataConfig
from gadcli.data.batches import open_dataset
from gadcli.errors import DataError

Write = Callable[..., str]
TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def check(tmp_path: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and findings of `gad data check`."""
    findings = tmp_path / "findings.jsonl"
    code = run(["data", "check", *words, "--findings", str(findings), "-q"])
    return code, [json.loads(line) for line in findings.read_text().splitlines()]


def reasons(findings: list[dict[str, Any]]) -> list[str]:
    return [f["reason"] for f in findings]


# One bad row among good ones: (number, expected reason, content, teacher)
BAD_ROWS: list[tuple[str, str, Any, Any]] = [
    ("2 null teacher", "teacher_null", user("q"), None),
    ("3 empty teacher", "teacher_blank", user("q"), ""),
    ("3 blank teacher", "teacher_blank", user("q"), " \n\t\u3000"),
    ("6 null content", "content_null", None, "a"),
    ("7 empty list", "content_empty", [], "a"),
    ("8 unknown role", "role_unknown", [{"role": "usr", "content": "q"}], "a"),
    ("9 no role", "message_keys", [{"role": None, "content": "q"}], "a"),
    ("10 null message", "message_type", user(None), "a"),
    ("11 assistant last", "last_is_assistant", [*user("q"), {"role": "assistant", "content": "x"}], "a"),
]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
@pytest.mark.parametrize(("case", "reason", "content", "teacher"), BAD_ROWS, ids=[c[0] for c in BAD_ROWS])
def test_one_bad_row_is_named_by_file_row_and_field(
    case: str, reason: str, content: Any, teacher: Any, name: str, write: Write, tmp_path: Path
) -> None:
    rows = [*good_rows(3), (content, teacher), *good_rows(2, 10)]
    path = write(rows, name, (TURNS, pa.string()))
    code, findings = check(tmp_path, path)
    assert code == 3
    assert reasons(findings) == [reason]
    found = findings[0]
    assert (found["file"], found["row"], found["level"]) == (path, 3, "error")
    assert found["field"] == ("teacher_response" if reason.startswith("teacher") else "content")


@pytest.mark.parametrize("encoding", ["parquet", "jsonl", "json strings"])
def test_all_bad_rows_are_found_in_one_pass(encoding: str, write: Write, tmp_path: Path, capsys: Any) -> None:
    rows = good_rows(100)
    for i, (_, _, content, teacher) in enumerate(BAD_ROWS):
        rows[10 * i] = (content, teacher)
    if encoding == "json strings":
        rows = [(None if c is None else json.dumps(c), t) for c, t in rows]
        path = write(rows)
    else:
        path = write(rows, f"rows.{encoding}", (TURNS, pa.string()))
    code, findings = check(tmp_path, path)
    assert code == 3
    assert len(findings) == len(BAD_ROWS)
    assert {f["row"] // 10: f["reason"] for f in findings} == {i: c[1] for i, c in enumerate(BAD_ROWS)}
    # The summary says kept + bad = total: 100 rows, 9 of them bad.
    assert run(["data", "check", path]) == 3
    out, err = capsys.readouterr()
    assert "100 rows: 91 good + 9 bad" in out
    assert len(err.strip().splitlines()) <= 4
    assert "Traceback" not in err


def test_1_a_missing_column_lists_the_columns_and_the_nearest(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": [user("q")], "teacher_respons": ["a"], "source": ["s"]}), path)
    code, findings = check(tmp_path, str(path))
    assert code == 3
    assert reasons(findings) == ["column_missing"]
    assert "content, teacher_respons, source" in findings[0]["message"]
    assert "data.response_key=teacher_respons" in findings[0]["message"]


def test_1_a_missing_column_of_jsonl_is_found_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"contents": [], "teacher_response": "a"}\n')
    code, findings = check(tmp_path, str(path))
    assert (code, reasons(findings)) == (3, ["column_missing"])


def test_4_and_13_and_14_name_exact_token_counts(
    write: Write, tmp_path: Path, model_folder: Path, tokenizer: Any
) -> None:
    path = write([*good_rows(2), (user("long " * 40), "short"), (user("q"), "long " * 40)])
    ids = tokenizer.apply_chat_template(user("long " * 40), add_generation_prompt=True)["input_ids"]
    answer = tokenizer("long " * 40)["input_ids"]
    code, findings = check(
        tmp_path, path, "-t", str(model_folder), "--max-prompt-length", "100", "--max-response-length", "20",
        "--max-model-len", "110",
    )  # fmt: skip
    assert code == 3
    assert reasons(findings) == ["prompt_too_long", "teacher_too_long"]
    assert f"prompt is {len(ids)} tokens" in findings[0]["message"]
    # EOS counts: the answer's own tokens and one more.
    assert f"{len(answer) + 1} tokens with EOS" in findings[1]["message"]


def test_14_a_row_within_both_limits_may_still_be_over_the_model_length(
    write: Write, tmp_path: Path, model_folder: Path, tokenizer: Any
) -> None:
    path = write(good_rows(1))
    both = len(tokenizer.apply_chat_template(user("question 0"), add_generation_prompt=True)["input_ids"]) + len(
        tokenizer("answer 0")["input_ids"]
    )  # fmt: skip
    # With EOS the row is both + 1 tokens long.
    assert check(tmp_path, path, "-t", str(model_folder), "--max-model-len", str(both + 1))[0] == 0
    code, findings = check(tmp_path, path, "-t", str(model_folder), "--max-model-len", str(both))
    assert (code, reasons(findings)) == (3, ["row_too_long"])


@pytest.mark.parametrize(("policy", "kept", "truncated"), [("left", 6, 1), ("right", 6, 1), ("drop", 5, 0)])
def test_4_the_truncation_policy_is_explicit(
    policy: str, kept: int, truncated: int, write: Write, tmp_path: Path, tokenizer: Any
) -> None:
    text = "the quick brown fox jumps over the lazy dog " * 9
    path = write([*good_rows(5), (user("q"), text)])
    cfg = DataConfig(train_files=[path], train_batch_size=2, max_response_length=10, truncation=policy)
    data = open_dataset([], tokenizer, cfg, 2048, "train", tmp_path / "cache")
    assert (data.kept, data.dropped, data.truncated, data.total) == (kept, 6 - kept, truncated, 6)
    ids = tokenizer(text)["input_ids"]
    if policy == "right":
        assert data[5].teacher_ids == ids[:10]  # no EOS: the answer does not end there
    if policy == "left":
        assert data[5].teacher_ids == [*ids[-9:], tokenizer.eos_token_id]


def test_5_a_teacher_of_nothing_but_eos_is_bad(write: Write, tmp_path: Path, model_folder: Path) -> None:
    path = write([*good_rows(1), (user("q"), "<|im_end|>")])
    code, findings = check(tmp_path, path, "-t", str(model_folder))
    assert code == 3
    assert "teacher_eos_only" in reasons(findings)


def test_8_a_template_that_drops_a_role_is_noticed(write: Write, tmp_path: Path) -> None:
    from data_rows import make_tokenizer

    silent = make_tokenizer("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    silent.save_pretrained(tmp_path / "silent")
    path = write([([{"role": "system", "content": "be brief"}, *user("q")], "a"), *good_rows(1)])
    code, findings = check(tmp_path, path, "-t", str(tmp_path / "silent"))
    assert (code, reasons(findings)) == (3, ["template_leaves_out", "template_rewrites"])
    assert "leaves out message 1, of role 'system'" in findings[0]["message"]


@pytest.mark.parametrize("value", [7, [1], {"text": "q"}])
def test_10_a_message_of_another_type_is_bad(value: Any, write: Write, tmp_path: Path) -> None:
    for name in ("rows.parquet", "rows.jsonl"):
        code, findings = check(tmp_path, write([(user(value), "a")], name))
        assert (code, reasons(findings)) == (3, ["message_type"])


def test_9_messages_without_the_fields_are_bad(write: Write, tmp_path: Path) -> None:
    for name in ("rows.parquet", "rows.jsonl"):
        code, findings = check(tmp_path, write([([{"from": "human", "value": "q"}], "a")], name))
        assert (code, reasons(findings)) == (3, ["message_keys"])


def test_12_json_strings_are_parsed_if_valid(write: Write, tmp_path: Path) -> None:
    rows = [(json.dumps(user("q")), "a"), ("[{broken", "a"), ('"text"', "a"), ("[" * 100_000, "a")]
    code, findings = check(tmp_path, write(rows))
    assert code == 3
    assert [(f["row"], f["reason"]) for f in findings] == [
        (1, "content_json"),
        (2, "content_type"),
        (3, "content_json"),
    ]


def test_15_special_token_text_warns_and_fails_when_strict(write: Write, tmp_path: Path, model_folder: Path) -> None:
    path = write([*good_rows(2), (user("ignore this <|im_end|> and"), "a")])
    code, findings = check(tmp_path, path, "-t", str(model_folder))
    assert (code, reasons(findings)) == (0, ["special_text"])
    assert (findings[0]["row"], findings[0]["level"]) == (2, "warn")
    assert check(tmp_path, path, "-t", str(model_folder), "--strict")[0] == 3


def invalid_utf8(values: list[bytes]) -> pa.Array:
    """A string array whose bytes are not text: parquet readers hand it over unchecked."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())


def test_16_invalid_utf8_is_found_in_teacher_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = invalid_utf8([b"ok", b"bad \xff", b"ok"])
    content = pa.ListArray.from_arrays(
        pa.array([0, 1, 2, 3], pa.int32()),
        pa.StructArray.from_arrays([pa.array(["user"] * 3), texts], ["role", "content"]),
    )
    pq.write_table(
        pa.table({"content": content, "teacher_response": invalid_utf8([b"\xc3\x28", b"fine", b"fine"])}), path
    )
    code, findings = check(tmp_path, str(path))
    assert code == 3
    assert {(f["row"], f["reason"]) for f in findings} == {(0, "teacher_utf8"), (1, "content_utf8")}


def test_16_half_a_surrogate_pair_in_jsonl_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": [{"role": "user", "content": "\\ud800"}], "teacher_response": "a"}\n'
                    '{"content": [{"role": "user", "content": "q"}], "teacher_response": "\\udfff"}\n')  # fmt: skip
    code, findings = check(tmp_path, str(path))
    assert (code, reasons(findings)) == (3, ["content_utf8", "teacher_utf8"])


def test_17_a_binary_teacher_is_decoded_or_an_error(write: Write, tmp_path: Path, tokenizer: Any) -> None:
    path = write([(user("q"), "是".encode()), (user("r"), b"\xff\xfe")])
    code, findings = check(tmp_path, path)
    assert (code, reasons(findings)) == (3, ["teacher_utf8"])
    cfg = DataConfig(train_files=[path], train_batch_size=1, on_bad_row="drop")
    assert open_dataset([], tokenizer, cfg, 2048, "train", tmp_path / "cache")[0].teacher == "是"


def test_18_a_file_of_no_rows_is_bad(tmp_path: Path, write: Write) -> None:
    path = write([], types=(TURNS, pa.string()))
    code, findings = check(tmp_path, path, write(good_rows(2), "good.parquet"))
    assert (code, reasons(findings), findings[0]["file"]) == (3, ["file_empty"], path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    assert check(tmp_path, str(empty))[0] == 3


def test_19_all_rows_dropped_is_an_error_even_when_dropping_is_allowed(
    write: Write, tmp_path: Path, capsys: Any
) -> None:
    path = write([(user("q"), ""), (user("q"), None)])
    assert check(tmp_path, path, "--on-bad-row", "drop")[0] == 3
    assert "all 2 rows were dropped" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cut.parquet", "text.parquet", "zero.parquet", "zero.jsonl", "binary.jsonl"])
def test_20_a_file_that_is_no_data_is_named(name: str, write: Write, tmp_path: Path) -> None:
    path = tmp_path / name
    whole = Path(write(good_rows(50), "whole.parquet")).read_bytes()
    contents = {"cut": whole[: len(whole) // 2], "text": b"not parquet", "zero": b"", "binary": bytes(range(256))}
    path.write_bytes(contents[path.stem])
    code, findings = check(tmp_path, str(path))
    assert (code, reasons(findings), findings[0]["file"]) == (3, ["file_unreadable"], str(path))


def test_21_a_corrupt_page_costs_its_row_group_and_no_other(write: Write, tmp_path: Path) -> None:
    path = write(good_rows(300), row_group_size=100, compression="zstd")
    metadata = pq.read_metadata(path)
    column = metadata.row_group(1).column(2)
    data = bytearray(Path(path).read_bytes())
    # The column's dictionary and data pages: everything but its first header bytes.
    start, end = column.dictionary_page_offset + 30, column.dictionary_page_offset + column.total_compressed_size
    data[start:end] = np.random.default_rng(1).bytes(end - start)
    Path(path).write_bytes(data)
    code, findings = check(tmp_path, path)
    assert code == 3
    assert reasons(findings) == ["page_corrupt"]
    assert findings[0]["row_group"] == 1


def test_21_a_value_that_points_outside_its_dictionary_is_a_corrupt_page() -> None:
    """As flipped bytes leave dictionary columns; Arrow hands them over, and decoding them failed as a bug of ours."""
    from gadcli.data.read.chunks import without_dictionaries

    def array(*at: int | None) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(at, pa.int32()), pa.array(["user", "q"]), safe=False)

    def unfolded(values: pa.Array) -> list[Any]:
        return without_dictionaries(pa.record_batch({"x": values})).column(0).to_pylist()

    assert unfolded(array(0, 1, None)) == ["user", "q", None]
    assert unfolded(array(None)) == [None]
    for wrong in (array(0, 2), array(-1)):
        nested = pa.ListArray.from_arrays(
            pa.array([0, len(wrong)], pa.int32()), pa.StructArray.from_arrays([wrong], ["role"])
        )
        for outside in (wrong, nested):
            with pytest.raises(pa.ArrowInvalid, match="out of bounds"):
                unfolded(outside)


def bombs(folder: Path) -> list[Path]:
    """Small files that unfold to 160 MB: one value in one page, and the same without the ratio in the footer."""
    one = pa.table({"content": [user("q")], "teacher_response": pa.array(["x" * 160_000_000], pa.large_string())})
    paths = [folder / "value.parquet", folder / "message.parquet"]
    pq.write_table(one, paths[0], compression="zstd", use_dictionary=False, write_statistics=False)
    big = pa.table({"content": [user("x" * 160_000_000)], "teacher_response": ["a"]})
    pq.write_table(big, paths[1], compression="zstd", use_dictionary=False, write_statistics=False)
    return paths


def test_22_a_decompression_bomb_ends_in_exit_6_and_bounded_memory(tmp_path: Path) -> None:
    for path in bombs(tmp_path):
        assert path.stat().st_size < 50_000
        code = (
            "import sys; from pathlib import Path; from gadcli.cli.app import run; code = run(sys.argv[1:]);"
            "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]); sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "data", "check", str(path)], capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        assert done.returncode == 6, done.stderr
        assert "decompression bomb" in done.stderr
        assert int(done.stdout.split()[-1]) < 200_000  # kB; unfolding it takes 320 and more


def chunks_of(path: str) -> Iterator[Any]:
    from gadcli.data.read.chunks import read_chunks
    from gadcli.data.read.files import FileInfo, inspect

    info = inspect(path, "content", "teacher_response")
    assert isinstance(info, FileInfo)
    return read_chunks(info)


def test_22_repeats_of_a_huge_dictionary_entry_stream_in_small_chunks(tmp_path: Path) -> None:
    """Ordinary data: long documents, each in many rows. The footer knows 400 kB of it, unfolded it is 400 MB."""
    from gadcli.data.read.chunks import CHUNK_BYTES

    path = tmp_path / "repeats.parquet"
    table = pa.table({"content": [user("q")] * 1000, "teacher_response": pa.array(["x" * 400_000] * 1000)})
    pq.write_table(table, path)
    assert path.stat().st_size < 50_000
    sizes = [len(c.records) for c in chunks_of(str(path))]
    assert sum(sizes) == 1000
    assert max(sizes) * 400_000 <= CHUNK_BYTES


def test_23_a_row_group_is_never_held_whole(write: Write, tmp_path: Path) -> None:
    """48 MB that do not compress, in one row group as pyarrow writes up to a million rows."""
    text = np.random.default_rng(1).integers(97, 123, 20_000 * 60, dtype=np.uint8).tobytes().decode()
    rows = [(user(f"q{i}"), text[20_000 * (i % 59) + i % 97 :][:20_000]) for i in range(2400)]
    path = write(rows, use_dictionary=False, compression="none", write_batch_size=64)  # pages of 1.3 MB
    assert pq.read_metadata(path).num_row_groups == 1
    code = (
        "import sys; from gadcli.cli.app import run; code = run(sys.argv[1:]); import pyarrow;"
        "print(pyarrow.default_memory_pool().max_memory()); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "check", path, "--batch-size", "2400"], capture_output=True, text=True,
        timeout=60, env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 24 << 20


@pytest.mark.parametrize(("file_mb", "group_mb", "allowed_mb"), [
    (0.013, 400, 768),  # a bomb's declared size earns it nothing
    (0.5, 1, 768),
    (340, 450, 1350),  # 1,024 rows of 450 kB in one page: packed, unfolded and as values
    (1800, 2300, 3072),
])  # fmt: skip
def test_23_long_rows_in_one_long_page_are_no_bomb(file_mb: float, group_mb: int, allowed_mb: int) -> None:
    """Pages hold 1,024 rows of any length as pyarrow writes them, and are decoded whole."""
    from gadcli.data.read.chunks import last_allowance

    assert last_allowance(int(file_mb * 2**20), group_mb << 20) == allowed_mb << 20


def test_23_rows_longer_than_their_footer_says_are_decoded_fewer_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8,000 short rows, then 1,000 that repeat one text of 100 kB: none is lost or doubled by the second attempt."""
    from gadcli.data.read import chunks as reading

    path = tmp_path / "a.parquet"
    answers = [f"a{i}" for i in range(8000)] + ["x" * 100_000] * 1000
    pq.write_table(pa.table({"content": [user(f"q{i}") for i in range(9000)], "teacher_response": answers}), path)
    monkeypatch.setattr(reading, "DECODE_ALLOWANCE", 48 << 20)
    chunks = list(chunks_of(str(path)))
    assert [c.first_row for c in chunks] == np.cumsum([0, *(len(c.records) for c in chunks[:-1])]).tolist()
    assert [record["teacher_response"] for c in chunks for record in c.records] == answers


def test_24_files_that_store_a_column_differently_are_said_and_strict_fails(write: Write, tmp_path: Path) -> None:
    one, two = write(good_rows(2), "a.parquet"), write([(json.dumps(user("z")), "a")], "b.parquet")
    code, findings = check(tmp_path, one, two)
    assert (code, reasons(findings), findings[0]["file"]) == (0, ["schema_differs"], two)
    assert check(tmp_path, one, two, "--strict")[0] == 3


def test_24_a_file_whose_column_holds_no_text_is_an_error(write: Write, tmp_path: Path) -> None:
    code, findings = check(tmp_path, write(good_rows(2), "a.parquet"), write([(user("q"), 7)], "b.parquet"))
    assert (code, reasons(findings)) == (3, ["column_type"])


def test_25_duplicates_and_overlap_are_counted_and_strict_fails(write: Write, tmp_path: Path) -> None:
    train = write([*good_rows(10), *good_rows(3)])
    val = write(good_rows(2, 9), "val.jsonl")  # questions 9 and 10; 9 is in training
    code, findings = check(tmp_path, train, "--val", val)
    assert code == 0
    assert [(f["reason"], f["row"]) for f in findings] == [
        ("duplicate", 10), ("duplicate", 11), ("duplicate", 12), ("overlap", 9),
    ]  # fmt: skip
    assert check(tmp_path, train, "--strict")[0] == 3
    assert check(tmp_path, write(good_rows(4), "t.parquet"), "--val", val, "--strict")[0] == 0


def test_26_fewer_rows_than_a_batch_is_an_error_and_never_zero_steps(
    write: Write, tmp_path: Path, tokenizer: Any
) -> None:
    path = write(good_rows(7))
    assert check(tmp_path, path, "--batch-size", "8")[0] == 3
    assert check(tmp_path, path, "--batch-size", "7")[0] == 0
    cfg = DataConfig(train_files=[path], train_batch_size=8)
    with pytest.raises(DataError, match="7 training rows are fewer than one batch of 8"):
        open_dataset([], tokenizer, cfg, 2048, "train", tmp_path / "cache")


def test_a_clean_file_passes_with_exit_0(write: Write, tmp_path: Path, model_folder: Path) -> None:
    for name in ("a.parquet", "a.jsonl"):
        assert check(tmp_path, write(good_rows(20), name), "-t", str(model_folder)) == (0, [])


def test_dropping_bad_rows_is_opt_in_and_accounts_for_every_row(write: Write, tmp_path: Path, tokenizer: Any) -> None:
    path = write([*good_rows(5), (user("q"), None), *good_rows(3, 20)])
    cfg = DataConfig(train_files=[path], train_batch_size=2)
    with pytest.raises(DataError, match="row 5 teacher_response: teacher's answer is null"):
        open_dataset([], tokenizer, cfg, 2048, "train", tmp_path / "cache")
    cfg.on_bad_row = "drop"
    data = open_dataset([], tokenizer, cfg, 2048, "train", tmp_path / "cache")
    assert (data.kept, data.dropped, data.total, len(data)) == (8, 1, 9, 8)
    assert [r.row_id for r in data] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert any("8 rows kept + 1 dropped = 9" in line for line in data.warnings)
