"""What the plan says of the first rows: template, tokenizer and limits as the worker will meet them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from data.chat_families import CHATML, GEMMA
from data_rows import good_rows, make_tokenizer, user
from gadcli.config.resolve import dump_yaml, resolve
from gadcli.config.schema import GadConfig
from gadcli.data.preview import main, preview_in_a_child
from gadcli.errors import ConfigError, DataError
from gadcli.launch.inputs import look_at


def config(path: str, *words: str, stage: str = "gad") -> GadConfig:
    return resolve(stage, None, None, {}, [f"data.train_files=[{path}]", *words]).config


def model(folder: Path, template: str | None, tokenizer_class: str = "") -> Path:
    make_tokenizer(template, eos="<|endoftext|>").save_pretrained(folder)
    if tokenizer_class:  # one that transformers rebuilds, so that a parent leaves it to a child
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": tokenizer_class}))
    return folder


def test_the_plan_names_template_and_rows(write: Any, tmp_path: Path) -> None:
    folder = model(tmp_path / "m", CHATML)
    path = write([(user("q"), "a<|im_end|>"), *good_rows(3)])
    found = preview_in_a_child(config(path), folder, wait=True)
    assert [line.partition(":")[0] for line in found] == ["the model's tokenizer", f"{path} row 0 teacher_response"]
    assert "(end_differs)" in found[0] and "(end_in_answer); remove it from the answer" in found[1]
    bad = write([*good_rows(2), ([{"role": "system", "content": "s"}, *user("q")], "a")], "bad.parquet")
    with pytest.raises(DataError, match="row 2 content: the chat template refuses the system role"):
        preview_in_a_child(config(bad), model(tmp_path / "g", GEMMA), wait=True)
    assert preview_in_a_child(config(bad, "data.on_bad_row=drop"), tmp_path / "g", wait=True)
    headless = model(tmp_path / "h", CHATML.partition("{% if add_generation_prompt %}")[0])
    with pytest.raises(ConfigError, match="ignores add_generation_prompt"):
        preview_in_a_child(config(path), headless, wait=True)


def test_a_tokenizer_that_transformers_must_read_is_looked_at_in_a_child(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(write(good_rows(3)))
    (line,) = preview_in_a_child(cfg, model(tmp_path / "m", CHATML, "GPT2Tokenizer"), wait=True)
    assert "(end_differs)" in line
    # What it says where it raises: the error, as JSON.
    headless = model(tmp_path / "h", CHATML.partition("{% if add_generation_prompt %}")[0])
    (tmp_path / "c.yaml").write_text(dump_yaml(cfg, {}))
    monkeypatch.setattr(sys, "argv", ["preview", str(tmp_path / "c.yaml"), str(headless)])
    main()
    said = json.loads(capsys.readouterr().out)
    assert said["error"] == "ConfigError" and "add_generation_prompt" in said["message"] + said["hint"]


def test_a_start_does_not_wait_for_what_the_worker_will_say_itself(write: Any, tmp_path: Path) -> None:
    folder = model(tmp_path / "m", CHATML, "GPT2Tokenizer")
    assert preview_in_a_child(config(write(good_rows(2))), folder, wait=False) == []


def test_the_plan_renders_with_the_templates_variables(write: Any, tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "{% if strict %}{{ raise_exception('no') }}{% endif %}" + CHATML)
    path = write(good_rows(3))
    assert len(preview_in_a_child(config(path), folder, wait=True)) == 1
    with pytest.raises(DataError, match="no"):
        preview_in_a_child(config(path, "data.template_kwargs.strict=true"), folder, wait=True)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_rows_and_answers_are_counted_before_anything_is_read(name: str, write: Any) -> None:
    rows = [(user(f"q {i}"), [f"a {i} {k}" for k in range(1 + i % 3)]) for i in range(6)]
    found = look_at(config(write(rows, name)).data)
    assert (found.train_rows, found.train_answers) == (6, 12)
    single = look_at(config(write(good_rows(5), name)).data)
    assert (single.train_rows, single.train_answers) == (5, 5)
