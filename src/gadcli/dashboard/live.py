"""Keeps the picture on a terminal: polls the log, redraws at 4 Hz at most, reads keys, restores the terminal."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TextIO

from rich.console import Console
from rich.live import Live

from gadcli.dashboard.screen import render_runs
from gadcli.dashboard.view import RunView

FRAME_S = 0.25
CLOCK_S = 1.0
"""Without news the picture is redrawn this often, for the clock and the run's state."""

Reason = Literal["stopped", "quit"]


def live(
    run_dir: Path,
    should_stop: Callable[[], bool],
    *,
    notice: Callable[[], str] | None = None,
    link: str = "",
    console: Console | None = None,
) -> Reason:
    """Show one run until `should_stop()` says so ("stopped") or the reader presses q ("quit").

    `notice` is one line for the header, e.g. "saving…", `link` an address for the footer. The caller owns the
    signals; whatever ends this, by an exception too, the terminal is restored first.
    """
    view = RunView(run_dir)
    view.link = link
    return watch([view], should_stop, notice=notice, console=console)


def watch(
    views: Sequence[RunView],
    should_stop: Callable[[], bool],
    *,
    notice: Callable[[], str] | None = None,
    console: Console | None = None,
) -> Reason:
    """The same for several runs at once."""
    if console is None:
        # COLUMNS and LINES tell the size at the shell's start; a picture that follows resizes asks the terminal.
        console = Console(_environ={k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")})
    with keyboard(sys.stdin) as read_key:
        for view in views:
            view.notice, view.interactive = notice, read_key is not None
            view.poll()
        # The alternate screen: every frame overwrites every cell, so nothing flickers, nothing is left behind on
        # resize, and the shell's own lines are back afterwards.
        with Live(
            console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        ) as display:
            drawn_at, drawn_size = 0.0, console.size
            changed = True
            while True:
                now = time.monotonic()
                if changed or console.size != drawn_size or now - drawn_at >= CLOCK_S:
                    drawn_at, drawn_size = now, console.size
                    picture = render_runs(views, drawn_size.width, drawn_size.height, time.time())
                    display.update(picture, refresh=True)
                if should_stop():
                    return "stopped"
                keys = _wait(read_key, FRAME_S)
                if "q" in keys:
                    return "quit"
                for view in views:
                    for key in keys:
                        view.key(key)
                news = 0 if views[0].paused else sum(view.poll() for view in views)
                changed = bool(keys) or news > 0


def _wait(read_keys: Callable[[float], str] | None, seconds: float) -> str:
    """The keys typed within a frame's time. Only q ends the waiting early: held keys must not draw faster than 4 Hz."""
    if read_keys is None:
        time.sleep(seconds)
        return ""
    begin = time.monotonic()
    keys = read_keys(seconds)
    rest = seconds - (time.monotonic() - begin)
    if "q" not in keys and rest > 0:
        time.sleep(rest)
    return keys


@contextlib.contextmanager
def keyboard(stream: TextIO) -> Iterator[Callable[[float], str] | None]:
    """Single keys without Enter where `stream` is a terminal we are in the foreground of; None elsewhere.

    Restores the terminal's mode on the way out.
    """
    try:
        descriptor = stream.fileno()
        ours = os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp()
    except (OSError, ValueError):
        ours = False
    if not ours:
        yield None
        return
    import termios
    import tty

    before = termios.tcgetattr(descriptor)

    def read_key(seconds: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        if not ready:
            return ""
        typed = os.read(descriptor, 64)
        if not typed:
            time.sleep(seconds)  # the terminal is gone; its hang-up signal follows
        # An arrow or function key is an escape sequence, not a letter.
        return "" if typed.startswith(b"\x1b") else typed.decode("ascii", errors="ignore").lower()

    tty.setcbreak(descriptor)
    try:
        yield read_key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
