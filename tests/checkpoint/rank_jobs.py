"""What the ranks of the checkpoint tests run: a small FSDP2 model trained, saved, loaded, compared."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from gadcli.errors import CheckpointError, ResourceError
from gadcli.train.async_save import BackgroundSaver, host_copy
from gadcli.train.checkpoint import load_checkpoint, load_rng, save_checkpoint


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two linear layers; 5 rows and a [1, 6] head, so that chunks are uneven and one rank holds an empty one."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 1))
    if dist.is_initialized():
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optim: torch.optim.Optimizer, steps: int) -> None:
    """The same inputs on every rank, so that the averaged gradient does not depend on the world size."""
    for step in range(steps):
        optim.zero_grad()
        inputs = torch.linspace(-1, 1, 12).view(2, 6) * (step + 1)
        model(inputs).square().mean().backward()
        optim.step()


def full(state: dict) -> dict[str, torch.Tensor]:
    """Whole tensors of a flat state dict of DTensors or tensors."""
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for k, v in state.items()}


def save_after(run_dir: str, step: str, steps: str) -> None:
    model, optim = build(0)
    train(model, optim, int(steps))
    save_checkpoint(
        Path(run_dir), int(step), stage="gad", config_hash="c0ffee", models={"actor": model.state_dict()},
        optims={"actor": get_optimizer_state_dict(model, optim)}, trainer={"step": int(step), "epoch": 0},
        rng={"cpu": torch.get_rng_state()}, assets={"actor": write_config}, metrics={"val/rouge_l": 0.5},
    )  # fmt: skip


def write_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "test"}')


def load_and_compare(path: str, steps: str) -> None:
    """Loads into another initialisation; the weights and moments equal those of a plain, unsharded run of `steps`."""
    model, optim = build(1)
    train(model, optim, 1)  # so that the optimiser has its moments to load into
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optim)}
    load_checkpoint(Path(path), "actor", state)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optim, state["optim"])
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 1))
    reference_optim = torch.optim.AdamW(reference.parameters(), lr=0.1)
    train(reference, reference_optim, int(steps))
    for key, value in full(model.state_dict()).items():
        torch.testing.assert_close(value, reference.state_dict()[key], rtol=1e-6, atol=1e-6)
    wanted = get_optimizer_state_dict(reference, reference_optim)["state"]
    for key, moments in get_optimizer_state_dict(model, optim)["state"].items():
        for name, value in full(moments).items():
            torch.testing.assert_close(value, wanted[key][name], rtol=1e-6, atol=1e-6)


def rng_is_mine(path: str, same_world: str) -> None:
    loaded = load_rng(Path(path))
    assert (loaded is not None) == (same_world == "yes")


def second_save_is_refused(run_dir: str, step: str) -> None:
    with pytest.raises(CheckpointError, match="never overwritten"):
        save_after(run_dir, step, "1")


def one_rank_fails(run_dir: str) -> None:
    """Rank 1's generator state is no tensor: both ranks must raise, and nothing may be committed."""
    model, _ = build(0)
    broken = {"cpu": torch.get_rng_state()} if dist.get_rank() == 0 else {"cpu": None}
    with pytest.raises((RuntimeError, AttributeError)):
        save_checkpoint(
            Path(run_dir), 1, stage="gad", config_hash="", models={"actor": model.state_dict()}, optims={}, trainer={},
            rng=broken, assets={}, metrics=None,
        )  # fmt: skip


def background_save_after(run_dir: str, step: str, steps: str) -> None:
    """Begin a save after `steps` and train on while it is written: the thread's collectives and training's mingle."""
    model, optim = build(0)
    train(model, optim, int(steps))
    states = {"models": {"actor": model.state_dict()}, "optims": {"actor": get_optimizer_state_dict(model, optim)}}
    saver = BackgroundSaver(timeout_s=60)
    work = functools.partial(
        save_checkpoint, Path(run_dir), int(step), stage="gad", config_hash="c0ffee", trainer={"step": int(step)},
        rng={"cpu": torch.get_rng_state()}, assets={"actor": write_config}, metrics={}, **host_copy(states),
    )  # fmt: skip
    saver.begin(int(step), work, 0.0)
    train(model, optim, 4)
    saved = saver.take(wait=True)
    assert saved is not None and saved.path.name == f"global_step_{step}" and not saver.busy


def background_failure_reaches_all(run_dir: str) -> None:
    """One rank's disk fails in the background: both ranks raise it from the same `take`, none hangs."""

    def fails(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    model, optim = build(0)
    train(model, optim, 1)
    saver = BackgroundSaver(timeout_s=60)
    saver.begin(
        1,
        lambda: save_checkpoint(
            Path(run_dir), 1, stage="gad", config_hash="c", models=host_copy({"actor": model.state_dict()}), optims={},
            trainer={}, rng={}, assets={"actor": fails}, metrics={},
        ),
        0.0,
    )  # fmt: skip

    def train_until_taken() -> None:
        while saver.take(wait=False) is None:
            train(model, optim, 1)

    with pytest.raises(ResourceError, match="disk full while saving"):
        train_until_taken()
    assert not list(Path(run_dir).iterdir())
