"""The training set: checked, tokenised once into a memory-mapped cache (`cache`), read row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gadcli.chat.tokenize import ChatTokenizer
from gadcli.config.machine import cache_folder
from gadcli.config.schema import DataConfig
from gadcli.data.cache import ENTRY, cached
from gadcli.data.check import Progress
from gadcli.data.duplicates import smallest
from gadcli.data.order import BatchOrder, Permutation
from gadcli.data.read.choose import expand
from gadcli.data.read.rows import Message
from gadcli.data.tokens import Limits, Spans, Style
from gadcli.errors import ConfigError, DataError

__all__ = ["BatchOrder", "Dataset", "Permutation", "TokenizedRow", "count_overlap", "open_dataset"]


@dataclass(frozen=True)
class TokenizedRow:
    """One example as the model sees it. `teacher_ids` end in EOS unless cut from the right; `untrained` are spans of
    them that supervised training leaves out (`data.turns=each`: other speakers' turns)."""

    row_id: int
    prompt_ids: list[int]
    teacher_ids: list[int]
    messages: list[Message]
    teacher: str
    untrained: Spans = ()
    read: list[int] | None = None  # of teacher_ids, where the discriminator reads only a part (`critic.reads`)

    @property
    def read_ids(self) -> list[int]:
        """What the discriminator reads of the teacher's answer."""
        return self.teacher_ids if self.read is None else self.read

    @property
    def n_trained(self) -> int:
        """Tokens that supervised training learns from."""
        return len(self.teacher_ids) - sum(end - start for start, end in self.untrained)


class Dataset:
    """Rows of a finished cache, memory-mapped: opening costs nothing, whatever their number.

    Its items are rows, each with its first answer (`answer` takes another); with `each_answer` every answer is an item.
    `kept + dropped == total` rows; `truncated` of the kept ones were cut; `warnings` say what was noticed;
    `fingerprint` names contents, tokenizer and limits; `row_id` counts over `files`, dropped rows included.
    """

    def __init__(self, folder: Path, chosen: _Choice | None = None, *, each_answer: bool = False) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.files: list[str] = meta["files"]
        self.fingerprint: str = meta["fingerprint"]
        self.total: int = meta["total"]
        self.dropped: int = meta["dropped"]
        self.truncated: int = meta["truncated"]
        self.warnings: list[str] = meta["warnings"]
        self._index = np.memmap(folder / "index.bin", ENTRY, "r")
        self._rows = np.memmap(folder / "rows.bin", "<u8", "r")
        self._ids = np.memmap(folder / "ids.bin", "<u4", "r")
        self._text = np.memmap(folder / "text.bin", np.uint8, "r")
        self._chosen = chosen
        self._each = self._entries() if each_answer and len(self._index) > len(self._rows) else None

    @property
    def kept(self) -> int:
        return self.total - self.dropped

    @property
    def several_answers(self) -> bool:
        """Whether `answer` has a choice for some row."""
        return self._each is None and len(self._index) > len(self._rows)

    @property
    def n_rows(self) -> int:
        """Prompts, however many answers each has."""
        return len(self._rows) if self._chosen is None else len(self._chosen)

    def __len__(self) -> int:
        return self.n_rows if self._each is None else len(self._each)

    def __getitem__(self, i: int) -> TokenizedRow:
        return self.answer(i, 0)

    def answer(self, i: int, draw: int) -> TokenizedRow:
        """Item i with one of its answers: number `draw`, counted round and round."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        if self._each is not None:
            return self._entry(int(self._each[i]))
        first, end = self._span(i if self._chosen is None else self._chosen.position(i))
        return self._entry(first + draw % (end - first))

    def _span(self, row: int) -> tuple[int, int]:
        """The entries of a row of the cache."""
        return int(self._rows[row]), int(self._rows[row + 1]) if row + 1 < len(self._rows) else len(self._index)

    def _entries(self) -> npt.NDArray[np.int64]:
        """The entries of all chosen rows, in their order."""
        rows = range(self.n_rows) if self._chosen is None else map(self._chosen.position, range(self.n_rows))
        return np.fromiter(chain.from_iterable(range(*self._span(row)) for row in rows), np.int64)

    def _entry(self, at: int) -> TokenizedRow:
        entry = self._index[at]
        start, prompt = int(entry["ids"]), int(entry["prompt"])
        ids = self._ids[start : start + prompt + int(entry["teacher"])].tolist()
        last = int(self._index[at + 1]["text"]) if at + 1 < len(self._index) else len(self._text)
        messages, teacher, untrained = json.loads(self._text[int(entry["text"]) : last].tobytes())
        spans = tuple((a, b) for a, b in untrained)
        return TokenizedRow(int(entry["row_id"]), ids[:prompt], ids[prompt:], messages, teacher, spans)

    def __iter__(self) -> Iterator[TokenizedRow]:
        return (self[i] for i in range(len(self)))


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
    style: Style = Style(),  # noqa: B008 - frozen
    each_answer: bool = False,
) -> Dataset:
    """Check and tokenise `files` (or take the cache), and open them.

    `tokenizer` is transformers' or a ChatTokenizer; `style` says what is trained of a row, `each_answer` that every
    answer of a row is an item of its own. With `cfg.val_files` empty and `cfg.val_rows` > 0, the rows
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
    paths = expand(patterns, "val" if split == "val" and cfg.val_files else "train")
    folder = cached(paths, tokens, cfg, limits, style, root, progress)
    dataset = Dataset(folder, _choose(folder, cfg, split), each_answer=each_answer)
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
