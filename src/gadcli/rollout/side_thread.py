"""One piece of work in a thread beside the main one. The work must have no collective of training's process groups."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Aside(Generic[T]):
    """Starts `work` at once. `result` waits for it, and raises there, in the main thread, whatever it raised.

    A daemon: if the main thread fails meanwhile, the process may end without waiting.
    """

    def __init__(self, work: Callable[[], T], device: torch.device, name: str) -> None:
        self._work, self._device = work, device
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._began = time.monotonic()
        self.seconds = 0.0  # that the work took, once it is done
        # On a GPU a thread of its own is not enough: kernels of one stream run in turns. What the main thread has
        # asked for so far (the weights that `work` reads) must be done before.
        self._ready = torch.cuda.Event() if device.type == "cuda" else None
        if self._ready is not None:
            self._ready.record()
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._ready is None:
                self._value.append(self._work())
            else:
                self._run_on_stream(self._ready)
        except BaseException as error:  # noqa: BLE001  carried to the main thread, which raises it
            self._error = error
        self.seconds = time.monotonic() - self._began

    def _run_on_stream(self, ready: torch.cuda.Event) -> None:
        with torch.cuda.device(self._device), contextlib.ExitStack() as stack:
            stream = torch.cuda.Stream(self._device)
            stack.enter_context(torch.cuda.stream(stream))
            stream.wait_event(ready)
            self._value.append(self._work())
            stream.synchronize()

    def result(self) -> T:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value[0]
