"""How far a command is, on stderr: one line redrawn in a terminal, now and then a whole line in a job's log.

Not rich.progress: it hides the cursor while it draws, and a command killed by SIGTERM would leave it hidden.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, Self

from gadcli.dashboard.draw import duration

REDRAW_S, LOG_S = 0.1, 15.0


class Progress:
    """`with Progress("check") as progress: progress(done, total)`, as often as one likes; None total: not known.

    `amount` spells a number. In a log there is no line for what is over within `log_s`, except with `last`, which
    always writes a final one.
    """

    def __init__(
        self, label: str, quiet: bool = False, *, amount: Callable[[float], str] = "{:,.0f}".format, last: bool = False,
        log_s: float = LOG_S, stream: Any = None,
    ) -> None:  # fmt: skip
        self.label, self.amount, self.last, self.stream = label, amount, last, stream or sys.stderr
        self.terminal, self.quiet = self.stream.isatty(), quiet
        self.every = REDRAW_S if self.terminal else log_s
        self.started = time.monotonic()
        self.shown_at = 0.0 if self.terminal else self.started
        self.text = self.shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, done: int, total: int | None, label: str = "", text: str = "") -> None:
        """`label` begins another phase, with a clock of its own; `text` stands in place of the usual figures."""
        now = time.monotonic()
        if label and label != self.label:
            self.label, self.started = label, now
        if self.quiet or (now - self.shown_at < self.every and not self.last):
            return
        self.text = f"{self.label}: {text or self.figures(done, total, max(now - self.started, 1e-3))}"
        if now - self.shown_at >= self.every:
            self.shown_at = now
            self.show()

    def figures(self, done: int, total: int | None, seconds: float) -> str:
        rate = done / seconds
        if not total:
            return f"{self.amount(done)}  {self.amount(rate)}/s"
        left = duration((total - done) / max(rate, 1e-9)) if done else "?"
        return (
            f"{self.amount(done)} of {self.amount(total)}  {100 * done // total} %  {self.amount(rate)}/s  {left} left"
        )

    def show(self) -> None:
        line = f"\r\x1b[K{self.text[: shutil.get_terminal_size().columns - 1]}" if self.terminal else f"{self.text}\n"
        self.stream.write(line)
        self.stream.flush()
        self.shown = self.text

    def close(self) -> None:
        """Removes the line of a terminal, or writes the last one."""
        if self.last and self.text != self.shown:
            self.show()
        if self.terminal and self.shown:
            self.stream.write("\n" if self.last else "\r\x1b[K")
            self.stream.flush()
