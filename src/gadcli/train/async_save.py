"""Saving off the critical path: the state is copied to host memory, a thread writes and commits, training goes on.

One save at a time. The thread's collectives run over a process group of their own, so that they cannot meet those of
training; its outcome is taken by all ranks in the same step, so that a full disk ends them together.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from gadcli.distributed.together import collectives_over
from gadcli.distributed.world import max_over_ranks


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint; `blocked_s` of its `seconds` training stood still."""

    path: Path
    step: int
    seconds: float
    blocked_s: float


@dataclass
class BackgroundSaver:
    """Runs one save at a time in a thread. Every method is collective; all of it belongs to the main thread."""

    timeout_s: float = 600.0
    _group: Any = None
    _thread: threading.Thread | None = None
    _step: int = 0
    _blocked_s: float = 0.0
    _started: float = 0.0
    _ended: float = 0.0
    _outcome: list[Path | BaseException] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        """Whether a save is under way, or done and not yet taken."""
        return self._thread is not None

    def begin(self, step: int, work: Callable[[], Path], blocked_s: float) -> None:
        """Start `work`, whose only collectives are `together` and `on_rank0`; the last one must have been taken."""
        assert self._thread is None, "a save is under way"
        if dist.get_world_size() > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=self.timeout_s))
        self._step, self._blocked_s, self._outcome = step, blocked_s, []
        self._started = time.monotonic() - blocked_s
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True, name="saver")
        self._thread.start()

    def _run(self, work: Callable[[], Path]) -> None:
        try:
            with collectives_over(self._group):
                self._outcome.append(work())
        except BaseException as error:  # noqa: BLE001  carried to the main thread, which raises it
            self._outcome.append(error)
        self._ended = time.monotonic()

    def take(self, *, wait: bool) -> Saved | None:
        """The finished save, once all ranks have finished it (with `wait`: when they have); raises what it raised."""
        thread = self._thread
        if thread is None:
            return None
        if not wait and max_over_ranks(float(thread.is_alive())) > 0:
            return None
        began = time.monotonic()
        thread.join()
        self._thread = None
        (outcome,) = self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        waited = time.monotonic() - began
        return Saved(outcome, self._step, self._ended - self._started, self._blocked_s + waited)

    def let_finish(self, within_s: float) -> None:
        """Before a failing process ends: give a save under way some time to commit. Not collective."""
        if self._thread is not None:
            self._thread.join(within_s)


_host_meshes: dict[DeviceMesh, DeviceMesh] = {}


def host_copy(tree: Any) -> Any:
    """Every tensor of a state dict copied into host memory; DTensors stay sharded as they are. Collective."""
    if isinstance(tree, DTensor):
        local = tree.to_local().detach().to("cpu", copy=True)
        mesh = _host_mesh(tree.device_mesh)
        return DTensor.from_local(
            local, mesh, tree.placements, run_check=False, shape=tree.shape, stride=tree.stride()
        )  # fmt: skip
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: host_copy(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [host_copy(value) for value in tree]
    return tree


def _host_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same mesh over the ranks' host memory: a DTensor on a GPU mesh would take its copy back to the GPU."""
    if mesh.device_type == "cpu":
        return mesh
    if mesh not in _host_meshes:
        _host_meshes[mesh] = init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=mesh.mesh_dim_names)
    return _host_meshes[mesh]
