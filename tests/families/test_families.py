"""The matrix of families (`families.models`): what each must come to on its way through gad (`families.passage`).

`make test-families` (GAD_FAMILIES=all) takes all of them, with vLLM in a process of its own; otherwise four that differ
most, with the sampler on transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from families.models import FAMILIES
from families.passage import passage
from gadcli.launch.environment import engine_variables
from train.training import environment

ALL = os.environ.get("GAD_FAMILIES") == "all"
DIFFER_MOST = ("llama", "qwen25base", "gemma3", "qwen3moe")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def assert_passed(found: dict[str, Any]) -> None:
    """No step failed, the plan had nothing against it, and whoever read the weights wrote the same greedy text."""
    assert "failed" not in found, found["failed"]
    assert found["plan of seqkd"] == found["plan of gad"] == ""
    for step in ("seqkd, hf", "gad with adapters, hf"):
        assert found[step]["equal to the trained model"] and found[step]["equal to transformers"], (step, found[step])
        assert found[step]["note"] == ""
    assert found["seqkd, hf"]["changed"] > 0 and found["gad with adapters, hf"]["changed"] > 0


@pytest.mark.parametrize("name", FAMILIES if ALL else DIFFER_MOST)
def test_a_family_is_trained_sampled_and_merged_alike(name: str, tmp_path: Path) -> None:
    assert_passed(passage(name, tmp_path, vllm=False))


@pytest.mark.skipif(not ALL, reason="make test-families")
def test_every_family_is_the_same_model_in_vllm(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    command = [sys.executable, str(Path(__file__).with_name("passage.py")), str(tmp_path / "out"), str(tmp_path)]
    env = environment() | engine_variables()
    done = subprocess.run([*command, *FAMILIES], env=env, capture_output=True, text=True, check=False)
    assert (tmp_path / "out").exists(), done.stderr[-3000:]
    found = json.loads((tmp_path / "out").read_text())
    assert list(found) == list(FAMILIES)
    wrong = {name: steps.get("failed") or steps for name, steps in found.items() if not equal_in_vllm(steps)}
    assert not wrong


def equal_in_vllm(steps: dict[str, Any]) -> bool:
    runs = [steps.get("gad, vllm"), steps.get("seqkd with adapters, vllm")]
    read = steps.get("vllm", {}).get("equal to the trained model", False)
    return bool(read) and all(run is not None and run["equal to transformers"] for run in runs)


def test_the_page_has_a_row_for_each_family() -> None:
    page = PAGE.read_text()
    for family in FAMILIES.values():
        assert f"\n| {family.title} | {family.config.model_type} |" in page
