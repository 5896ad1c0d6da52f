"""What ranks of test_same_machine run: shared memory against gloo, on awkward sizes and with dawdling ranks."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from distributed.gather_jobs import counted
from gadcli.config.schema import FsdpConfig, ModelConfig
from gadcli.distributed.shm_collectives import Exchange
from gadcli.model.loading import load_actor, shard
from model.parts import worst_relative
from model.rank_jobs import step, world_of_all

PIECE = 960  # bytes: sizes below, at and above it are all small
SIZES = (0, 1, 7, 120, 240, 241, 479, 480, 481, 2000)


def group_of_all() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def exchange() -> Exchange:
    found = Exchange.between(group_of_all(), PIECE)
    assert found is not None
    return found


def drawn(size: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * size + rank)).to(dtype)


def agrees_with_gloo() -> None:
    own, size, rank = exchange(), dist.get_world_size(), dist.get_rank()
    for numel in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            mine = drawn(numel, rank, dtype)
            gathered = torch.full((size * numel,), torch.nan, dtype=dtype)
            own.all_gather(gathered, mine)
            expected = torch.cat([drawn(numel, peer, dtype) for peer in range(size)])
            assert torch.equal(gathered, expected), (numel, dtype)
        whole = drawn(size * numel, rank, torch.float32)
        for average in (False, True):
            ours, gloos = torch.full((numel,), torch.nan), torch.full((numel,), torch.nan)
            own.reduce_scatter(ours, whole, average=average)
            if numel:
                dist.reduce_scatter_tensor(gloos, whole, op=dist.ReduceOp.AVG if average else dist.ReduceOp.SUM)
            assert torch.allclose(ours, gloos, rtol=1e-6, atol=1e-6), (numel, average)


def waits_for_the_slow() -> None:
    """Every rank dawdles at random, before it writes and before it reads; whoever does not wait reads another turn."""
    own, size, rank = exchange(), dist.get_world_size(), dist.get_rank()
    draw = random.Random(rank)
    real = own._meet

    def dawdle() -> None:
        time.sleep(draw.choice((0, 0, 0.003)))
        real()
        time.sleep(draw.choice((0, 0, 0.003)))

    with mock.patch.object(own, "_meet", dawdle):
        for turn in range(60):
            gathered = torch.zeros(size * 500)
            own.all_gather(gathered, torch.full((500,), float(100 * turn + rank)))
            expected = torch.tensor([100.0 * turn + peer for peer in range(size)]).repeat_interleave(500)
            assert torch.equal(gathered, expected), turn
            total = torch.zeros(500)
            own.reduce_scatter(total, torch.full((size * 500,), float(turn + rank)), average=False)
            assert torch.equal(total, torch.full((500,), float(size * turn + sum(range(size))))), turn


def one_half() -> None:
    """A mutant: with a single half, a fast rank overwrites what a slow one has yet to read."""
    with mock.patch.object(Exchange, "_next_half", lambda self: self.halves[0]):
        waits_for_the_slow()


def refuses_strangers() -> None:
    """Where one rank cannot open the memory, or opens something else, none uses it."""
    real = os.open

    def unable(path: Any, *rest: Any) -> int:
        if str(path).startswith("/proc/") and "/fd/" in str(path):
            raise FileNotFoundError(path)
        return real(path, *rest)

    def other(path: Any, *rest: Any) -> int:
        if str(path).startswith("/proc/") and "/fd/" in str(path):
            return os.memfd_create("another")
        return real(path, *rest)

    for wrong in (unable, other):
        with mock.patch.object(os, "open", wrong if dist.get_rank() == 1 else real):
            assert Exchange.between(group_of_all(), PIECE) is None
    with mock.patch.object(os, "memfd_create", side_effect=PermissionError("a sandbox")):
        assert Exchange.between(group_of_all(), PIECE) is None


def keeps_copies_apart() -> None:
    """Hybrid sharding: each copy's ranks exchange among themselves."""
    world = world_of_all(replicate=2)
    own = Exchange.between(world.mesh.get_group("shard"), PIECE)
    assert own is not None and own.size == 2
    gathered = torch.zeros(2 * 300)
    own.all_gather(gathered, torch.full((300,), float(world.rank)))
    first = world.rank // 2 * 2
    assert torch.equal(gathered, torch.tensor([first, first + 1.0]).repeat_interleave(300))


def trains_alike(path: str) -> None:
    """A sharded model's gradients are those that gloo brings, and gloo brings nothing."""
    plain, found = world_of_all(), []
    shared = dataclasses.replace(plain, exchange=exchange())
    for world in (plain, shared):
        model: Any = shard(load_actor(path, ModelConfig()), world, FsdpConfig(gather="micro_batch"), "float32")
        with counted() as traffic:
            found.append(step(model, world))
        assert bool(traffic) == (world is plain)
    (logp, gradient), (own_logp, own_gradient) = found
    assert torch.equal(own_logp, logp)
    assert worst_relative(own_gradient, gradient) < 1e-6
