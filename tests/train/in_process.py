"""The real loop on a tiny model in the test's own process, which is left as it was found."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from gadcli.config.resolve import load_resolved
from gadcli.rollout.weight_sync import full_tensors
from gadcli.train.build import build_run, close_run
from gadcli.train.loop import finish
from gadcli.train.run import Run
from gadcli.train.stages import train_adversarial
from train.training import prepare

SETTINGS = ["trainer.total_steps=3", "trainer.critic_warmup=0", "trainer.test_freq=1", "trainer.save_freq=1",
            "data.train_batch_size=2", "rollout.n=2", "trainer.device=cpu"]  # fmt: skip


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """A run sets signal handlers, variables and a process group."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    handlers, variables = {n: signal.getsignal(n) for n in numbers}, dict(os.environ)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(variables)


def begin(run_dir: Path, inputs: Path, *overrides: str, stage: str = "gad") -> Run:
    prepare(run_dir, inputs, stage, *SETTINGS, *overrides)
    return build_run(load_resolved(run_dir / "config.yaml"), run_dir, resume_from=None)


def to_the_end(run: Run) -> None:
    train_adversarial(run)
    finish(run)
    run.records.end(0, "done")
    close_run(run)


def tensors_of(run: Run) -> dict[str, Tensor]:
    """Every model's weights by role and name, whole (collective)."""
    roles = {"actor": run.actor.model} | ({"critic": run.critic.model} if run.maybe_critic is not None else {})
    return {f"{role}/{name}": value for role, model in roles.items() for name, value in full_tensors(model)}


def send_in(run: Run, phase: str, number: int, time: int = 1) -> None:
    """The signal arrives as `phase` begins in step 2, for the `time`-th time."""
    tell = run.on_phase
    seen: list[str] = []

    def on_phase(name: str, step: int) -> None:
        tell(name, step)
        if (name, step) == (phase, 2):
            seen.append(name)
            if len(seen) == time:
                os.kill(os.getpid(), number)

    run.on_phase = on_phase  # type: ignore[method-assign]
