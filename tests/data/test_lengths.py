"""Length statistics are exact at any size, and the suggestion is P99 rounded up to a multiple of 16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_rows import good_rows, user
from gadcli.cli.app import run
from gadcli.config.resolve import resolve
from gadcli.data.lengths import DENSE, Lengths, limit_table, suggest

Write = Callable[..., str]


def lengths_of(values: list[int]) -> Lengths:
    lengths = Lengths()
    for start in range(0, len(values), 7):  # in pieces, as batches come
        lengths.add(np.array(values[start : start + 7], np.int64))
    return lengths


def test_percentiles_are_exact_nearest_ranks() -> None:
    values = [*np.random.default_rng(1).integers(1, 500, 1234).tolist(), DENSE + 5, DENSE + 900]
    lengths = lengths_of(values)
    ordered = sorted(values)
    for p in (50, 90, 95, 99, 99.9, 100):
        # Nearest rank by definition: the ceil(p/100 * n)-th smallest.
        rank = int(np.ceil(p / 100 * len(values) - 1e-9))
        assert lengths.percentile(p) == ordered[rank - 1]
    assert (lengths.rows, lengths.tokens, lengths.longest) == (len(values), sum(values), DENSE + 900)
    for limit in (0, 1, 250, 499, DENSE, DENSE + 5):
        assert lengths.over(limit) == sum(v > limit for v in values)
    assert sum(rows for _, _, rows in lengths.histogram()) == len(values)


def test_the_suggestion_is_p99_rounded_up_to_sixteen_and_says_why_not_three_times() -> None:
    # 1000 answers of 1..1000 tokens: P99 is 990, the next multiple of 16 is 992, and 8 rows are longer.
    fields = {"prompt": lengths_of([100] * 1000), "teacher": lengths_of(list(range(1, 1001))), "both": lengths_of([1])}
    found = suggest(fields)
    assert (found.max_prompt_length, found.max_response_length, found.max_model_len) == (112, 992, 1104)
    assert found.rows_cut == {"prompt": 0, "teacher": 8}
    assert any("why not 3x (2976)" in r and "0.80% more rows" in r for r in found.reasons)
    table = {limit: (label, cut) for limit, label, cut, _ in limit_table(fields["teacher"], 256, 992)}
    assert table[256] == ("current", 744)
    assert table[992] == ("suggested", 8)
    assert table[512] == ("", 488)


def test_counts_equal_the_models_own_tokenizer_on_every_row(
    write: Write, model_folder: Path, tokenizer: Any, capsys: Any
) -> None:
    rows = [(user(f"q {i} " + "é漢字 " * (i % 9)), "word " * (i % 13 + 1)) for i in range(300)]
    one, two = write(rows[:200], "a.parquet"), write(rows[200:], "b.jsonl")
    assert run(["data", "analyze-tokens", one, two, "-t", str(model_folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    prompts = [len(tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"]) for c, _ in rows]
    answers = [len(tokenizer(t, add_special_tokens=False)["input_ids"]) + 1 for _, t in rows]
    assert told["fields"]["prompt"]["tokens"] == sum(prompts)
    assert told["fields"]["teacher"]["tokens"] == sum(answers)
    assert told["fields"]["both"]["max"] == max(p + a for p, a in zip(prompts, answers, strict=True))
    assert told["fields"]["prompt"]["p50"] == sorted(prompts)[149]
    assert told["files"][two]["teacher_tokens"] == sum(answers[200:])
    assert told["steps"] == {
        "batch_size": 128, "steps_per_epoch": 2, "rows_left_over": 44,
        "tokens_per_step": round((sum(prompts) + sum(answers)) / 300 * 128),
    }  # fmt: skip


def test_a_preset_is_compared_and_written(write: Write, model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    path = write([(user(f"question {i}"), "word " * (i + 1)) for i in range(100)])
    preset = tmp_path / "mine.yaml"
    words = ["data", "analyze-tokens", path, "-t", str(model_folder), "--preset", "chengla-8b", "--write", str(preset)]
    assert run(words) == 0
    out = capsys.readouterr().out
    assert "preset chengla-8b" in out
    assert "max_response_length 256 covers" in out
    first = resolve("gad", str(preset), None, {}, []).config
    assert first.rollout.max_model_len == first.data.max_prompt_length + first.data.max_response_length
    # Edited again: numbers change in place, comments and other keys stay.
    preset.write_text(
        preset.read_text().replace("max_prompt_length", "train_batch_size: 4 # mine\n    max_prompt_length")
    )
    assert (
        run(["data", "analyze-tokens", write(good_rows(50)), "-t", str(model_folder), "--write", str(preset), "-q"])
        == 0
    )
    second = resolve("gad", str(preset), None, {}, []).config
    assert second.data.train_batch_size == 4
    assert "# mine" in preset.read_text()
    assert second.data.max_response_length < first.data.max_response_length


def test_a_shipped_preset_is_not_edited(write: Write, model_folder: Path) -> None:
    assert run(["data", "analyze-tokens", write(good_rows(9)), "-t", str(model_folder), "--write", "demo", "-q"]) == 2


def test_a_preset_too_short_for_the_data_is_said(write: Write, model_folder: Path, capsys: Any) -> None:
    path = write([(user("q"), "word " * 200) for _ in range(20)])
    assert run(["data", "analyze-tokens", path, "-t", str(model_folder), "--preset", "demo"]) == 0
    assert "too short for this data" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [[], [(user("q"), None)]])
def test_no_lengths_no_suggestion(rows: list[Any], write: Write, model_folder: Path) -> None:
    import pyarrow as pa

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    assert run(["data", "analyze-tokens", write(rows, types=(turns, pa.string())), "-t", str(model_folder)]) == 3
