"""The token cache of a data set: built once, in a folder named by what it depends on (torch-free).

`ids.bin` (uint32 tokens), `index.bin` (one ENTRY per answer, those of a row together), `rows.bin` (uint64: each row's
first entry), `hash.bin` (uint64 of each row's prompt), `text.bin` (JSON of messages, answer and untrained spans),
`meta.json`. It is built in a folder beside it and renamed when complete; a file lock lets one process build while the
other ranks wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from gadcli.chat.tokenize import ChatTokenizer
from gadcli.config.schema import DataConfig
from gadcli.data.check import Progress, account, add_duplicates, failure, open_files, scan_rows
from gadcli.data.duplicates import DuplicateCounter, content_hash
from gadcli.data.read.findings import Summary
from gadcli.data.template_check import template_findings
from gadcli.data.tokens import TOKENISED_ROWS, Limits, Style, TokenBatch, cut_ids, limit, tokenise
from gadcli.errors import DataError, ResourceError
from gadcli.files import fsync_path, locked, write_atomic

FORMAT = 2  # raise when the cache's layout or the meaning of a row changes
ENTRY = np.dtype([("row_id", "<i8"), ("ids", "<i8"), ("text", "<i8"), ("prompt", "<u4"), ("teacher", "<u4")])


def cached(
    paths: list[str],
    tokenizer: ChatTokenizer,
    cfg: DataConfig,
    limits: Limits,
    style: Style,
    root: Path,
    progress: Progress | None,
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
        "style": [style.turns, style.hidden_thinking],
        "tokenizer": tokenizer.fingerprint,
    }
    fingerprint = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    folder = root / fingerprint[:32]
    if not (folder / "meta.json").exists():
        with locked(root / f"{fingerprint[:32]}.lock"):
            if not (folder / "meta.json").exists():  # another rank may have built it while this one waited
                _build_and_commit(folder, fingerprint, paths, _Builder(tokenizer, cfg, limits, style), progress)
    return folder


def _build_and_commit(
    folder: Path, fingerprint: str, paths: list[str], builder: _Builder, progress: Progress | None
) -> None:
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)  # left by a killed process: we hold the lock
    building.mkdir()
    try:
        meta = builder.run(building, paths, progress)
        meta["fingerprint"] = fingerprint
        (building / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        for file in building.iterdir():
            fsync_path(file)
        os.rename(building, folder)
    except OSError as error:
        raise ResourceError(f"{building}: {error.strerror or error}", "free disk space or set GAD_CACHE") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


class _Builder:
    """Writes the cache's files a batch at a time."""

    def __init__(self, tokenizer: ChatTokenizer, cfg: DataConfig, limits: Limits, style: Style) -> None:
        self.tokenizer, self.cfg, self.limits, self.style = tokenizer, cfg, limits, style
        self.keys = (cfg.prompt_key, cfg.response_key)
        self.summary = Summary()
        self.ids_at = self.text_at = self.entries = 0

    def run(self, folder: Path, paths: list[str], progress: Progress | None) -> dict[str, Any]:
        summary = self.summary
        summary.add(template_findings(self.tokenizer))
        infos = open_files(paths, self.keys, summary)
        with ExitStack() as stack:
            names = ("ids", "index", "rows", "hash", "text")
            out = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in names}
            repeats = stack.enter_context(DuplicateCounter(folder))
            for batch in scan_rows(infos, summary, progress, most_rows=TOKENISED_ROWS):
                tokens, cut = limit(tokenise(self.tokenizer, batch, self.style), self.limits)
                account(batch, summary)
                summary.truncated += cut
                repeats.add(self.write(tokens, out), np.array([row.row_id for row in tokens.rows], np.int64))
            add_duplicates(summary, repeats, examples=5)
        error = failure(
            summary, on_bad_row=self.cfg.on_bad_row, truncation=self.limits.truncation, strict=self.cfg.strict
        )
        if error is not None:
            raise error
        return {
            "files": [i.path for i in infos],
            "total": summary.total,
            "dropped": summary.dropped,
            "truncated": summary.truncated,
            "warnings": summary.lines("warn") + summary.lines("note") + self.drop_lines(),
        }

    def drop_lines(self) -> list[str]:
        if not self.summary.dropped:
            return []
        s = self.summary
        head = f"{s.kept:,} rows kept + {s.dropped:,} dropped = {s.total:,}"
        return [head, *s.lines("error")]

    def write(self, tokens: TokenBatch, out: Mapping[str, IO[bytes]]) -> npt.NDArray[np.uint64]:
        """Append a batch; returns the hash of each row's prompt and answers."""
        n, truncation = len(tokens.rows), self.limits.truncation
        both, prompts_only, firsts = np.empty(n, np.uint64), np.empty(n, np.uint64), np.empty(n, np.uint64)
        entries: list[tuple[int, int, int, int, int]] = []
        pieces: list[list[int]] = []
        for j, (row, prompt_ids, answers) in enumerate(zip(tokens.rows, tokens.prompts, tokens.answers, strict=True)):
            prompt = cut_ids(prompt_ids, self.limits.max_prompt, truncation)
            messages = json.dumps(row.messages, ensure_ascii=False)
            prompts_only[j] = content_hash(row.prompt_json())
            both[j] = content_hash(row.whole_json())
            firsts[j] = self.entries + len(entries)
            for answer in answers:
                ids = cut_ids(answer.ids, self.limits.max_response, truncation)
                rest = json.dumps([answer.text, answer.untrained], ensure_ascii=False)
                data = f"[{messages}, {rest[1:]}".encode()
                entries.append((row.row_id, self.ids_at, self.text_at, len(prompt), len(ids)))
                pieces += (prompt, ids)
                self.ids_at += len(prompt) + len(ids)
                self.text_at += len(data)
                out["text"].write(data)
        # Not by numpy's tofile, whose error does not say that a disk is full.
        out["ids"].write(np.fromiter(chain.from_iterable(pieces), "<u4").tobytes())
        out["index"].write(np.array(entries, ENTRY).tobytes())
        out["rows"].write(firsts.astype("<u8").tobytes())
        out["hash"].write(prompts_only.tobytes())
        self.entries += len(entries)
        return both


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
        note.parent.mkdir(exist_ok=True)
        write_atomic(note, json.dumps({"seen": seen, "sha256": digest}))
    return digest


def _noted(note: Path, seen: list[int]) -> str | None:
    """The digest that was noted of a file as it is now; None where it was never seen, or the note is torn."""
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        return str(noted["sha256"]) if noted["seen"] == seen else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
