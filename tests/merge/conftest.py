"""Checkpoints that the merge tests share, written once a session by real FSDP ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.ranks import run_jobs

VERL = "merge.rank_jobs:save_as_verl"
GAD = "merge.rank_jobs:save_as_gad"
# name -> (world size, model, FSDP version, ranks that share one replica (0: all), with the JSON metadata)
VERL_CASES: dict[str, tuple[int, str, int, int, str]] = {
    "fsdp1-w1-plain": (1, "untied", 1, 0, "yes"),
    "fsdp1-w2": (2, "untied", 1, 0, "yes"),
    "fsdp1-w3-tied-no-metadata": (3, "tied", 1, 0, "no"),
    "fsdp1-hybrid-2x2": (4, "untied", 1, 2, "yes"),
    "fsdp2-w1": (1, "untied", 2, 0, "yes"),
    "fsdp2-w3-tied": (3, "tied", 2, 0, "yes"),
    "fsdp2-hybrid-2x2-bf16": (4, "bf16", 2, 2, "yes"),
    "fsdp2-w2-critic": (2, "critic", 2, 0, "yes"),
    "fsdp1-w2-critic": (2, "critic", 1, 0, "no"),
    "fsdp2-w2-lora": (2, "lora", 2, 0, "yes"),
    "fsdp1-w2-peft-no-metadata": (2, "peft", 1, 0, "no"),
    "fsdp2-w2-peft-critic": (2, "peft-critic", 2, 0, "yes"),
}
GAD_CASES: dict[str, tuple[int, str]] = {
    "untied-w3": (3, "untied"),
    "tied-w2": (2, "tied"),
    "critic-w2": (2, "critic"),
    "bf16-w2": (2, "bf16"),
    "lora-w2": (2, "lora"),
    "untied-w1": (1, "untied"),
}


@pytest.fixture(scope="session")
def verl_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<root>/<case>/global_step_5/actor for every VERL_CASES."""
    root = tmp_path_factory.mktemp("verl")
    run_jobs(*[
        (world, VERL, root / name / "global_step_5" / "actor", kind, version, fsdp_size, metadata)
        for name, (world, kind, version, fsdp_size, metadata) in VERL_CASES.items()
    ])  # fmt: skip
    return root


@pytest.fixture(scope="session")
def gad_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<root>/<case>/global_step_3/actor|critic for every GAD_CASES."""
    root = tmp_path_factory.mktemp("gad")
    run_jobs(*[(world, GAD, root / name, kind) for name, (world, kind) in GAD_CASES.items()])
    return root
