"""Weights gathered and gradients reduced once a step (`fsdp.gather=step`): the same gradients, less traffic."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.ranks import run_jobs
from gadcli.config.memory import GATHER_ONCE_BYTES, gathers_once
from tiny import write_tiny_model


@pytest.mark.slow
def test_the_same_gradients_with_fewer_collectives_on_two_ranks(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "llama")
    jobs = ("compare", "penalise", "replicate", "frees_weights")
    run_jobs(*((2, f"distributed.gather_jobs:{job}", tmp_path / "model") for job in jobs))


def test_auto_gathers_once_where_it_costs_little() -> None:
    most = GATHER_ONCE_BYTES // 8  # bytes of a float32 weight and its gradient
    assert gathers_once("auto", 2, most, most, 4)
    assert not gathers_once("auto", 2, most + 1, most + 1, 4)
    assert gathers_once("auto", 2, 2 * most, 0, 4)  # frozen: no gradients
    assert gathers_once("step", 2, 10 * most, 10 * most, 4)
    assert not gathers_once("micro_batch", 2, 1, 1, 4)
    assert gathers_once("auto", 1, 10 * most, 10 * most, 4)  # a world of one holds all of them anyway
