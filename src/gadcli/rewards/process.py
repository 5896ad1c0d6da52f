"""Rewards computed outside this process: a user's Python function in a child that stays, a shell command per batch.

Whatever goes wrong there (an exception, a hang, a death, the wrong count, something that is not a number) is an error
that names the reward, never a silent 0.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from gadcli.config.rewards import RewardConfig
from gadcli.errors import ConfigError, UnhealthyError
from gadcli.rewards.answer import AnswerText

TAIL = 400  # characters of the child's stderr that an error repeats


class Process:
    """A child process in a session of its own, so that what it starts can be ended with it."""

    def __init__(self, words: list[str] | str) -> None:
        self.stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in `close`
        self.child = subprocess.Popen(
            words, shell=isinstance(words, str), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr,
            start_new_session=True,
        )  # fmt: skip
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.to, self.answers = self.child.stdin, self.child.stdout
        os.set_blocking(self.to.fileno(), False)
        self.received = b""

    def exchange(self, text: str, until: float, *, whole: bool) -> bytes:
        """Send `text`; return a line, or (with `whole`) everything up to the child's end of output.

        Both directions are served together: a child that answers before it has read all cannot block.
        TimeoutError after the monotonic clock's `until`; EOFError where the child ends without a line.
        """
        waiting = memoryview(text.encode("utf-8", "surrogatepass"))
        if whole and not waiting:
            self.to.close()
        while True:
            line, newline, rest = self.received.partition(b"\n")
            if newline and not whole:
                self.received = rest
                return line
            readers, writers = [self.answers], [self.to] if waiting else []
            readable, writable, _ = select.select(readers, writers, [], max(0.0, until - time.monotonic()))
            if not readable and not writable:
                raise TimeoutError
            if writable:
                waiting = self._send(waiting, whole)
            if readable:
                piece = os.read(self.answers.fileno(), 1 << 16)
                if not piece:
                    if whole:
                        return self.received
                    raise EOFError
                self.received += piece

    def _send(self, waiting: memoryview, whole: bool) -> memoryview:
        try:
            waiting = waiting[os.write(self.to.fileno(), waiting) :]
        except BrokenPipeError:  # it reads no more; what it says or how it ended will tell
            waiting = waiting[len(waiting) :]
        if whole and not waiting:
            self.to.close()
        return waiting

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        self.stderr.seek(0)
        return self.stderr.read().decode("utf-8", "replace").strip()[-TAIL:]

    def close(self) -> None:
        """End it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        for stream in (self.to, self.answers, self.stderr):
            stream.close()


class External:
    """A `python` or `command` reward."""

    def __init__(self, spec: RewardConfig) -> None:
        self.spec = spec
        self.process: Process | None = None

    def __call__(self, items: Sequence[AnswerText]) -> list[float]:
        """One finite number per answer. ConfigError (exit 2) names what failed; UnhealthyError (5) a NaN's rows."""
        if not items:
            return []
        until = time.monotonic() + self.spec.timeout_s
        try:
            scores = self._python(items, until) if self.spec.kind == "python" else self._command(items, until)
        except (TimeoutError, subprocess.TimeoutExpired):
            raise self._failed(f"no answer after {self.spec.timeout_s:g} s") from None
        except EOFError:
            assert self.process is not None
            code = self.process.child.wait()
            raise self._failed(f"its process {_ending(code)}") from None
        return self._checked(scores, items)

    def _python(self, items: Sequence[AnswerText], until: float) -> list[Any]:
        if self.process is None:
            child = str(Path(__file__).with_name("child.py"))
            self.process = Process([sys.executable, "-P", child, self.spec.function])
            self._reply(self.process.exchange("", until, whole=False))
        batch = {
            "prompts": [item.messages for item in items],
            "answers": [item.answer for item in items],
            "rows": [item.row() for item in items],
        }
        reply = self._reply(self.process.exchange(json.dumps(batch) + "\n", until, whole=False))
        return list(reply["scores"])

    def _reply(self, line: bytes) -> dict[str, Any]:
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failed(str(reply["error"]))
        return reply

    def _command(self, items: Sequence[AnswerText], until: float) -> list[Any]:
        lines = [json.dumps(item.row() | {"answer": item.answer}) + "\n" for item in items]
        self.process = Process(self.spec.command)
        output = self.process.exchange("".join(lines), until, whole=True).decode("utf-8", "replace")
        code = self.process.child.wait(timeout=max(0.1, until - time.monotonic()))
        if code:
            raise self._failed(f"the command {_ending(code)}")
        self.close()
        try:
            return [float(line) for line in output.splitlines() if line.strip()]
        except ValueError as error:
            raise self._failed(f"its output is not one number per line: {error}") from error

    def _checked(self, scores: list[Any], items: Sequence[AnswerText]) -> list[float]:
        if len(scores) != len(items):
            raise self._failed(f"{len(scores)} scores for {len(items)} answers")
        if wrong := [score for score in scores if isinstance(score, str) or score is None]:
            raise self._failed(f"{wrong[0]!r} is not a number")
        numbers = [float(score) for score in scores]
        if rows := sorted({item.row_id for item, x in zip(items, numbers, strict=True) if not math.isfinite(x)}):
            self.close()
            raise UnhealthyError(
                f"reward {self.spec.name} is not finite for rows {', '.join(map(str, rows[:8]))}",
                "return a finite number for every answer; no weight was changed by this step",
            )
        return numbers

    def _failed(self, what: str) -> ConfigError:
        said = self.process.said() if self.process is not None else ""
        self.close()
        source = self.spec.function or self.spec.command
        last = f" ({said.splitlines()[-1]})" if said else ""
        return ConfigError(f"reward {self.spec.name} ({source}): {what}{last}", "fix it, or take it out of `rewards`")

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was ended by {signal.Signals(-code).name}"
