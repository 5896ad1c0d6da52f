"""The parent's watch over one launch: signals passed on, the picture drawn, the terminal given back. No torch."""

from __future__ import annotations

import os
import signal
import sys
import termios
import time
from types import FrameType, TracebackType
from typing import Any

from gadcli.launch.display import Display
from gadcli.launch.outcome import Outcome
from gadcli.launch.supervisor import LaunchSpec, Supervisor
from gadcli.launch.tensorboard import TensorBoard

POLL_S = 0.1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHOW_CURSOR = "\x1b[?25h\x1b[0m"


class SignalRelay:
    """Collects signals while it is entered; the loop takes them out with `take`. Main thread only."""

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalRelay:
        for number in (*STOP_SIGNALS, signal.SIGUSR1):
            before = signal.getsignal(number)
            if number == signal.SIGHUP and before == signal.SIG_IGN:
                continue  # nohup: the run shall outlive its terminal
            self._before[number] = before
            signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pending.append(number)

    def take(self) -> list[int]:
        taken, self._pending = self._pending, []
        return taken


class RestoredTerminal:
    """Gives the terminal back as it was: line mode, echo, cursor, whatever drew on it and however that ended."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else -1
        self._settings = termios.tcgetattr(self._fd) if self._fd >= 0 else None

    def __enter__(self) -> RestoredTerminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # setting a terminal from the background would stop us
        try:
            if self._settings is not None:
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._settings)
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), SHOW_CURSOR.encode())
        except (OSError, termios.error):  # the terminal is gone (SIGHUP)
            pass
        finally:
            signal.signal(signal.SIGTTOU, before)


def supervise(spec: LaunchSpec, display: Display, tensorboard: TensorBoard | None = None) -> Outcome:
    """Run the workers to their end, whatever the end is; nothing of them lives when this returns."""
    supervisor = Supervisor(spec)
    with SignalRelay() as relay, RestoredTerminal():
        try:
            supervisor.start()
            if tensorboard is not None and (line := tensorboard.start(supervisor.tie)):
                display.inform(line)
            display.start()
            while supervisor.poll():
                for number in relay.take():
                    deliver(number, supervisor, display)
                if tensorboard is not None and (trouble := tensorboard.trouble()):
                    display.notice(trouble)
                display.tick()
                time.sleep(POLL_S)
        finally:
            if tensorboard is not None:
                tensorboard.stop()
            outcome = supervisor.close()
            display.stop()
    return outcome


def deliver(number: int, supervisor: Supervisor, display: Display) -> None:
    """Act on one signal of the user's."""
    if number == signal.SIGUSR1:
        supervisor.request_save()
        display.notice("saving after this step, then going on")
        return
    if number == signal.SIGHUP:
        display.mute()
    again = supervisor.stop.number != 0
    supervisor.request_stop(number)
    if again:
        display.notice("stopping at once")
    else:
        display.notice("stopping: finishing this step and saving… (once more stops at once, without saving)")
