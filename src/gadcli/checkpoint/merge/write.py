"""Writes the planned safetensors files by streaming, two tensors at a time, and re-reads them to compare."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from gadcli.checkpoint.merge.plan import MergePlan, OutFile, OutTensor, produce
from gadcli.checkpoint.merge.tensors import PIECE, Files, Segments
from gadcli.checkpoint.safe_unpickle import DTYPES
from gadcli.errors import CheckpointError

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


@dataclass
class Written:
    """Open output files, and for each tensor (bytes, CRC) of what was handed to the disk."""

    descriptors: dict[Path, int]
    segments: dict[str, Segments]


def write_all(
    plan: MergePlan,
    files: Files,
    folder: Path,
    progress: Progress,
    stop: threading.Event,
    written: Written,
    *,
    check: bool,
) -> None:
    """Writes every file of the plan into `folder`, filling `written`; the caller syncs and closes."""
    jobs: list[tuple[int, OutFile, int]] = []
    for file in plan.files:
        path = folder / file.name
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        written.descriptors[path] = fd
        os.posix_fallocate(fd, 0, file.nbytes)  # a full disk shows here, not after gigabytes
        _write(fd, memoryview(file.header), 0)
        jobs += [(fd, file, i) for i in range(len(file.tensors))]

    def job(item: tuple[int, OutFile, int]) -> None:
        fd, file, i = item
        written.segments[file.tensors[i].name] = _stream(fd, file, i, files, progress, stop, check)

    run_all(job, jobs, stop)


def _write(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _stream(
    fd: int, file: OutFile, i: int, files: Files, progress: Progress, stop: threading.Event, check: bool
) -> Segments:
    tensor = file.tensors[i]
    at = len(file.header) + file.offsets[i]
    end = at + tensor.nbytes
    segments: Segments = []
    for piece in produce(files, tensor, segments if check else None, check=check):
        check_stop(stop)
        _write(fd, piece, at)
        at += len(piece)
        progress(len(piece))
    assert at == end, f"{tensor.name}: {end - at} bytes short"
    return segments


def sync_and_check(
    plan: MergePlan, written: Written, progress: Progress, stop: threading.Event, *, check: bool
) -> None:
    """Forces the files to disk and, meanwhile, reads them back (`check`): headers, then every tensor's CRCs.

    The header is parsed from the file and not taken from the plan. CheckpointError at the first difference.
    """
    jobs: list[Callable[[], None]] = [partial(os.fsync, fd) for fd in written.descriptors.values()]
    back = Files()
    if check:
        for file, path in zip(plan.files, written.descriptors, strict=True):
            for tensor, at in _read_header(file, path):
                jobs.append(partial(_check_tensor, back, path, at, tensor.name, written, progress, stop))
    try:
        run_all(lambda job: job(), jobs, stop)
    finally:
        back.close()


def _read_header(file: OutFile, path: Path) -> list[tuple[OutTensor, int]]:
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__")
    if path.stat().st_size != file.nbytes or len(header) != len(file.tensors):
        raise CheckpointError(f"{path}: not what was written", "the disk may be failing")
    places = []
    for tensor in file.tensors:
        entry = header[tensor.name]
        begin, end = entry["data_offsets"]
        wanted = (DTYPES[tensor.dtype][0], list(tensor.shape), tensor.nbytes)
        if (entry["dtype"], entry["shape"], end - begin) != wanted:
            raise CheckpointError(f"{path}: {tensor.name} is not what was written", "the disk may be failing")
        places.append((tensor, 8 + length + begin))
    return places


def _check_tensor(
    files: Files, path: Path, at: int, name: str, written: Written, progress: Progress, stop: threading.Event
) -> None:
    buffer = memoryview(bytearray(PIECE))
    for size, wanted in written.segments[name]:
        crc, end = 0, at + size
        while at < end:
            check_stop(stop)
            take = buffer[: min(len(buffer), end - at)]
            files.read(path, at, take)
            crc = zlib.crc32(take, crc)
            at += len(take)
            progress(len(take))
        if crc != wanted:
            raise CheckpointError(f"{path}: {name} reads back differently", "the disk may be failing")
