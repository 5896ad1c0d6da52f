"""What CPU ranks of one machine tell each other in bulk goes through shared memory instead of loopback sockets.

gloo moves FSDP2's weights and gradients over TCP at about .4 GB/s a rank where both cores compute. Here each rank
copies a piece into its slot of a mapping that all ranks hold, they meet (a gloo barrier, so that timeouts and lost
peers stay gloo's), and each reads what it needs. Sums are taken in rank order on every rank.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

PIECE = 4 * 2**20  # bytes a rank shows at once: small enough for a processor's cache
TOKEN = 32
AVERAGED_OR_SUMMED = (dist.ReduceOp.AVG, dist.ReduceOp.SUM)


class Exchange:
    """Slots in shared memory for the ranks of a group; every method is collective within it."""

    def __init__(self, group: dist.ProcessGroup, memory: mmap.mmap, piece: int) -> None:
        self.group, self.rank, self.size, self.piece = group, group.rank(), group.size(), piece
        slots = torch.frombuffer(memory, dtype=torch.uint8, offset=TOKEN, count=2 * self.size * piece)
        self.halves = slots.view(2, self.size, piece)
        self.turn = 0

    @staticmethod
    def between(group: dist.ProcessGroup, piece: int = PIECE) -> Exchange | None:
        """An exchange between the ranks of a group, or None (on all of them) where one cannot reach the memory.

        The first rank's memory has no name: the others open it through /proc, which only processes of the same user in
        the same PID namespace can, and nothing is left behind by whoever is killed.
        """
        size = TOKEN + 2 * group.size() * piece
        first = dist.get_global_rank(group, 0)
        token = secrets.token_bytes(TOKEN)
        fd = _unnamed(size, token) if group.rank() == 0 else -1
        told: list[Any] = [(os.getpid(), fd, token)]
        dist.broadcast_object_list(told, src=first, group=group)
        pid, number, token = told[0]
        memory = _opened(pid, number, token, size, fd)
        reached = torch.tensor([memory is not None], dtype=torch.int32)
        dist.all_reduce(reached, op=dist.ReduceOp.MIN, group=group)  # also: nobody closes before all have opened
        if fd >= 0:
            os.close(fd)
        return Exchange(group, memory, piece) if memory is not None and reached.item() else None

    def all_gather(self, output: Tensor, own: Tensor) -> None:
        """`output` [W * n] from every rank's `own` [n], in rank order."""
        shown = own.view(torch.uint8)
        into = output.view(torch.uint8).view(self.size, -1)
        for start in range(0, len(shown), self.piece):
            part = slice(start, min(start + self.piece, len(shown)))
            length = part.stop - part.start
            slots = self._next_half()[:, :length]
            slots[self.rank].copy_(shown[part])
            self._meet()
            into[:, part].copy_(slots)

    def reduce_scatter(self, output: Tensor, whole: Tensor, *, average: bool) -> None:
        """`output` [n]: this rank's part of the sum (or mean) over ranks of `whole` [W * n]."""
        parts = whole.view(self.size, -1)
        at_once = self.piece // whole.element_size() // self.size
        for start in range(0, len(output), at_once):
            mine = output[start : start + at_once]
            length = len(mine)
            slots = self._next_half().view(whole.dtype)[:, : self.size * length].view(self.size, self.size, length)
            slots[self.rank].copy_(parts[:, start : start + length])
            self._meet()
            mine.copy_(slots[0, self.rank])
            for peer in range(1, self.size):
                mine.add_(slots[peer, self.rank])
        if average:
            output.div_(self.size)

    def _next_half(self) -> Tensor:
        """Halves take turns: who writes one has met its peers since they read it, at the turn of the other."""
        self.turn += 1
        return self.halves[self.turn % 2]

    def _meet(self) -> None:
        dist.barrier(self.group)


def _unnamed(size: int, token: bytes) -> int:
    """A file descriptor of new memory that begins with `token`; -1 where the system gives none (a sandbox may not)."""
    try:
        fd = os.memfd_create("gad-exchange", os.MFD_CLOEXEC)
    except OSError:
        return -1
    os.ftruncate(fd, size)  # reserves nothing: pages come as they are written
    os.pwrite(fd, token, 0)
    return fd


def _opened(pid: int, number: int, token: bytes, size: int, own: int) -> mmap.mmap | None:
    """The first rank's memory, if this process can open it and it is the one that was meant."""
    try:
        fd = os.dup(own) if own >= 0 else os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
    except OSError:
        return None
    try:
        if os.fstat(fd).st_size != size or os.pread(fd, TOKEN, 0) != token:
            return None
        return mmap.mmap(fd, size)
    except OSError:
        return None
    finally:
        os.close(fd)


def use_exchange(model: Any, exchange: Exchange) -> None:
    """Let a sharded model's weights and gradients go that way; `exchange` is between the ranks it is sharded over."""
    gather: Any = _Gather(exchange)
    scatter: Any = _Scatter(exchange)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(scatter)


class _Allocating:
    """What FSDP2 asks of a collective beside itself: memory for it."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Allocating):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        self.exchange.all_gather(output_tensor, input_tensor)


class _Scatter(_Allocating):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        if op not in AVERAGED_OR_SUMMED:
            raise AssertionError(f"gradients are averaged or summed, not {op}")
        self.exchange.reduce_scatter(output_tensor, input_tensor, average=op == dist.ReduceOp.AVG)
