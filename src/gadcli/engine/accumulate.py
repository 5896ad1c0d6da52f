"""Micro-batches that every rank runs equally often, so that FSDP's collectives meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gadcli.engine.dist import World, max_over_ranks
from gadcli.engine.layout import Group, micro_batches
from gadcli.engine.watchdog import WATCHDOG


def equal_micro_batches(groups: Sequence[Group], max_tokens: int, world: World) -> Iterator[tuple[list[int], float]]:
    """(indices of groups, weight) for each micro-batch; the weight is 0 for one that only keeps peers company.

    A rank with fewer micro-batches than its peers repeats its last one: its loss, times 0, still runs the forward
    and backward collectives that the peers wait for.
    """
    batches = list(micro_batches(groups, max_tokens))
    rounds = int(max_over_ranks(len(batches)))
    for index in range(rounds):
        WATCHDOG.beat()
        real = index < len(batches)
        yield batches[index if real else -1], 1.0 if real else 0.0


def mini_batches(n_prompts: int, mini_batch_size: int, world: World) -> list[list[int]]:
    """This rank's prompts (indices) of each optimiser step; `mini_batch_size` counts prompts over all ranks, 0 all."""
    share = n_prompts if not mini_batch_size else max(1, mini_batch_size // world.size)
    return [list(range(start, min(start + share, n_prompts))) for start in range(0, n_prompts, share)]
