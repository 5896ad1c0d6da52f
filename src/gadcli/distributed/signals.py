"""Signals as flags: a worker finishes its step, saves and leaves; a second Ctrl-C is the parent's to enforce."""

from __future__ import annotations

import signal
from types import FrameType


class StopFlag:
    """SIGTERM, SIGINT and SIGHUP ask for a stop after this step; SIGUSR1 asks for a checkpoint and goes on."""

    def __init__(self) -> None:
        self.number: int = 0
        self._save = False

    def install(self) -> None:
        """Main thread only. Libraries that we import later (vLLM) may take SIGINT over: install again after them."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_save)

    def take_save_request(self) -> bool:
        asked, self._save = self._save, False
        return asked

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
