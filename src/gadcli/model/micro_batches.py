"""Micro-batches that every rank runs equally often, so that FSDP's collectives meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gadcli.distributed.fsdp import begin_micro_batch
from gadcli.distributed.watchdog import WATCHDOG
from gadcli.distributed.world import World, max_over_ranks
from gadcli.model.packing import Group, Layout, lay_out, lay_out_padded, micro_batches


def passes(
    model: Any, groups: Sequence[Group], max_tokens: int, world: World
) -> Iterator[tuple[list[int], Layout, float]]:
    """(indices of groups, their layout on the device, weight) for each micro-batch, laid out as `model` takes them."""
    rounds = equal_micro_batches(groups, max_tokens, world, shared=model.gad_shares)
    for number, (indices, weight) in enumerate(rounds, start=1):
        WATCHDOG.beat()
        chosen = [groups[i] for i in indices]
        layout = lay_out(chosen) if model.gad_shares else lay_out_padded(chosen)
        begin_micro_batch(model, last=number == len(rounds))
        yield indices, layout.to(world.device), weight


def equal_micro_batches(
    groups: Sequence[Group], max_tokens: int, world: World, *, shared: bool = True
) -> list[tuple[list[int], float]]:
    """(indices of groups, weight) for each micro-batch; the weight is 0 for one that only keeps peers company.

    A rank whose groups fit into fewer micro-batches than a peer's cuts them into as many. With fewer groups than that
    it repeats its smallest: the loss, times 0, still runs the forward and backward collectives that peers wait for.
    `shared` tells how groups will be laid out: packed, or (False) in padded rows.
    """
    tokens = [group.n_tokens for group in groups] if shared else _padded_tokens(groups)
    batches = micro_batches(tokens, max_tokens)
    rounds = int(max_over_ranks(len(batches)))
    if len(batches) < rounds:
        finer = micro_batches(tokens, max_tokens, at_least=rounds)
        batches = finer if len(finer) <= rounds else batches  # never more rounds than peers run
    smallest = [min(range(len(groups)), key=tokens.__getitem__)]
    return [(batch, 1.0) for batch in batches] + [(smallest, 0.0)] * (rounds - len(batches))


def _padded_tokens(groups: Sequence[Group]) -> list[int]:
    """What groups take at most in padded rows: every row as long as the longest of all."""
    longest = max(len(group.prompt_ids) + max(map(len, group.answers)) for group in groups)
    return [len(group.answers) * longest for group in groups]


def balanced_share(tokens: Sequence[int], world: World, block: int) -> list[int]:
    """This rank's indices of a step's rows: as many as every rank has, and about as many tokens.

    Rows are dealt within consecutive blocks of `block` (0: all), longest first, back and forth over the ranks, so that
    a mini-batch holds the same rows at any world size. Within a block a rank keeps the rows' order.
    """
    block = block or len(tokens)
    mine: list[int] = []
    for start in range(0, len(tokens), block):
        rows = sorted(range(start, min(start + block, len(tokens))), key=lambda i: (-tokens[i], i))
        rounds = [rows[at : at + world.size] for at in range(0, len(rows), world.size)]
        dealt = [turn[::-1] if number % 2 else turn for number, turn in enumerate(rounds)]
        mine += sorted(turn[world.rank] for turn in dealt)
    return mine


def mini_batches(n_prompts: int, mini_batch_size: int, world: World) -> list[list[int]]:
    """This rank's prompts (indices) of each optimiser step; `mini_batch_size` counts prompts over all ranks, 0 all."""
    share = n_prompts if not mini_batch_size else max(1, mini_batch_size // world.size)
    return [list(range(start, min(start + share, n_prompts))) for start in range(0, n_prompts, share)]
