"""A world of one process for the engine's tests, left as it was found."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from gadcli.config.schema import FsdpConfig
from gadcli.engine.dist import World, init_world
from tiny import write_tiny_model


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A process group of one; the environment that it writes is put back."""
    before = dict(os.environ)
    yield init_world("cpu", FsdpConfig())
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama on disk."""
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))
