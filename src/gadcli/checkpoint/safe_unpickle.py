"""Reads pickles and torch files from untrusted places: an allow-list of inert stand-ins, no torch, nothing executed.

Three formats hold pickles: DCP's `.metadata`, the zip that `torch.save` writes (one per tensor inside a `.distcp`
file), and verl's rank files, which are such a zip with DTensors inside. None of them needs a real class to be
understood, so every allowed name becomes a fresh, empty stand-in; any other name ends the reading.
The unpickler is the pure-Python one on purpose: the C one allocates what a crafted memo index or length asks for.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gadcli.errors import CheckpointError

# torch name -> (safetensors name, bytes an element)
DTYPES: Mapping[str, tuple[str, int]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
TORCH_NAMES: Mapping[str, str] = {stored: name for name, (stored, _) in DTYPES.items()}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "Float8_e4m3fnStorage": "float8_e4m3fn",
    "Float8_e5m2Storage": "float8_e5m2",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "",
}
# What a damaged or hostile pickle can make the unpickler itself raise.
_DAMAGE = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError,
    MemoryError, RecursionError, AssertionError, NotImplementedError, ImportError,
)  # fmt: skip

Resolver = Callable[[str, str], Any]


class Inert:
    """A stand-in for an allowed class: keeps what the pickle gave it and can do nothing."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        self = object.__new__(cls)
        self.args = args
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = _attributes(state)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of a pickled object whose state is a dict."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


def _attributes(state: Any) -> Any:
    """Pickled attributes as one dict: classes with slots store (dict or None, dict or None)."""
    if isinstance(state, tuple) and len(state) == 2 and all(part is None or isinstance(part, dict) for part in state):
        return (state[0] or {}) | (state[1] or {})
    return state


def inert(name: str) -> type[Inert]:
    """A fresh stand-in class (fresh, so that a pickle that writes on a class spoils nothing but its own reading)."""
    return type(name, (Inert,), {})


def enum_member(kind: Any, name: Any) -> Inert:
    """What Python 3.11.2 pickles an enum's member as, getattr(kind, name): a stand-in, nothing is looked up.

    Raises pickle.UnpicklingError where `kind` is not a stand-in class itself.
    """
    if not (isinstance(kind, type) and issubclass(kind, Inert) and isinstance(name, str)):
        raise pickle.UnpicklingError("getattr of something that is no enum")
    return kind(name)


class _AllowListUnpickler(pickle._Unpickler):
    def __init__(self, stream: IO[bytes], resolve: Resolver, where: str, persistent: Callable[[Any], Any] | None):
        super().__init__(stream)
        self._resolve, self._where, self._persistent = resolve, where, persistent
        self._seen: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self._seen:
            found = self._resolve(module, name)
            if found is None:
                raise CheckpointError(
                    f"{self._where}: refuses the pickled name {module}.{name}: not something a checkpoint holds",
                    "nothing was executed; do not load this file with other tools unless you trust its author",
                )
            self._seen[key] = found
        return self._seen[key]

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError("persistent id where none belongs")
        return self._persistent(pid)


def load_pickle(data: bytes, resolve: Resolver, where: str, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The object in `data`, made of plain values and of what `resolve(module, name)` gives; None refuses the name.

    Raises CheckpointError for a refused name and for bytes that are no pickle.
    """
    try:
        return _AllowListUnpickler(io.BytesIO(data), resolve, where, persistent).load()
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(
            f"{where}: damaged: {type(error).__name__}: {str(error)[:80]}", "use another checkpoint, or copy it again"
        ) from error


@dataclass(frozen=True)
class Strided:
    """Where one tensor's elements lie inside a file; `offset` is the absolute byte of its storage's first element used.

    `crc` is the zip's CRC-32 of the whole storage at (`storage_offset`, `storage_bytes`); None when not recorded.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage_offset: int
    storage_bytes: int
    crc: int | None

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _Flat:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Wrapped:
    """A tensor subclass (DTensor): its global shape and the pickled state (`_local_tensor`, `_spec`)."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    state: Any


class _View(io.RawIOBase):
    """A read-only window on a file, so that zipfile can read one tensor inside a `.distcp`."""

    def __init__(self, stream: IO[bytes], start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        take = left if size is None or size < 0 else min(size, left)
        self._stream.seek(self._start + self._at)
        data = self._stream.read(take)
        self._at += len(data)
        return data


def _ints(values: Any) -> tuple[int, ...]:
    out = tuple(values)
    if not all(type(v) is int and v >= 0 for v in out):
        raise ValueError(f"bad sizes {out!r}"[:80])
    return out


def _rebuild_v2(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> _Flat:
    return _Flat(storage, _ints((offset,))[0], _ints(shape), _ints(stride), storage.dtype)


def _rebuild_v3(storage: Any, offset: int, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: str) -> _Flat:
    return _Flat(storage, _ints((offset,))[0], _ints(shape), _ints(stride), dtype)


def _rebuild_wrapper(cls: type[Inert], dtype: str, shape: Any, *_: Any) -> Wrapped:
    return Wrapped(cls.__name__, dtype, _ints(shape), None)


def _rebuild_from_type(func: Callable[..., Any], cls: type[Inert], args: tuple[Any, ...], state: Any) -> Any:
    if func is _rebuild_wrapper:
        made = _rebuild_wrapper(*args)
        return Wrapped(made.kind, made.dtype, made.shape, _attributes(state))
    if func in (_rebuild_v2, _rebuild_v3):  # a plain tensor with Python attributes (FSDP1 leaves some): only the data
        return func(*args)
    raise ValueError("a tensor of an unknown kind")


class _Dict(dict[Any, Any]):
    """OrderedDict's stand-in; state dicts carry a `_metadata` attribute, which a plain dict would refuse."""


_TENSOR_NAMES: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._utils", "_rebuild_wrapper_subclass"): _rebuild_wrapper,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch.serialization", "_get_layout"): lambda name: name,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *args: args,
}
# DTensor, its spec, placements and mesh: every torch release moves or adds some, so whole modules become stand-ins.
_TENSOR_MODULES = ("torch.distributed.tensor", "torch.distributed._tensor", "torch.distributed.device_mesh",
                   "torch.distributed._mesh_layout")  # fmt: skip


