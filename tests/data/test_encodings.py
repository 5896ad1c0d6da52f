"""The same rows in any physical encoding, from any writer, give the same token ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_rows import user
from gadcli.config.schema import DataConfig
from gadcli.data.batches import open_dataset

ROWS = [
    (user("plain"), "answer"),
    ([{"role": "system", "content": "brief"}, *user("two turns")], "是，好的"),
    ([*user("a"), {"role": "assistant", "content": "b"}, *user("\u00e9\U0001f600 c")], " leading\nspace "),
]
STRUCT = pa.struct([("role", pa.string()), ("content", pa.string())])
SWAPPED = pa.struct([("content", pa.string()), ("role", pa.string())])
LARGE = pa.struct([("role", pa.large_string()), ("content", pa.large_string())])
EXTRA = pa.struct([("name", pa.string()), ("role", pa.string()), ("content", pa.string())])


def typed(content: pa.DataType, teacher: pa.DataType) -> pa.Table:
    return pa.table(
        {
            "content": pa.array([c for c, _ in ROWS], content),
            "teacher_response": pa.array([t for _, t in ROWS], teacher),
        }
    )


def dictionary() -> pa.Table:
    """Dictionary-encoded JSON prompts and answers."""
    return pa.table(
        {
            "content": pa.array([json.dumps(c) for c, _ in ROWS]).dictionary_encode(),
            "teacher_response": pa.array([t for _, t in ROWS]).dictionary_encode(),
        }
    )


def views() -> pa.Table:
    """At the top level only: pyarrow cannot write views inside lists yet."""
    texts = {"content": [json.dumps(c) for c, _ in ROWS], "teacher_response": [t for _, t in ROWS]}
    return pa.table({name: pa.array(values, pa.string_view()) for name, values in texts.items()})


def nested_dictionary() -> pa.Table:
    flat = [m for c, _ in ROWS for m in c]
    messages = pa.StructArray.from_arrays(
        [pa.array([m[f] for m in flat]).dictionary_encode() for f in ("role", "content")], ["role", "content"]
    )
    offsets = [0]
    for c, _ in ROWS:
        offsets.append(offsets[-1] + len(c))
    content = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), messages)
    return pa.table({"content": content, "teacher_response": [t for _, t in ROWS]})


ARROW: dict[str, Callable[[], pa.Table]] = {
    "list of struct": lambda: typed(pa.list_(STRUCT), pa.string()),
    "fields in another order": lambda: typed(pa.list_(SWAPPED), pa.string()),
    "an extra field": lambda: typed(pa.list_(EXTRA), pa.string()),
    "large list, large string": lambda: typed(pa.large_list(LARGE), pa.large_string()),
    "string view": views,
    "dictionary of JSON strings": dictionary,
    "dictionary inside": nested_dictionary,
    "binary answers": lambda: typed(pa.list_(STRUCT), pa.binary()),
    "columns in another order": lambda: typed(pa.list_(STRUCT), pa.string()).select(["teacher_response", "content"]),
}


def ids_of(path: Path, tokenizer: Any, cache: Path) -> list[tuple[list[int], list[int]]]:
    cfg = DataConfig(train_files=[str(path)], train_batch_size=1)
    return [(r.prompt_ids, r.teacher_ids) for r in open_dataset([], tokenizer, cfg, 4096, "train", cache)]


def expected(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """From transformers alone: its chat template with the generation prompt, its encoding, its EOS."""
    return [
        (
            tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"],
            tokenizer(t, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id],
        )
        for c, t in ROWS
    ]


@pytest.mark.parametrize("name", ARROW)
def test_arrow_encodings_agree_with_transformers(name: str, tmp_path: Path, tokenizer: Any) -> None:
    pq.write_table(ARROW[name](), tmp_path / "a.parquet", row_group_size=2)
    assert ids_of(tmp_path / "a.parquet", tokenizer, tmp_path / "c") == expected(tokenizer)


def test_pandas_and_polars_and_jsonl_agree_with_transformers(tmp_path: Path, tokenizer: Any) -> None:
    columns = {"content": [c for c, _ in ROWS], "teacher_response": [t for _, t in ROWS]}
    pd.DataFrame(columns).to_parquet(tmp_path / "pandas.parquet")
    pl.DataFrame(columns).write_parquet(tmp_path / "polars.parquet")
    lines = [json.dumps({"content": c, "teacher_response": t}) for c, t in ROWS]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))  # no newline at the end, on purpose
    lines = [json.dumps({"content": json.dumps(c), "teacher_response": t}, ensure_ascii=False) for c, t in ROWS]
    (tmp_path / "string.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    for path in sorted(tmp_path.iterdir()):
        assert ids_of(path, tokenizer, tmp_path / "c") == expected(tokenizer), path.name


def test_a_folder_and_a_glob_and_files_name_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    from gadcli.data.read.choose import expand

    (tmp_path / "d" / "sub").mkdir(parents=True)
    for name in ("b.parquet", "a.parquet", "sub/c.jsonl", "_hidden.parquet", "notes.txt"):
        (tmp_path / "d" / name).write_text("x")
    names = [str(tmp_path / "d" / n) for n in ("a.parquet", "b.parquet", "sub/c.jsonl")]
    assert expand([str(tmp_path / "d")]) == names
    assert expand([str(tmp_path / "d" / "[ab].parquet"), names[2]]) == names
