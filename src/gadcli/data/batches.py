"""The training set: checked, tokenised once into a memory-mapped cache, read row by row.

The cache is a folder named by what it depends on (files' contents, columns, tokenizer, template, limits):
`ids.bin` (uint32 tokens), `index.bin` (one ENTRY a row), `hash.bin` (uint64 of each prompt), `text.bin`
(JSON of messages and teacher), `meta.json`. It is built in a folder beside it and renamed when complete; a file
lock lets one process build while the other ranks wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gadcli.config.machine import cache_folder
from gadcli.config.schema import DataConfig
from gadcli.data.check import (
    TOKENISED_ROWS,
    Limits,
    Progress,
    SpecialText,
    TokenBatch,
    account,
    failure,
    limit,
    open_files,
    scan_rows,
    tokenise,
)
from gadcli.data.duplicates import DuplicateCounter, content_hash, smallest
from gadcli.data.files import FileInfo, expand
from gadcli.data.findings import Finding, Summary
from gadcli.data.order import BatchOrder, Permutation
from gadcli.data.rows import Message
from gadcli.data.tokenize import ChatTokenizer
from gadcli.errors import ConfigError, DataError, ResourceError

__all__ = ["BatchOrder", "Dataset", "Permutation", "TokenizedRow", "count_overlap", "open_dataset"]

FORMAT = 1  # raise when the cache's layout or the meaning of a row changes
ENTRY = np.dtype([("row_id", "<i8"), ("ids", "<i8"), ("text", "<i8"), ("prompt", "<u4"), ("teacher", "<u4")])


@dataclass(frozen=True)
class TokenizedRow:
    """One example as the model sees it. `teacher_ids` end in EOS unless cut from the right."""

    row_id: int
    prompt_ids: list[int]
    teacher_ids: list[int]
    messages: list[Message]
    teacher: str


class Dataset:
    """Rows of a finished cache, memory-mapped: opening costs nothing, whatever their number.

    `kept + dropped == total` rows; `truncated` of the kept ones were cut; `warnings` say what was noticed;
    `fingerprint` names contents, tokenizer and limits; `row_id` counts over `files`, dropped rows included.
    """

    def __init__(self, folder: Path, chosen: _Choice | None = None) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.files: list[str] = meta["files"]
        self.fingerprint: str = meta["fingerprint"]
        self.total: int = meta["total"]
        self.dropped: int = meta["dropped"]
        self.truncated: int = meta["truncated"]
        self.warnings: list[str] = meta["warnings"]
        self._file_rows: list[int] = meta["file_rows"]
        self._index = np.memmap(folder / "index.bin", ENTRY, "r")
        self._ids = np.memmap(folder / "ids.bin", "<u4", "r")
        self._text = np.memmap(folder / "text.bin", np.uint8, "r")
        self._chosen = chosen

    @property
    def kept(self) -> int:
        return self.total - self.dropped

    def __len__(self) -> int:
        return len(self._index) if self._chosen is None else len(self._chosen)

    def __getitem__(self, i: int) -> TokenizedRow:
        if not 0 <= i < len(self):
            raise IndexError(i)
        at = i if self._chosen is None else self._chosen.position(i)
        entry = self._index[at]
        start, prompt = int(entry["ids"]), int(entry["prompt"])
        ids = self._ids[start : start + prompt + int(entry["teacher"])].tolist()
        last = int(self._index[at + 1]["text"]) if at + 1 < len(self._index) else len(self._text)
        messages, teacher = json.loads(self._text[int(entry["text"]) : last].tobytes())
        return TokenizedRow(int(entry["row_id"]), ids[:prompt], ids[prompt:], messages, teacher)

    def __iter__(self) -> Iterator[TokenizedRow]:
        return (self[i] for i in range(len(self)))

    def locate(self, row_id: int) -> tuple[str, int]:
        """The file, and the row within it, that a row id stands for."""
        for file, rows in zip(self.files, self._file_rows, strict=True):
            if row_id < rows:
                return file, row_id
            row_id -= rows
        raise IndexError(row_id)


class _Choice:
    """Some of a cache's rows: those at the listed (sorted) positions, or all but those."""

    def __init__(self, listed: npt.NDArray[np.int64], n: int, inside: bool) -> None:
        self.listed, self.n, self.inside = listed, n, inside
        self._shift = listed - np.arange(len(listed))

    def __len__(self) -> int:
        return len(self.listed) if self.inside else self.n - len(self.listed)

    def position(self, i: int) -> int:
        if self.inside:
            return int(self.listed[i])
        return i + int(np.searchsorted(self._shift, i, side="right"))


