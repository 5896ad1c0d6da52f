"""An append-only file of answers already paid for: a killed `gad data collect` or judging continues from it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from gadcli.errors import ConfigError, DataError, GadError, ResourceError


def request_key(model: str, messages: list[dict[str, str]], params: dict[str, Any]) -> str:
    """Names a request by all that decides its answer, so that changed settings are asked anew."""
    text = json.dumps([model, messages, params], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Journal:
    """One JSON line per answer, flushed as it arrives. In memory: a file offset for each key; the last line of a key
    counts.

    A line torn by a kill is cut off on opening. A second process on the same file waits its turn (`wait`) or gets a
    ConfigError. `option` is the one that names another file, for hints.
    """

    def __init__(self, path: Path, option: str = "-o", wait: bool = False) -> None:
        self.path, self.option, self.wait = path, option, wait
        self.offsets: dict[str, int] = {}

    def __enter__(self) -> Journal:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # closed by __exit__
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be written: {error.strerror}", f"choose another {self.option}"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if self.wait else fcntl.LOCK_NB))
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"{self.path}: another collect is writing to it", f"wait for it, or use another {self.option}"
            ) from None
        try:
            self._load()
        except GadError:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:  # fmt: skip
        self._file.close()

    def _load(self) -> None:
        self._file.seek(0)
        offset = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                self.offsets[json.loads(line)["key"]] = offset
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{self.path}:{number}: not a line of a journal of answers", f"use another {self.option}"
                ) from None
            offset += len(line)
        self._file.truncate(offset)
        self._file.seek(0, os.SEEK_END)

    def __contains__(self, key: str) -> bool:
        return key in self.offsets

    def __len__(self) -> int:
        return len(self.offsets)

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Append and hand to the system at once: it survives a kill of this process."""
        line = json.dumps({"key": key, **entry}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise ResourceError(
                f"{self.path}: {error.strerror}", "free disk space, then run the same command"
            ) from None
        self.offsets[key] = offset

    def get(self, key: str) -> dict[str, Any]:
        self._file.seek(self.offsets[key])
        entry: dict[str, Any] = json.loads(self._file.readline())
        return entry
