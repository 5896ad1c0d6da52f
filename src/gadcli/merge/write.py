"""Writes the planned safetensors files by streaming, two tensors at a time, and re-reads them to compare."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from gadcli.engine.safe_load import DTYPES
from gadcli.errors import CheckpointError
from gadcli.merge.plan import MergePlan, OutFile, OutTensor, produce
from gadcli.merge.tensors import PIECE, Files

# Reading, hashing and writing release the interpreter: two threads keep two cores busy, four a fast disk.
THREADS = max(2, min(4, os.cpu_count() or 2))
Progress = Callable[[int], None]
Item = TypeVar("Item")


class Stopped(Exception):
    """Raised in a thread that ends because another one failed; never the error that is reported."""


def run_all(work: Callable[[Item], None], items: Iterable[Item], stop: threading.Event) -> None:
    """`work` on every item in a few threads. After the first failure, or Ctrl-C here, the rest ends early."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures: list[Future[None]] = [pool.submit(work, item) for item in items]
        try:
            _, left = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        if left:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    errors = [error for f in futures if not f.cancelled() and (error := f.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, Stopped)):
        raise error
    check_stop(stop)


def check_stop(stop: threading.Event) -> None:
    """Raises Stopped once another part of the merge failed or the user asked to end."""
    if stop.is_set():
        raise Stopped


def write_all(plan: MergePlan, files: Files, folder: Path, progress: Progress, stop: threading.Event) -> dict[str, int]:
    """Writes and fsyncs every file of the plan into `folder`; returns each tensor's CRC-32 as it was handed over."""
    crcs: dict[str, int] = {}
    descriptors: list[int] = []
    jobs: list[tuple[int, OutFile, int]] = []
    try:
        for file in plan.files:
            fd = os.open(folder / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            descriptors.append(fd)
            os.posix_fallocate(fd, 0, file.nbytes)  # a full disk shows here, not after gigabytes
            _write(fd, memoryview(file.header), 0)
            jobs += [(fd, file, i) for i in range(len(file.tensors))]

        def job(item: tuple[int, OutFile, int]) -> None:
            fd, file, i = item
            crcs[file.tensors[i].name] = _stream(fd, file, i, files, progress, stop)

        run_all(job, jobs, stop)
        for fd in descriptors:
            os.fsync(fd)
    finally:
        for fd in descriptors:
            os.close(fd)
    return crcs


def _write(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _stream(fd: int, file: OutFile, i: int, files: Files, progress: Progress, stop: threading.Event) -> int:
    tensor = file.tensors[i]
    at = len(file.header) + file.offsets[i]
    end = at + tensor.nbytes
    crc = 0
    for piece in produce(files, tensor):
        check_stop(stop)
        _write(fd, piece, at)
        crc = zlib.crc32(piece, crc)
        at += len(piece)
        progress(len(piece))
    assert at == end, f"{tensor.name}: {end - at} bytes short"
    return crc


def check_written(
    plan: MergePlan, folder: Path, crcs: dict[str, int], progress: Progress, stop: threading.Event
) -> dict[str, tuple[int, ...]]:
    """Reads the files back: header, names, dtypes, shapes and every tensor's CRC; returns the shapes by name.

    The header is parsed from the file and not taken from the plan. Raises CheckpointError at the first difference.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    jobs: list[tuple[Path, OutTensor, int]] = []
    for file in plan.files:
        path = folder / file.name
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__")
        if path.stat().st_size != file.nbytes or len(header) != len(file.tensors):
            raise CheckpointError(f"{path}: not what was written", "the disk may be failing")
        for tensor in file.tensors:
            entry = header[tensor.name]
            begin, end = entry["data_offsets"]
            if entry["dtype"] != DTYPES[tensor.dtype][0] or end - begin != tensor.nbytes:
                raise CheckpointError(f"{path}: {tensor.name} is not what was written", "the disk may be failing")
            shapes[tensor.name] = tuple(entry["shape"])
            jobs.append((path, tensor, 8 + length + begin))
    back = Files()

    def job(item: tuple[Path, OutTensor, int]) -> None:
        path, tensor, at = item
        if _crc_of(back, path, at, tensor.nbytes, progress, stop) != crcs[tensor.name]:
            raise CheckpointError(f"{path}: {tensor.name} reads back differently", "the disk may be failing")

    try:
        run_all(job, jobs, stop)
    finally:
        back.close()
    return shapes


def _crc_of(files: Files, path: Path, at: int, size: int, progress: Progress, stop: threading.Event) -> int:
    buffer = memoryview(bytearray(min(PIECE, size)))
    crc = 0
    end = at + size
    while at < end:
        check_stop(stop)
        take = buffer[: min(len(buffer), end - at)]
        files.read(path, at, take)
        crc = zlib.crc32(take, crc)
        at += len(take)
        progress(len(take))
    return crc
