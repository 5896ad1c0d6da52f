"""Folders of data: the split that is asked for, each row once, and a sentence for what was left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from data_rows import good_rows
from gadcli.cli.app import run
from gadcli.data.read.choose import choose_files, expand
from gadcli.errors import DataError


def put(folder: Path, *names: str) -> Path:
    """Files of two rows each; the rows differ from file to file."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = good_rows(2, 10 * i)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"content": [c for c, _ in rows], "teacher_response": [t for _, t in rows]}), path)
        else:
            lines = [json.dumps({"content": c, "teacher_response": t}) for c, t in rows]
            path.write_text("\n".join(lines) if path.suffix.lower() in (".json", ".jsonl") else "x")
    return folder


def names(folder: Path, split: str = "train") -> list[str]:
    return [str(Path(p).relative_to(folder)) for p in expand([str(folder)], split)]


@pytest.mark.parametrize("layout", [
    ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    ("train/part-0.parquet", "test/part-0.parquet"),
    ("gpt4-code-train.jsonl", "gpt4-code-val.jsonl"),
    ("training.json", "dev.json"),
])  # fmt: skip
def test_training_takes_the_train_split_and_evaluation_the_other(layout: tuple[str, str], tmp_path: Path) -> None:
    put(tmp_path, *layout)
    assert names(tmp_path) == [layout[0]]
    assert names(tmp_path, "val") == [layout[1]]
    assert sorted(names(tmp_path, "")) == sorted(layout)
    [(place, note)] = choose_files([str(tmp_path)]).notes
    assert place == str(tmp_path) and "the train split" in note and layout[1] in note


def test_validation_is_preferred_to_test_and_unnamed_files_to_another_split(tmp_path: Path) -> None:
    put(tmp_path / "a", "train.jsonl", "validation.jsonl", "test.jsonl")
    assert names(tmp_path / "a", "val") == ["validation.jsonl"]
    put(tmp_path / "b", "rows.jsonl", "test.jsonl")
    assert names(tmp_path / "b") == ["rows.jsonl"]
    put(tmp_path / "c", "latest.jsonl", "contest.jsonl", "train_test_mix.jsonl")  # names that only look like it
    assert (
        names(tmp_path / "c")
        == names(tmp_path / "c", "val")
        == ["contest.jsonl", "latest.jsonl", "train_test_mix.jsonl"]
    )


def test_test_rows_become_training_rows_only_by_name(tmp_path: Path) -> None:
    put(tmp_path, "test-0.parquet", "test-1.parquet")
    with pytest.raises(DataError, match="holds test files alone, asked for train"):
        expand([str(tmp_path)])
    both = [str(tmp_path / "test-0.parquet"), str(tmp_path / "test-1.parquet")]
    assert expand(both) == expand([str(tmp_path / "test-*.parquet")]) == both
    put(tmp_path, "train-0.parquet")
    assert expand([str(tmp_path / "*.parquet")]) == [str(tmp_path / "train-0.parquet")]


def test_shards_of_several_endings_are_all_taken_and_the_same_name_once(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", "b.parquet", "c.json", "d.JSONL", "b.jsonl", "notes.xlsx", "README.md", ".git/x.jsonl")
    (tmp_path / "config.json").write_text('{"features": {}}')
    assert names(tmp_path) == ["a.jsonl", "b.parquet", "c.json", "d.JSONL"]
    notes = dict(choose_files([str(tmp_path)]).notes)
    assert "notes.xlsx" in notes[str(tmp_path)] and "README" not in notes[str(tmp_path)]
    assert "the same name in another ending" in notes[str(tmp_path / "b.jsonl")]


def test_a_saved_data_set_is_its_listed_files(tmp_path: Path) -> None:
    table = pa.table({"content": [c for c, _ in good_rows(3)], "teacher_response": [t for _, t in good_rows(3)]})
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for name in ("data-00000-of-00001.arrow", "cache-0123.arrow"):
            with ipc.new_stream(tmp_path / split / name, table.schema) as writer:
                writer.write_table(table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (tmp_path / split / "state.json").write_text(json.dumps(state))
        (tmp_path / split / "dataset_info.json").write_text('{"features": {}}')
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert names(tmp_path) == ["train/data-00000-of-00001.arrow"]
    assert run(["data", "check", str(tmp_path / "train"), "--batch-size", "3", "-q"]) == 0


@pytest.mark.parametrize(("name", "command"), [
    ("s3://bucket/rows.parquet", "aws s3 cp --recursive s3://bucket/rows.parquet data"),
    ("hf://datasets/org/name/data", "hf download org/name --repo-type dataset --local-dir data"),
    ("https://huggingface.co/datasets/org/name", "hf download org/name --repo-type dataset --local-dir data"),
    ("https://example.org/rows.parquet", "curl -L --create-dirs -O --output-dir data 'https://example.org/rows.parquet'"),
    ("org/name-v1.2", "hf download org/name-v1.2 --repo-type dataset --local-dir data"),
])  # fmt: skip
def test_what_is_elsewhere_is_refused_with_the_command_that_brings_it(name: str, command: str) -> None:
    with pytest.raises(DataError) as refused:
        expand([name])
    assert f"{name}: not on this machine" in str(refused.value)
    assert command in str(refused.value.hint)


def test_a_misspelt_file_is_not_taken_for_a_data_set_on_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(put(tmp_path, "here/train.parquet"))
    for name in ("here/trian.parquet", "here/trian", "there/train.parquet"):
        with pytest.raises(DataError, match="no such file"):
            expand([name])


def test_the_check_and_the_plan_say_what_was_taken(tmp_path: Path, capsys: Any) -> None:
    from gadcli.config.schema import DataConfig
    from gadcli.launch.inputs import look_at

    put(tmp_path, "train.jsonl", "test.jsonl")
    assert run(["data", "check", str(tmp_path)]) == 0
    assert "taken the train split (train.jsonl), not test.jsonl" in capsys.readouterr().out
    look = look_at(DataConfig(train_files=[str(tmp_path)], val_files=[str(tmp_path)]))
    assert ([p.name for p in look.train_files], [p.name for p in look.val_files]) == (["train.jsonl"], ["test.jsonl"])
    assert any("taken the train split" in note for note in look.notes)
    again = look_at(DataConfig(train_files=[str(tmp_path)], val_files=[str(tmp_path / "train.jsonl")]))
    assert any("in data.train_files and data.val_files" in note for note in again.notes)