def resolve_tensor_name(module: str, name: str) -> Any:
    """The stand-in for a name inside a torch-saved file of tensors; None if it does not belong there."""
    if (module, name) == ("collections", "OrderedDict"):
        return type("OrderedDict", (_Dict,), {})
    if (module, name) in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter")):
        return inert(name)
    known = _TENSOR_NAMES.get((module, name))
    if known is not None:
        return known
    if module == "torch" and name in DTYPES:
        return name
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return _Storage(_STORAGES[name], "")
    if any(module == m or module.startswith(m + ".") for m in _TENSOR_MODULES) and "." not in name:
        return inert(name)
    return None


class TorchZip:
    """One `torch.save` archive at (start, length) of an open file: its object with tensors as `Strided`."""

    def __init__(self, path: Path, stream: IO[bytes], start: int = 0, length: int | None = None) -> None:
        self.path = path
        if length is None:
            length = stream.seek(0, io.SEEK_END)
        self._start = start
        self._view = _View(stream, start, length)
        self._records: dict[str, tuple[int, int, int]] = {}
        try:
            with zipfile.ZipFile(self._view) as archive:
                self._index(archive)
                pickled = archive.read(self._prefix + "data.pkl")
        except (zipfile.BadZipFile, KeyError, NotImplementedError, ValueError, EOFError, OverflowError, OSError,
                RuntimeError) as error:  # fmt: skip
            raise CheckpointError(
                f"{path}: not a whole torch file: {str(error)[:100]}",
                "copy it again; files saved by torch older than 1.6 are not read",
            ) from error
        self.obj = self._bind(load_pickle(pickled, resolve_tensor_name, str(path), self._persistent))

    def _index(self, archive: zipfile.ZipFile) -> None:
        names = archive.namelist()
        roots = [n for n in names if n.endswith("/data.pkl") or n == "data.pkl"]
        if len(roots) != 1:
            raise ValueError(f"{len(roots)} data.pkl records")
        self._prefix = roots[0][: -len("data.pkl")]
        byteorder = self._prefix + "byteorder"
        if byteorder in names and archive.read(byteorder) != b"little":
            raise ValueError("big-endian file")
        self._data_start = 0
        for info in archive.infolist():
            if not info.filename.startswith(self._prefix + "data/"):
                continue
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"compressed record {info.filename}")
            self._view.seek(info.header_offset)
            header = self._view.read(30)
            if len(header) != 30 or header[:4] != b"PK\x03\x04":
                raise ValueError(f"bad header of {info.filename}")
            start = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
            start += int.from_bytes(header[28:30], "little")
            self._view.seek(0, io.SEEK_END)
            if start + info.file_size > self._view.tell():
                raise ValueError(f"{info.filename} runs past the end")
            key = info.filename[len(self._prefix) + 5 :]
            self._records[key] = (self._start + start, info.file_size, info.CRC)

    def _persistent(self, pid: Any) -> _Storage:
        kind, storage, key = pid[0], pid[1], str(pid[2])
        if kind != "storage" or not isinstance(storage, _Storage) or key not in self._records:
            raise pickle.UnpicklingError(f"unknown storage {key!r}"[:80])
        return _Storage(storage.dtype, key)

    def _bind(self, obj: Any, depth: int = 0) -> Any:
        if isinstance(obj, _Flat):
            return self._place(obj)
        if isinstance(obj, Wrapped) and isinstance(obj.state, dict):
            state = {k: self._bind(v, depth + 1) if k == "_local_tensor" else v for k, v in obj.state.items()}
            return Wrapped(obj.kind, obj.dtype, obj.shape, state)
        if isinstance(obj, dict) and depth < 4:
            return {k: self._bind(v, depth + 1) for k, v in obj.items()}
        return obj

    def _place(self, flat: _Flat) -> Strided:
        if flat.dtype not in DTYPES or len(flat.shape) != len(flat.stride):
            raise CheckpointError(f"{self.path}: a tensor of unknown dtype {flat.dtype!r}"[:200])
        start, size, crc = self._records[flat.storage.key]
        item = DTYPES[flat.dtype][1]
        last = flat.offset + sum((n - 1) * s for n, s in zip(flat.shape, flat.stride, strict=True))
        empty = any(n == 0 for n in flat.shape)
        if not empty and (last + 1) * item > size:
            raise CheckpointError(f"{self.path}: a tensor of shape {flat.shape} reaches past its storage")
        return Strided(self.path, flat.dtype, flat.shape, flat.stride, start + flat.offset * item, start, size, crc)
