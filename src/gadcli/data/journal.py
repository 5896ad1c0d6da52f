"""An append-only file of answers already paid for: what lets `gad data collect` go on after a kill (torch-free)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from gadcli.errors import ConfigError, ResourceError


def request_key(model: str, messages: list[dict[str, str]], params: dict[str, Any]) -> str:
    """Names a request by all that decides its answer, so that changed settings are asked anew."""
    text = json.dumps([model, messages, params], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Journal:
    """One JSON line an answer, flushed as it arrives. In memory: a file offset for each key.

    A line torn by a kill is cut off on opening. A second collector on the same file is refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets: dict[str, int] = {}

    def __enter__(self) -> Journal:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # closed by __exit__
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror}", "choose another -o") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"{self.path}: another collect is writing to it", "wait for it, or use another -o"
            ) from None
        self._load()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:  # fmt: skip
        self._file.close()

    def _load(self) -> None:
        self._file.seek(0)
        offset = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                self.offsets[json.loads(line)["key"]] = offset
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{self.path}: byte {offset}: not a line of this journal", "use another -o") from None
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
