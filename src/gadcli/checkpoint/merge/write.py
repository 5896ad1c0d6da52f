"""Writes the planned safetensors files a piece at a time, and reads them back to compare."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

from gadcli.checkpoint.hf_folder import read_header
from gadcli.checkpoint.merge.plan import MergePlan, produce
from gadcli.checkpoint.merge.tensors import PIECE, Files, Segments
from gadcli.checkpoint.safe_unpickle import DTYPES
from gadcli.errors import CheckpointError

Progress = Callable[[int], None]


def write_all(plan: MergePlan, files: Files, folder: Path, progress: Progress, *, check: bool) -> dict[str, Segments]:
    """Writes every file of the plan into `folder`, on disk when this returns.

    check: CRCs of the shards are compared, and (bytes, CRC) of what was handed to the disk returned by tensor.
    """
    written: dict[str, Segments] = {}
    for file in plan.files:
        with open(folder / file.name, "xb") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.nbytes)  # a full disk shows here, not after gigabytes
            stream.write(file.header)
            for tensor in file.tensors:
                segments: Segments = []
                for piece in produce(files, tensor, segments if check else None, check=check):
                    stream.write(piece)
                    progress(len(piece))
                written[tensor.name] = segments
            assert stream.tell() == file.nbytes, f"{file.name}: {stream.tell()} bytes in place of {file.nbytes}"
            stream.flush()
            os.fsync(stream.fileno())
    return written


def read_back(plan: MergePlan, written: dict[str, Segments], folder: Path, progress: Progress) -> None:
    """Compares headers (parsed from the files, not taken from the plan) and every tensor's CRCs with what was written.

    CheckpointError at the first difference.
    """
    reader = Files()
    try:
        for file in plan.files:
            path = folder / file.name
            header, start = read_header(path)
            for tensor in file.tensors:
                entry = header.pop(tensor.name, {"dtype": "", "shape": [], "data_offsets": [0, 0]})
                begin, end = (start + at for at in entry["data_offsets"])
                wanted = (DTYPES[tensor.dtype][0], list(tensor.shape), tensor.nbytes)
                same = (entry["dtype"], entry["shape"], end - begin) == wanted
                if not (same and _crcs_fit(reader, path, begin, written[tensor.name], progress)):
                    raise CheckpointError(f"{path}: {tensor.name} is not what was written", "the disk may be failing")
            if header:
                raise CheckpointError(f"{path}: holds more than was written", "the disk may be failing")
    finally:
        reader.close()


def _crcs_fit(reader: Files, path: Path, at: int, segments: Segments, progress: Progress) -> bool:
    buffer = memoryview(bytearray(PIECE))
    for size, wanted in segments:
        crc, end = 0, at + size
        while at < end:
            take = buffer[: min(PIECE, end - at)]
            reader.read(path, at, take)
            crc = zlib.crc32(take, crc)
            at += len(take)
            progress(len(take))
        if crc != wanted:
            return False
    return True
