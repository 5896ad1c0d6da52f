"""Saving while training goes on: what is written is the moment's state, errors come out, one save at a time.

Pinned here: values changed after `begin` are not in the checkpoint (and would be without the copy) · a full disk is
raised by `take`, the commit before intact · at two ranks the thread's collectives do not meet training's, the
checkpoint equals that moment bit for bit, and one rank's failure is raised on both in the same step.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoint.ranks import run_jobs
from checkpoint.saving import save, write_config
from gadcli.checkpoint.manifest import latest_valid
from gadcli.errors import ResourceError
from gadcli.train.async_save import BackgroundSaver, host_copy
from gadcli.train.checkpoint import load_checkpoint, save_checkpoint
from gadcli.train.saving import saves_in_background


@pytest.fixture(autouse=True)
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def begin(saver: BackgroundSaver, run_dir: Path, states: dict, gate: threading.Event, error: OSError | None = None):
    """A save of step 2 that waits at the gate before it has written the first tensor's neighbours."""

    def assets(folder: Path) -> None:
        if error is not None:
            raise error
        write_config(folder)

    def work() -> Path:
        assert gate.wait(20)
        return save_checkpoint(run_dir, 2, stage="gad", config_hash="c", models=states, optims={}, trainer={}, rng={},
                               assets={"actor": assets}, metrics={})  # fmt: skip

    saver.begin(2, work, 0.0)


@pytest.mark.parametrize(("copy", "expected"), [(host_copy, 1.0), (lambda states: states, 9.0)])
def test_what_is_written_is_the_state_at_the_beginning(tmp_path: Path, copy, expected: float) -> None:
    weight = torch.ones(6)
    gate, saver = threading.Event(), BackgroundSaver()
    begin(saver, tmp_path, copy({"actor": {"w": weight}}), gate)
    assert saver.busy and saver.take(wait=False) is None
    weight.fill_(9.0)  # training goes on; without a copy this would be saved (the second case shows it)
    gate.set()
    saved = saver.take(wait=True)
    assert saved is not None and saved.step == 2 and not saver.busy and saver.take(wait=True) is None
    loaded = {"w": torch.zeros(6)}
    load_checkpoint(tmp_path / "global_step_2", "actor", {"model": loaded})
    assert loaded["w"].tolist() == [expected] * 6


def test_a_disk_that_fills_in_the_background_is_raised_and_loses_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    gate, saver = threading.Event(), BackgroundSaver()
    begin(saver, tmp_path, {"actor": {"w": torch.ones(6)}}, gate, OSError(28, "No space left on device"))
    gate.set()
    with pytest.raises(ResourceError, match="disk full while saving"):
        saver.take(wait=True)
    assert not saver.busy
    assert latest_valid(tmp_path, pytest.fail) == tmp_path / "global_step_1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_1", "latest"]


def test_a_second_save_before_the_first_was_taken_is_a_bug(tmp_path: Path) -> None:
    gate, saver = threading.Event(), BackgroundSaver()
    begin(saver, tmp_path, {"actor": {"w": torch.ones(6)}}, gate)
    with pytest.raises(AssertionError, match="under way"):
        saver.begin(3, functools.partial(Path, "x"), 0.0)
    gate.set()
    saver.take(wait=True)


def test_two_ranks_train_on_while_theirs_is_written(tmp_path: Path) -> None:
    run_jobs(
        (2, "checkpoint.rank_jobs:background_save_after", tmp_path / "two", 4, 3),
        (2, "checkpoint.rank_jobs:load_and_compare", tmp_path / "two/global_step_4", 3),
        (2, "checkpoint.rank_jobs:background_failure_reaches_all", tmp_path / "none"),
    )


def test_gpus_save_in_the_background_and_cpus_when_asked() -> None:
    assert saves_in_background("auto", "cuda") and not saves_in_background("auto", "cpu")
    assert saves_in_background("always", "cpu") and not saves_in_background("never", "cuda")
