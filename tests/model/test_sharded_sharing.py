"""Sharing prompts is exact under FSDP2 on two ranks that hold different groups and unequally many micro-batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.ranks import run_jobs
from tiny import write_tiny_model


@pytest.mark.slow
def test_two_ranks_agree_with_padded_rows_for_every_family_lora_and_checkpointing(tmp_path: Path) -> None:
    for family in ("llama", "qwen2", "qwen3", "gemma3-window"):
        write_tiny_model(tmp_path / family, family)
    run_jobs((2, "model.rank_jobs:compare", tmp_path))