def open_dataset(
    files: list[str],
    tokenizer: Any,
    cfg: DataConfig,
    max_model_len: int,
    split: str,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Check and tokenise `files` (or take the cache), and open them.

    `tokenizer` is transformers' or a ChatTokenizer. With `cfg.val_files` empty and `cfg.val_rows` > 0, the rows
    with the smallest prompt hashes are held out of the training files: `split` "val" gives those, "train" the
    others; equal prompts never part. With `val_files`, `val_rows` picks as many of them the same way.
    `progress(rows done, rows in all or None)` is called as rows are tokenised.

    Raises DataError with all findings summarised, also for fewer rows than a batch; ResourceError when memory or
    disk do not suffice.
    """
    if split == "val" and not (cfg.val_files or cfg.val_rows):
        raise ConfigError("no held-out rows", "set data.val_files, or data.val_rows to split some off")
    tokens = ChatTokenizer.of(tokenizer)
    patterns = files or (cfg.train_files if split == "train" or not cfg.val_files else cfg.val_files)
    limits = Limits(cfg.max_prompt_length, cfg.max_response_length, max_model_len, cfg.truncation)
    root = Path(cache_dir) if cache_dir is not None else default_cache()
    folder = _cached(expand(patterns), tokens, cfg, limits, root, progress)
    dataset = Dataset(folder, _choose(folder, cfg, split))
    if split == "train" and len(dataset) < cfg.train_batch_size:
        raise DataError(
            f"{len(dataset):,} training rows are fewer than one batch of {cfg.train_batch_size}",
            f"data.train_batch_size={max(len(dataset), 1)}, or more rows",
        )
    if len(dataset) == 0:
        raise DataError("no held-out rows are left", "lower data.val_rows or give more rows")
    return dataset


def default_cache() -> Path:
    """Where token ids are kept, beside converted models."""
    return cache_folder() / "tokens"


def _choose(folder: Path, cfg: DataConfig, split: str) -> _Choice | None:
    if cfg.val_rows == 0 or (split == "train" and cfg.val_files):
        return None
    held = smallest(folder / "hash.bin", cfg.val_rows)
    hashes = np.memmap(folder / "hash.bin", "<u8", "r")
    step = 1 << 20
    # The smallest hashes there are: one is among them if it is not above the last.
    parts = [np.flatnonzero(hashes[a : a + step] <= held[-1]) + a for a in range(0, len(hashes), step)]
    listed = np.concatenate(parts).astype(np.int64)
    if split == "val":
        listed = listed[: cfg.val_rows]
    return _Choice(listed, len(hashes), inside=split == "val")


def count_overlap(train: Dataset, val: Dataset) -> int:
    """How many rows of `train` have a prompt that is also in `val`. Memory grows with `val` alone."""
    if train.folder == val.folder:
        return 0
    held = np.unique(np.fromfile(val.folder / "hash.bin", "<u8"))
    hashes = np.memmap(train.folder / "hash.bin", "<u8", "r")
    step = 1 << 20
    return int(sum(np.isin(hashes[a : a + step], held).sum() for a in range(0, len(hashes), step)))


# ---- the cache ----


def _cached(
    paths: list[str], tokenizer: ChatTokenizer, cfg: DataConfig, limits: Limits, root: Path, progress: Progress | None
) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{root}: cannot be created: {error.strerror}", "set GAD_CACHE to a writable folder"
        ) from None
    known = {
        "format": FORMAT,
        "files": [content_fingerprint(p, root) for p in paths],
        "columns": [cfg.prompt_key, cfg.response_key],
        "limits": [limits.max_prompt, limits.max_response, limits.max_model_len, limits.truncation],
        "rows": [cfg.on_bad_row, cfg.strict],
        "tokenizer": tokenizer.fingerprint,
    }
    fingerprint = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    folder = root / fingerprint[:32]
    if not (folder / "meta.json").exists():
        with _lock(root / f"{fingerprint[:32]}.lock"):
            if not (folder / "meta.json").exists():  # another rank may have built it while this one waited
                _build_and_commit(folder, fingerprint, paths, tokenizer, cfg, limits, progress)
    return folder


def _build_and_commit(
    folder: Path,
    fingerprint: str,
    paths: list[str],
    tokenizer: ChatTokenizer,
    cfg: DataConfig,
    limits: Limits,
    progress: Progress | None,
) -> None:
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)  # left by a killed process: we hold the lock
    building.mkdir()
    try:
        meta = _Builder(building, tokenizer, cfg, limits).run(paths, progress)
        meta["fingerprint"] = fingerprint
        (building / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        for file in building.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        os.rename(building, folder)
    except OSError as error:
        raise ResourceError(f"{building}: {error.strerror or error}", "free disk space or set GAD_CACHE") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


class _Builder:
    """Writes the cache's files a batch at a time."""

    def __init__(self, folder: Path, tokenizer: ChatTokenizer, cfg: DataConfig, limits: Limits) -> None:
        self.folder, self.tokenizer, self.cfg, self.limits = folder, tokenizer, cfg, limits
        self.keys = (cfg.prompt_key, cfg.response_key)
        self.summary = Summary()
        self.ids_at = self.text_at = 0

    def run(self, paths: list[str], progress: Progress | None) -> dict[str, Any]:
        summary = self.summary
        infos = open_files(paths, self.keys, summary)
        special = SpecialText(self.tokenizer.special_texts)
        file_rows = {i.path: i.rows or 0 for i in infos}
        with (
            open(self.folder / "ids.bin", "wb") as ids,
            open(self.folder / "index.bin", "wb") as index,
            open(self.folder / "hash.bin", "wb") as hashes,
            open(self.folder / "text.bin", "wb") as text,
            DuplicateCounter(self.folder) as repeats,
        ):
            out = (ids, index, hashes, text)
            for batch in scan_rows(infos, summary, progress, most_rows=TOKENISED_ROWS):
                special.check(batch)
                tokens, cut = limit(tokenise(self.tokenizer, batch), self.limits)
                account(batch, summary)
                summary.truncated += cut
                file_rows[batch.file] = max(file_rows[batch.file], batch.first_row + len(batch))
                repeats.add(self.write(tokens, out), np.fromiter((r.row_id for r in tokens.rows), np.int64))
            _note_repeats(summary, repeats, infos, file_rows)
        error = failure(
            summary, on_bad_row=self.cfg.on_bad_row, truncation=self.limits.truncation, strict=self.cfg.strict
        )
        if error is not None:
            raise error
        return {
            "files": [i.path for i in infos],
            "file_rows": [file_rows[i.path] for i in infos],
            "total": summary.total,
            "dropped": summary.dropped,
            "truncated": summary.truncated,
            "warnings": summary.lines("warn") + self.drop_lines(),
        }

    def drop_lines(self) -> list[str]:
        if not self.summary.dropped:
            return []
        s = self.summary
        head = f"{s.kept:,} rows kept + {s.dropped:,} dropped = {s.total:,}"
        return [head, *s.lines("error")]

    def write(self, tokens: TokenBatch, out: tuple[Any, Any, Any, Any]) -> npt.NDArray[np.uint64]:
        """Append a batch; returns the hash of each row's prompt and answer."""
        ids, index, hashes, text = out
        n = len(tokens.rows)
        entries = np.zeros(n, ENTRY)
        both, prompts_only = np.empty(n, np.uint64), np.empty(n, np.uint64)
        pieces: list[list[int]] = []
        for j, row in enumerate(tokens.rows):
            prompt = self.cut(tokens.prompts.ids(j), self.limits.max_prompt)
            answer = self.cut([*tokens.answers[j].ids, self.tokenizer.eos_id], self.limits.max_response)
            messages = json.dumps(row.messages, ensure_ascii=False)
            data = f"[{messages}, {json.dumps(row.teacher, ensure_ascii=False)}]".encode()
            prompts_only[j], both[j] = content_hash(messages.encode()), content_hash(data)
            entries[j] = (row.row_id, self.ids_at, self.text_at, len(prompt), len(answer))
            pieces += (prompt, answer)
            self.ids_at += len(prompt) + len(answer)
            self.text_at += len(data)
            text.write(data)
        # Not by numpy's tofile, whose error does not say that a disk is full.
        ids.write(np.fromiter(chain.from_iterable(pieces), "<u4").tobytes())
        index.write(entries.tobytes())
        hashes.write(prompts_only.tobytes())
        return both

    def cut(self, ids: list[int], most: int) -> list[int]:
        if len(ids) <= most:
            return ids
        return ids[:most] if self.limits.truncation == "right" else ids[-most:]


def _note_repeats(
    summary: Summary, repeats: DuplicateCounter, infos: list[FileInfo], file_rows: dict[str, int]
) -> None:
    count, examples = repeats.result(examples=5)
    if not count:
        return

    def place(row: int) -> tuple[str, int]:
        for info in infos:
            if row < file_rows[info.path]:
                return info.path, row
            row -= file_rows[info.path]
        raise IndexError(row)

    for row, earlier in examples:
        file, at = place(row)
        first_file, first_at = place(earlier)
        summary.add([Finding("duplicate", file, f"repeats row {first_at} of {first_file}", row=at)])
    summary.counts["duplicate"] = count


def content_fingerprint(path: str, root: Path) -> str:
    """SHA-256 of a file's bytes; remembered with its inode, size and times, so that a file is read once only."""
    note = root / "files" / hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32]
    try:
        stat = os.stat(path)
        seen = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if (digest := _noted(note, seen)) is not None:
            return digest
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "check its permissions") from None
    with suppress(OSError):  # a full disk: the note only saves reading again, and what must be written tells of it
        _write_note(note, json.dumps({"seen": seen, "sha256": digest}))
    return digest


def _noted(note: Path, seen: list[int]) -> str | None:
    """The digest that was noted of a file as it is now; None where it was never seen, or the note is torn."""
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        return str(noted["sha256"]) if noted["seen"] == seen else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_note(note: Path, text: str) -> None:
    note.parent.mkdir(exist_ok=True)
    fresh = note.with_suffix(f".{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, note)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time on this machine; the kernel releases it when the holder dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
