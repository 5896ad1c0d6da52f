"""What ranks of test_sharded_sharing run: gradients of a sharded model through packed and through padded rows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from gadcli.config.schema import FsdpConfig, LoraConfig, ModelConfig
from gadcli.distributed.fsdp import shard
from gadcli.distributed.world import World
from gadcli.model.loading import load_actor
from gadcli.model.micro_batches import passes
from gadcli.model.packing import Group

TOLERANCE = 2e-5


def world_of_all(replicate: int = 1) -> World:
    """All ranks of the process group, models sharded within each of `replicate` copies."""
    size = dist.get_world_size()
    sizes, names = ((replicate, size // replicate), ("replicate", "shard")) if replicate > 1 else ((size,), ("shard",))
    return World(dist.get_rank(), size, torch.device("cpu"), init_device_mesh("cpu", sizes, mesh_dim_names=names))


def compare(folder: str) -> None:
    """Every model in `folder`, full and LoRA, with and without gradient checkpointing; ranks hold different groups."""
    world = world_of_all()
    for path, lora, checkpointing in itertools.product(sorted(Path(folder).iterdir()), (0, 4), (False, True)):
        cfg = ModelConfig(lora=LoraConfig(rank=lora), gradient_checkpointing=checkpointing)
        loaded: Any = load_actor(str(path), cfg)
        torch.manual_seed(0)
        for name, p in loaded.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide LoRA altogether
                torch.nn.init.normal_(p, std=0.1)
        model = shard(loaded, world, FsdpConfig(), "float32")
        found = []
        for shares in (True, False):
            model.gad_shares = shares
            found.append(step(model, world))
        (packed, packed_grad), (alone, alone_grad) = found
        assert packed_grad.keys() == alone_grad.keys()
        what = f"{path.name}, lora {lora}, checkpointing {checkpointing}"
        assert float((packed - alone).abs().max()) < TOLERANCE, what
        for name, gradient in packed_grad.items():
            assert (gradient - alone_grad[name]).norm() <= TOLERANCE * alone_grad[name].norm().clamp(min=1e-9), (
                what,
                name,
            )
        assert any(float(gradient.norm()) > 0 for gradient in packed_grad.values()), what


def step(model: Any, world: World) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(this rank's log-probs in (group, answer) order, all gradients), one micro-batch a group or so."""
    draw = torch.Generator().manual_seed(world.rank)
    ids = lambda n: torch.randint(2, 250, (n,), generator=draw).tolist()  # noqa: E731
    groups = [Group(ids(9 - i), [ids(5), ids(1 + i), ids(3)]) for i in range(2 + 2 * world.rank)]
    logps: list[list[torch.Tensor]] = [[] for _ in groups]
    for indices, layout, weight in passes(model, groups, 40, world):
        logp_N, entropy_N = model.answer_logprobs(layout, 0.8)
        ((logp_N.square().sum() + 0.1 * entropy_N.sum()) * weight).backward()
        if weight:
            answers = iter(torch.split(logp_N.detach(), layout.lengths))
            for index in indices:
                logps[index] = [next(answers) for _ in groups[index].answers]
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return torch.cat([logp for group in logps for logp in group]), gradients
