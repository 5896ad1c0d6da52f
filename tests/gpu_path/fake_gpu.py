"""gad's GPU path under fake tensors, in one process without a GPU: `with fake_gpu(world) as watch: …`.

Tensors have shapes, dtypes and devices but no numbers. What that finds: tensors on two devices, dtypes that CUDA's
products refuse, points where the host waits for the device, the allocator's peak, what collectives move. What it cannot
find: wrong numbers, kernels that do not compile, races between streams, vLLM. The process must have been started with
LD_PRELOAD=libfakecuda.so, and does nothing else.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
PAGE = 512  # bytes: what CUDA's allocator rounds up to
PRODUCTS = {
    aten.mm.default, aten.bmm.default, aten.addmm.default, aten.addmm_.default, aten.addmm.out, aten.baddbmm.default,
    aten.mv.default, aten.dot.default, aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
}  # fmt: skip
# What each is called, and which argument is the whole tensor: gathered, to be reduced, or reduced in place.
COLLECTIVES = {
    torch.ops.c10d._allgather_base_.default: ("gathered", 0),
    torch.ops.c10d._reduce_scatter_base_.default: ("reduced", 1),
    torch.ops.c10d.allreduce_.default: ("between copies", 0),
}


class Nothing:
    """A stream or an event: everything is done at once."""

    device, device_index, device_type, stream_id = torch.device("cuda", 0), 0, 1, 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or Nothing()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...


def _pretend_cuda() -> None:
    """torch.cuda as Python code sees it, over the library that stands in for the device."""
    ctypes.CDLL(os.environ["LD_PRELOAD"], mode=ctypes.RTLD_GLOBAL).fakecuda_install()
    cuda: Any = torch.cuda
    stream = Nothing()
    cuda.Stream, cuda.Event = Nothing, Nothing
    answers: dict[str, Any] = {
        "current_stream": stream, "default_stream": stream, "stream": stream, "device": stream, "set_stream": None,
        "set_device": None, "synchronize": None, "_lazy_init": None, "current_device": 0, "max_memory_allocated": 0,
        "is_available": True, "is_initialized": True, "device_count": 8, "get_device_capability": (9, 0),
        "set_rng_state": None,
    }  # fmt: skip
    for name, answer in answers.items():  # a function of its own for each: dynamo keeps a table of them
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, stream: None
    tensor.pin_memory = _pinned
    plain = torch.tensor

    def on_host_first(data: Any, *, device: Any = None, **more: Any) -> torch.Tensor:
        made = plain(data, **more)
        return made if device is None or torch.device(device).type == "cpu" else made.to(device)

    torch.tensor = on_host_first  # type: ignore[assignment]
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment, method-assign]


def _pinned(self: torch.Tensor, *_: Any) -> torch.Tensor:
    self.is_pinned_here = True  # type: ignore[attr-defined]
    return self


class Watch(TorchDispatchMode):
    """Above the fake mode: notes where the host waits and where types are mixed, counts memory of CUDA storages."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.waits: collections.Counter[str] = collections.Counter()
        self.mixed: collections.Counter[str] = collections.Counter()
        self.moved: collections.Counter[str] = collections.Counter()  # bytes of whole tensors, by collective
        self.live: dict[int, tuple[int, Any]] = {}
        self.now = self.peak = 0
        self.peak_at = ""

    def restart(self) -> None:
        """Count from here on; what is alive stays counted."""
        self.waits.clear()
        self.mixed.clear()
        self.moved.clear()
        self.peak = self.now

    def note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = (0, weakref.ref(storage, lambda _, key=key: self._gone(key)))
            self.resized(storage)

    def resized(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) in self.live:
            before, reference = self.live[key]
            size = -(-storage.nbytes() // PAGE) * PAGE
            self.live[key] = (size, reference)
            self.now += size - before
            if self.now > self.peak:
                self.peak, self.peak_at = self.now, _where()

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key)[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if DTensor in types:  # first into the operations on its shard, which come here again
            return NotImplemented
        if (answer := self._of_values(func, args)) is not None:
            return answer
        if (moved := COLLECTIVES.get(func)) is not None:
            whole = args[moved[1]]
            for tensor in whole if isinstance(whole, (list, tuple)) else [whole]:
                self.moved[moved[0]] += tensor.nbytes
        if func in PRODUCTS:
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            factors = tensors[1:] if "out_dtype" in kwargs or any(arg is torch.float32 for arg in args) else tensors
            if len({factor.dtype for factor in factors}) > 1:
                self.mixed[f"{func} of {sorted(str(t.dtype) for t in factors)} at {_where()}"] += 1
        out = func(*args, **kwargs)
        self._note_copies(func, args, kwargs, out)
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
                self.note(tensor.untyped_storage())
        return out

    def _of_values(self, func: Any, args: Any) -> Any:
        """Answers to what depends on numbers, which are not there: finite ones, and every element chosen."""
        if func is aten._local_scalar_dense.default:
            self._wait_for(args[0], "item")
            return True if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
        if func is aten.equal.default:
            return True
        if func is aten.nonzero.default:
            self._wait_for(args[0], "nonzero")
            return torch.zeros(max(1, args[0].numel()), args[0].dim(), dtype=torch.int64, device=args[0].device)
        if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self._wait_for(args[0], "boolean index")
            return args[0].flatten(0, args[1][0].dim() - 1).clone()
        return None

    def _note_copies(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func is not aten._to_copy.default:
            return
        if args[0].device.type == "cpu" and out.device.type == "cuda":
            free = kwargs.get("non_blocking") and getattr(args[0], "is_pinned_here", False)
            if not free:
                self.waits[f"upload at {_where()}"] += 1
        elif out.device.type == "cpu":
            self._wait_for(args[0], "copy back")

    def _wait_for(self, tensor: torch.Tensor, why: str) -> None:
        if tensor.device.type == "cuda":
            self.waits[f"{why} at {_where()}"] += 1


def _where() -> str:
    """The innermost line of gad's own code, or of whoever stands above us."""
    stack = traceback.extract_stack()[:-2]
    ours = [frame for frame in stack if "/gadcli/" in frame.filename]
    frame = ours[-1] if ours else next(f for f in reversed(stack) if f.filename != __file__)
    return f"{frame.filename.split('/gadcli/')[-1].split('site-packages/')[-1]}:{frame.lineno} {frame.line}"


@contextlib.contextmanager
def fake_gpu(world: int = 1, replicate: int = 1) -> Iterator[tuple[Watch, DeviceMesh]]:
    """Rank 0 of a world of fake GPUs; the others answer every collective at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    shape, names = (
        ((replicate, world // replicate), ("replicate", "shard")) if replicate > 1 else ((world,), ("shard",))
    )
    mesh = init_device_mesh("cuda", shape, mesh_dim_names=names)
    watch = Watch()
    with contextlib.ExitStack() as stack:
        _patch(stack, DeviceMesh, "__getitem__", _outside_modes)
        _patch(stack, torch.UntypedStorage, "resize_", lambda plain: _resize(plain, watch))
        _patch(stack, torch.nn.Module, "to", lambda plain: lambda self, *_, **__: self)  # made on the device at once
        stack.callback(dist.destroy_process_group)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(watch)
        yield watch, mesh


def _patch(stack: contextlib.ExitStack, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    plain = getattr(owner, name)
    setattr(owner, name, make(plain))
    stack.callback(setattr, owner, name, plain)


def _outside_modes(plain: Any) -> Any:
    def look(self: DeviceMesh, names: Any) -> DeviceMesh:
        with _disable_current_modes():  # it looks at real tensors
            found = plain(self, names)
        torch._C._set_only_lift_cpu_tensors(True)
        return found

    return look


def _resize(plain: Any, watch: Watch) -> Any:
    def resize(self: torch.UntypedStorage, size: int) -> Any:
        done = plain(self, size)
        watch.resized(self)
        return done

    return resize


_pretend_cuda()
