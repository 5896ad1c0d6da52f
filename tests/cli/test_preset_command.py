"""`gad preset` and `gad doctor` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

from gadcli.cli.app import run
from gadcli.config.reading import compose
from gadcli.config.tree import schema_leaves


def output(capsys, *words: str, code: int = 0) -> str:
    assert run(list(words)) == code
    return capsys.readouterr().out


def test_list_names_every_file_of_presets(capsys) -> None:
    shipped = sorted(path.stem for path in (Path(__file__).parents[2] / "presets").glob("*.yaml"))
    lines = output(capsys, "preset", "list").splitlines()
    assert [line.split()[0] for line in lines] == shipped
    assert all(len(line.split()) > 3 for line in lines)  # each says what it is for
    assert [item["name"] for item in json.loads(output(capsys, "preset", "list", "--json"))] == shipped


def test_show_prints_a_config_with_origins(capsys) -> None:
    out = output(capsys, "preset", "show", "chengla-8b", "--stage", "gad", "rollout.n=4")
    assert compose(out, "out") is not None  # it is YAML
    assert "  n: 4  # command line" in out
    assert "    lr: 3.0e-06  # presets/chengla-8b.yaml:" in out


def test_show_without_a_stage_sets_the_three_side_by_side(capsys) -> None:
    row = next(line for line in output(capsys, "preset", "show", "chengla-8b").splitlines() if "critic_warmup" in line)
    assert row.split() == ["trainer.critic_warmup", "-1", "10", "0"]


def test_show_without_a_name_explains_every_key(capsys) -> None:
    keys = [line.partition("=")[0] for line in output(capsys, "preset", "show").splitlines()]
    assert keys == list(schema_leaves())
    assert len(json.loads(output(capsys, "preset", "show", "--json"))) == len(keys)


def test_show_json_has_value_and_origin(capsys) -> None:
    data = json.loads(output(capsys, "preset", "show", "demo", "--stage", "seqkd", "--json"))
    assert data["actor.objective"]["value"] == "sft"
    assert data["actor.objective"]["origin"].startswith("presets/demo.yaml:")


def test_diff_lists_what_differs_and_nothing_else(capsys) -> None:
    data = json.loads(output(capsys, "preset", "diff", "chengla-8b", "chengla-8b-v0", "--stage", "warmup", "--json"))
    assert data["warmup"]["critic.loss"] == ["final", "v2"]
    assert data["warmup"]["actor.clip_ratio_low"] == [0.1, 3e-4]
    assert "rollout.n" not in data["warmup"]
    assert output(capsys, "preset", "diff", "demo", "demo").splitlines() == ["stage  key  demo  demo"]


def test_doctor_prints_facts_for_people_and_machines(capsys) -> None:
    run(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["cores"] >= 1
    assert {"packages", "devices", "disk_free_gb", "ram_total_gb", "engine", "problems"} <= set(facts)
    run(["doctor"])
    assert f"cpu      {facts['cores']} cores" in capsys.readouterr().out
