"""Errors a user can act on, and the exit code each kind ends with."""

from __future__ import annotations

import errno
import os
from enum import IntEnum


class ExitCode(IntEnum):
    """Documented exit codes of every `gad` command."""

    OK = 0
    BUG = 1
    USAGE = 2
    DATA = 3
    CHECKPOINT = 4
    UNHEALTHY = 5
    RESOURCES = 6
    PEERS = 7
    INTERRUPTED = 130
    TERMINATED = 143


class GadError(Exception):
    """Something the user can mend: what is wrong, where, and what to do next.

    `message` says what and where in one or two lines; `hint` is the next thing to do (an override, a
    command). Both are printed by the one error boundary in `cli.app`; a traceback only with `--debug`.
    """

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(GadError):
    """Wrong usage, key, value or combination of values (exit 2)."""

    exit_code = ExitCode.USAGE


class DataError(GadError):
    """A file or row that cannot be trained on (exit 3)."""

    exit_code = ExitCode.DATA


class CheckpointError(GadError):
    """A checkpoint that is missing, damaged, foreign or unsafe (exit 4)."""

    exit_code = ExitCode.CHECKPOINT


class UnhealthyError(GadError):
    """Training went non-finite or collapsed and was stopped (exit 5)."""

    exit_code = ExitCode.UNHEALTHY


class ResourceError(GadError):
    """Out of disk or memory (exit 6)."""

    exit_code = ExitCode.RESOURCES


class PeerError(GadError):
    """A rank was lost or hangs (exit 7)."""

    exit_code = ExitCode.PEERS


class SyncError(GadError):
    """The sampler does not run the actor's weights: our bug (exit 1), never the user's."""

    exit_code = ExitCode.BUG


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_DISK_WORDS = tuple(os.strerror(number) for number in FULL_DISK)


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for want of space: by number, or by words (all that Rust, C++ and other ranks give)."""
    by_number = isinstance(error, OSError) and error.errno in FULL_DISK
    return by_number or any(words in str(error) for words in FULL_DISK_WORDS)
