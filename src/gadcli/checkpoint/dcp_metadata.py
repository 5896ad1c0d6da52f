"""What DCP's `.metadata` says, read without unpickling anything real: which bytes of which file make up each tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gadcli.checkpoint.safe_unpickle import DTYPES, Inert, enum_member, inert, load_pickle
from gadcli.errors import CheckpointError

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": set(),
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A record of a `.distcp` file: `length` bytes at `offset`."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """One saved piece of a tensor and where it goes in the whole."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stored: Stored


@dataclass
class DcpTensor:
    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk] = field(default_factory=list)


@dataclass
class DcpIndex:
    """tensors and non-tensor records by fully qualified name; `paths` is DCP's own map from name to nested keys."""

    tensors: dict[str, DcpTensor]
    records: dict[str, Stored]
    paths: dict[str, tuple[str | int, ...]]


def _resolve(module: str, name: str) -> Any:
    if name in _CLASSES.get(module, ()):
        return inert(name)
    if module == "torch" and name in DTYPES:
        return name
    if (module, name) == ("torch", "Size"):
        return tuple
    if (module, name) == ("torch.serialization", "_get_layout"):
        return lambda layout: layout
    if (module, name) == ("builtins", "getattr"):
        return enum_member
    if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath", "PurePosixPath"):
        return inert("Path")
    return None


def _sizes(values: Any) -> tuple[int, ...]:
    out = tuple(values)
    if not all(type(v) is int and v >= 0 for v in out):
        raise ValueError(f"bad sizes {out!r}"[:80])
    return out


def _stored(info: Inert, files: Iterable[str] | None) -> Stored:
    name, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
    if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
        raise CheckpointError(f"names the file {str(name)[:80]!r} outside its folder: refused")
    if files is not None and name not in files:
        raise CheckpointError(f"names the file {name!r}, which the manifest does not list")
    if info.get("transform_descriptors"):
        raise CheckpointError(f"{name} is stored with a transform (compressed or encrypted): not supported")
    start, size = _sizes((offset, length))
    return Stored(name, start, size)


def _build(meta: Inert, files: Iterable[str] | None) -> DcpIndex:
    tensors: dict[str, DcpTensor] = {}
    where: dict[tuple[str, tuple[int, ...] | None], Stored] = {}
    for key, info in meta.get("storage_data").items():
        offset = key.get("offset")
        where[key.get("fqn"), None if offset is None else _sizes(offset)] = _stored(info, files)
    records: dict[str, Stored] = {}
    for name, entry in meta.get("state_dict_metadata").items():
        if not isinstance(name, str):
            raise ValueError("a tensor's name is no text")
        if type(entry).__name__ == "BytesStorageMetadata":
            records[name] = where[name, None]
            continue
        dtype = entry.get("properties").state[0]
        if dtype not in DTYPES:
            raise ValueError(f"{name}: unknown dtype")
        tensor = DcpTensor(dtype, _sizes(entry.get("size")))
        for chunk in entry.get("chunks"):
            offsets, sizes = _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))
            if len(offsets) != len(tensor.shape) or len(sizes) != len(tensor.shape):
                raise ValueError(f"{name}: a chunk of another rank than its tensor")
            tensor.chunks.append(Chunk(offsets, sizes, where[name, offsets]))
        tensors[name] = tensor
    paths = {name: tuple(path) for name, path in (meta.get("planner_data") or {}).items()}
    return DcpIndex(tensors, records, paths)


def read_dcp_index(folder: Path, files: Iterable[str] | None = None) -> DcpIndex:
    """The index of a DCP folder. `files`: names the manifest allows; None allows any plain name in the folder.

    Raises CheckpointError for a missing, damaged or hostile `.metadata`.
    """
    path = folder / ".metadata"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "not a checkpoint of gad, or an unfinished one") from error
    meta = load_pickle(data, _resolve, str(path))
    try:
        return _build(meta, files)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", "do not use this checkpoint") from error
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: not DCP metadata: {str(error)[:80]}", "use another checkpoint") from error
