"""The process group, the device mesh and the few collectives that the rest of the engine needs."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gadcli.config.schema import FsdpConfig
from gadcli.distributed.cpu_matmul import choose_products
from gadcli.errors import ConfigError


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank, device and the mesh that models are sharded over."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_world(device: str, fsdp: FsdpConfig) -> World:
    """Join the process group that RANK and WORLD_SIZE describe (a group of one without them).

    CPU ranks talk over gloo; CUDA ranks over NCCL, with gloo beside it for host tensors (DCP needs both).
    Must run before any vLLM engine is made: the other way round each rank trains alone.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    kind = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                "trainer.device is cuda, but torch sees no GPU", "trainer.device=cpu, or run `gad doctor`"
            )
        local_rank = visible_device(local_rank, torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(local_rank)  # by which vLLM finds its device
        torch.cuda.set_device(local_rank)
    else:
        choose_products()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if size % fsdp.replicate:
        raise ConfigError(f"fsdp.replicate is {fsdp.replicate}, which does not divide {size} processes")
    timeout = datetime.timedelta(seconds=fsdp.timeout_s)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if size == 1:  # no sockets for a world of one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        os.environ.update(RANK="0", LOCAL_RANK=str(local_rank), WORLD_SIZE="1")  # vLLM's launcher reads them
    elif path := os.environ.get("GAD_STORE_FILE"):  # one machine: torch's TCP store listens on every interface
        dist.init_process_group(backend, store=dist.FileStore(path, size), rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    if fsdp.replicate > 1:
        mesh = init_device_mesh(kind, (fsdp.replicate, size // fsdp.replicate), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    torch_device = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    return World(rank, size, torch_device, mesh)


def visible_device(local_rank: int, devices: int) -> int:
    """The device of this machine's `local_rank`-th process: its own number, or the only one where each sees its own.

    Launchers such as SLURM's --gpus-per-task show every process one GPU, which is number 0 there.
    """
    if devices == 1:
        return 0
    if local_rank >= devices:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: {devices} are visible",
            f"trainer.nproc={devices}, or more GPUs in CUDA_VISIBLE_DEVICES",
        )
    return local_rank


def sum_over_ranks(values: Iterable[float]) -> list[float]:
    """Each value summed over all ranks, in float64, with one collective."""
    total = torch.tensor(list(values), dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def max_over_ranks(value: float) -> float:
    """The largest of a value over all ranks."""
    largest = torch.tensor([value], dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest.item())


def gather_objects(item: Any) -> list[Any]:
    """Every rank's JSON-like item, in rank order, on every rank."""
    if dist.get_world_size() == 1:
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items
