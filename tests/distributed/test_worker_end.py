"""How a worker's end becomes an exit code, a record and words, whatever the end is.

Pinned here: the number of a signal becomes 128 + it · memory in any of its spellings is 6 and names the knob · a full
disk is 6 though even the record finds no room, and a success that cannot be recorded is none · a taken port is named ·
what goes wrong is also told to whoever started the ranks.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gadcli.distributed.worker_end import LAUNCHER_STDERR_VARIABLE, as_peer_error, guarded
from gadcli.distributed.world import visible_device
from gadcli.errors import ConfigError, DataError


def record_of(run_dir: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((run_dir / "logs" / "rank_0.exit.json").read_text())
    return record


@pytest.mark.parametrize(("number", "code"), [(0, 0), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_worker_that_a_signal_stopped_ends_with_128_and_its_number(number: int, code: int, tmp_path: Path) -> None:
    assert guarded(tmp_path, lambda: number) == code == record_of(tmp_path)["code"]


def test_a_success_that_cannot_be_recorded_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert guarded(tmp_path / "file", lambda: 0) == 6  # logs/ cannot be made below a file


def test_a_users_error_keeps_its_kind_code_and_hint_and_reaches_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> int:
        raise DataError("row 7 cannot be read", "look at it")

    reading, writing = os.pipe()
    monkeypatch.setenv(LAUNCHER_STDERR_VARIABLE, str(writing))
    assert guarded(tmp_path, fails) == 3
    assert record_of(tmp_path) == {
        "code": 3, "kind": "DataError", "message": "row 7 cannot be read", "hint": "look at it",
    }  # fmt: skip
    os.close(writing)
    with open(reading) as told:
        assert told.read() == "gad: rank 0: error: row 7 cannot be read\nhint: look at it\n"


def test_an_exit_from_inside_is_recorded_too(tmp_path: Path) -> None:
    def fails() -> int:
        raise SystemExit(0)  # a user's reward function may do so

    assert guarded(tmp_path, fails) == 1 and "SystemExit" in str(record_of(tmp_path)["message"])


def test_a_port_that_is_taken_is_named_and_is_no_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's own error for a port on which something listens."""
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(first.port))
    with pytest.raises(dist.DistError) as caught:
        dist.TCPStore("127.0.0.1", first.port, is_master=True, wait_for_workers=False)
    told = as_peer_error(caught.value)
    assert told is not None and told.exit_code == 2
    assert f"MASTER_PORT={first.port}" in told.message


def too_large() -> int:
    torch.empty(2**50)  # a petabyte of float32: torch's own message


def plain() -> int:
    raise MemoryError  # python's, which has no text


def no_cache() -> int:
    raise ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when …")


def no_share() -> int:
    raise ValueError(
        "Free memory on device cuda:0 (1.2/79.6 GiB) on startup is less than desired GPU memory utilization …"
    )


def cuda() -> int:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")


def cuda_driver() -> int:
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported …")


def cublas() -> int:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def nccl() -> int:
    raise RuntimeError("NCCL error in: …\nncclUnhandledCudaError: …\nLast error:\nCuda failure 2 'out of memory'")


@pytest.mark.parametrize("fails", [too_large, plain, no_cache, no_share, cuda, cuda_driver, cublas, nccl])
def test_want_of_memory_ends_with_6_and_names_the_knob(fails: Callable[[], int], tmp_path: Path) -> None:
    assert guarded(tmp_path, fails) == 6
    record = json.loads((tmp_path / "logs" / "rank_0.exit.json").read_text())
    assert record["code"] == 6 and record["message"].startswith("out of memory")
    assert "micro_batch_tokens" in record["hint"] and "kv_cache_gb" in record["hint"]


def test_a_full_disk_under_any_file_of_the_run_is_6_though_even_the_record_finds_no_room(tmp_path: Path) -> None:
    """The real error of a real full device; and a run's folder in which nothing can be created."""

    def fails() -> int:
        with open("/dev/full", "wb", buffering=0) as file:
            return file.write(b"x")

    assert guarded(tmp_path, fails) == 6
    record = json.loads((tmp_path / "logs" / "rank_0.exit.json").read_text())
    assert record["message"].startswith("disk full") and "intact" in record["hint"]
    (tmp_path / "file").write_text("")
    assert guarded(tmp_path / "file", fails) == 6  # logs/ cannot be made below a file


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("[/gloo/transport/tcp/pair.cc:339] writev [127.0.0.1]:3724: No space left on device", 6),
        ("Error while serializing: I/O error: No space left on device (os error 28)", 6),
        ("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3724", 7),
    ],
)
def test_a_full_disk_that_a_library_only_has_words_for_is_6(words: str, code: int, tmp_path: Path) -> None:
    def fails() -> int:
        raise RuntimeError(words)

    assert guarded(tmp_path, fails) == code


def test_another_error_of_the_same_kinds_is_no_want_of_memory(tmp_path: Path) -> None:
    def fails() -> int:
        raise ValueError("a bug")

    assert guarded(tmp_path, fails) == 1


def test_a_process_takes_its_own_gpu_or_the_only_one_it_is_shown() -> None:
    """SLURM's --gpus-per-task shows each process one, which is number 0 there."""
    assert [visible_device(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [visible_device(rank, 1) for rank in (0, 3)] == [0, 0]
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU: 2 are visible"):
        visible_device(2, 2)
