"""What holds for every test: one thread a process, no network, no colour (set before torch is imported); the order."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gadcli.distributed.world import World

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("NO_COLOR", "1")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup runs would inherit, and respect, that it is ignored

LONG_FILES = (
    "train/test_demo.py",
    "train/test_worlds_and_resume.py",
    "rollout/test_samplers.py",
    "data/test_mutations.py",
    "checkpoint/test_world_sizes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: begun last, one of them would run on alone while the other worker has nothing left."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG_FILES))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its data: `train.training.write_inputs`."""
    from train.training import write_inputs  # most test files need none of what it imports

    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A process group of one; the environment that it writes is put back."""
    import torch.distributed as dist

    from gadcli.config.schema import FsdpConfig
    from gadcli.distributed.world import init_world

    before = dict(os.environ)
    yield init_world("cpu", FsdpConfig())
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama on disk."""
    from tiny import write_tiny_model

    return str(write_tiny_model(tmp_path_factory.mktemp("model")))
