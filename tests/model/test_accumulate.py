"""How a step's rows are dealt to ranks and cut: equal counts, like sums, the same mini-batches at any world size."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from gadcli.model.micro_batches import balanced_share, mini_batches
from mutants import mutated


def world(rank: int, size: int) -> Any:
    return SimpleNamespace(rank=rank, size=size)


def shares(tokens: list[int], size: int, block: int, share: Any = balanced_share) -> list[list[int]]:
    return [share(tokens, world(rank, size), block) for rank in range(size)]


def test_every_row_goes_to_one_rank_and_all_ranks_get_as_many() -> None:
    tokens = random.Random(0).choices(range(10, 500), k=64)
    dealt = shares(tokens, 8, 0)
    assert sorted(i for share in dealt for i in share) == list(range(64))
    assert {len(share) for share in dealt} == {8}


def imbalance(tokens: list[int], dealt: list[list[int]]) -> float:
    sums = [sum(tokens[i] for i in share) for share in dealt]
    return max(sums) / min(sums)


def test_ranks_get_like_many_tokens_where_every_wth_row_would_not() -> None:
    for seed in range(20):
        tokens = random.Random(seed).choices(range(10, 500), k=64)
        assert imbalance(tokens, shares(tokens, 8, 0)) < 1.1
    tokens = random.Random(1).choices(range(10, 500), k=64)
    assert imbalance(tokens, [list(range(rank, 64, 8)) for rank in range(8)]) > 1.3
    one_way = mutated("model.micro_batches", "turn[::-1] if number % 2 else turn", "turn").balanced_share
    assert imbalance(tokens, shares(tokens, 8, 0, one_way)) > 1.1  # the first rank always gets the longer one


def test_mini_batches_hold_the_same_rows_at_any_world_size() -> None:
    tokens = random.Random(3).choices(range(10, 500), k=16)
    by_world = []
    for size in (1, 2, 4):
        dealt = shares(tokens, size, 8)
        steps: list[set[int]] = [set(), set()]
        for rank, share in enumerate(dealt):
            for step, chosen in enumerate(mini_batches(len(share), 8, world(rank, size))):
                steps[step] |= {share[i] for i in chosen}
        by_world.append(steps)
    assert by_world[0] == by_world[1] == by_world[2] == [set(range(8)), set(range(8, 16))]


def test_one_rank_keeps_the_rows_in_their_order() -> None:
    assert shares([5, 9, 1, 7], 1, 0) == [[0, 1, 2, 3]]
