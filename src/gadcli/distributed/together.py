"""Steps that ranks take together: one rank's failure is raised on all of them, and nobody waits for the dead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from gadcli.errors import CheckpointError, ConfigError, GadError, ResourceError

T = TypeVar("T")
# What a save can end with on one rank; CheckpointException is DCP's, and no Exception by inheritance. safetensors has
# one kind for everything, a full disk too.
FAILURES = (
    GadError, OSError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, SafetensorError,
    CheckpointException,
)  # fmt: skip


# The group that this thread's collectives run over; None is the default group, which training uses.
_group: ContextVar[Any] = ContextVar("group", default=None)


@contextmanager
def collectives_over(group: Any) -> Iterator[None]:
    """Within, this thread works together over `group` (of all ranks): two threads must not share one."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def current_group() -> Any:
    """The process group of this thread's collectives, for those who call torch's own; None is the default group."""
    return _group.get()


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def together(work: Callable[[], T]) -> list[T]:
    """Runs `work` on every rank and gathers the results everywhere; if it raises on one rank, all raise that error."""
    result: T | None = None
    failure: BaseException | None = None
    try:
        result = work()
    except FAILURES as error:
        failure = error
    _, world = rank_and_world()
    if world == 1:
        if failure is not None:
            raise failure
        return [result]  # type: ignore[list-item]
    # Exceptions travel as the few plain values that rebuild them; anything else might not pickle.
    packed = None if failure is None else _pack(failure)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, (packed, result), group=current_group())
    first = next((p for p, _ in gathered if p is not None), None)
    if failure is not None:
        raise failure
    if first is not None:
        raise _unpack(first)
    return [r for _, r in gathered]


def _pack(error: BaseException) -> tuple[str, str, str | None, int | None]:
    if isinstance(error, GadError):
        return type(error).__name__, error.message, error.hint, None
    return "OSError" if isinstance(error, OSError) else "other", str(error), None, getattr(error, "errno", None)


def _unpack(packed: tuple[str, str, str | None, int | None]) -> BaseException:
    kind, message, hint, number = packed
    if kind == "OSError":
        return OSError(number, f"another rank: {message}")
    kinds: dict[str, type[GadError]] = {c.__name__: c for c in (CheckpointError, ConfigError, ResourceError)}
    return kinds[kind](message, hint) if kind in kinds else RuntimeError(f"another rank: {message}")


def on_rank0(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 only and hands its result to all; its error is raised everywhere."""
    rank, _ = rank_and_world()
    return together(lambda: work() if rank == 0 else None)[0]  # type: ignore[return-value]
