"""CPU ranks of one machine exchange weights and gradients in shared memory: what gloo would bring, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.ranks import run_jobs
from tiny import write_tiny_model


@pytest.mark.slow
def test_two_and_three_ranks_get_what_gloo_brings(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "llama")
    jobs = ("agrees_with_gloo", "waits_for_the_slow")
    run_jobs(
        *((world, f"distributed.exchange_jobs:{job}") for world in (2, 3) for job in jobs),
        (2, "distributed.exchange_jobs:refuses_strangers"),
        (4, "distributed.exchange_jobs:keeps_copies_apart"),
        (2, "distributed.exchange_jobs:trains_alike", tmp_path / "model"),
    )


@pytest.mark.slow
def test_memory_that_is_written_over_before_all_have_read_it_would_be_caught() -> None:
    with pytest.raises(AssertionError, match=r"assert torch.equal\((gathered|total)"):
        run_jobs((2, "distributed.exchange_jobs:one_half"))
