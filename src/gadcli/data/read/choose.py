"""Which files are meant by paths, folders and globs, and which of a folder's files are left alone (torch-free)."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from gadcli.data.read.findings import printable
from gadcli.data.read.records import UNREADABLE, kind_of, read_records
from gadcli.errors import DataError

# Endings of data, the preferred one first where a folder holds the same name in several.
ENDINGS = (".parquet", ".pq", ".arrow", ".feather", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
# What stands beside data and is none, so that it needs no mention.
BESIDE = re.compile(r"(readme|license|dataset_infos?|dataset_dict|state|\.).*|.*\.(md|txt|yaml|yml|py|lock|json)", re.I)
SPLITS = {
    "train": {"train", "training"},
    "val": {"validation", "valid", "val", "dev", "eval", "evaluation", "heldout"},
    "test": {"test", "testing"},
}
WANTED = {"train": ("train",), "val": ("val", "test")}  # held-out rows: the first of these that is there
# How to bring here what gad does not fetch itself.
REMOTE = {
    r"hf://datasets/([\w.-]+/[\w.-]+)": "hf download {0} --repo-type dataset --local-dir data",
    r"s3://.*": "aws s3 cp --recursive {path} data",
    r"gs://.*": "gcloud storage cp -r {path} data",
    r"https?://huggingface\.co/datasets/([\w.-]+/[\w.-]+)": "hf download {0} --repo-type dataset --local-dir data",
    r"https?://.*": "curl -L --create-dirs -O --output-dir data '{path}'",
    r"([\w-][\w.-]*/[\w-][\w.-]*)$": "if it is a data set on the Hugging Face hub: hf download {0} --repo-type dataset "
    "--local-dir data",
}


@dataclass
class Choice:
    """Files in order; for each decision that was not the user's, the place and a sentence."""

    files: list[str] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def expand(patterns: Sequence[str], split: str = "train") -> list[str]:
    """The files of `choose_files`."""
    return choose_files(patterns, split).files


def choose_files(patterns: Sequence[str], split: str = "train") -> Choice:
    """Files named by paths, folders (searched to the bottom) and globs, each pattern's matches in sorted order.

    Of a folder that holds several splits only the one asked for is taken: "train", or "val" (validation, else test);
    "" takes all. A file that is named is taken whatever it is called. Raises DataError where nothing is left.
    """
    choice = Choice()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            files = _one_ending_each(_inside(path, choice), choice)
            files = _of_split(path, files, split, choice, partly=False)
        elif path.exists():
            files = [path]
        else:
            files = _globbed(path, choice)
            files = _of_split(Path(os.path.commonpath(files)) if files else path, files, split, choice, partly=True)
        if not files:
            raise _nothing(pattern, path)
        choice.files += map(str, files)
    if not choice.files:
        raise DataError("no data files given", "name files, folders or globs")
    return choice


def _globbed(path: Path, choice: Choice) -> list[Path]:
    found: dict[Path, None] = {}
    for match in map(Path, sorted(glob.glob(str(path), recursive=True))):
        # Spark writes folders called x.parquet; `**` matches them and the files in them.
        if match.is_dir() and _ending(match):
            found |= dict.fromkeys(_inside(match, choice))
        elif match.is_file():
            found[match] = None
    return list(found)


def _nothing(pattern: str, path: Path) -> DataError:
    local = (path.parent.is_dir() and path.parent != Path(".")) or _ending(path)
    for form, command in REMOTE.items():
        if (match := re.match(form, pattern)) and ("://" in pattern or not local):
            return DataError(f"{pattern}: not on this machine", command.format(*match.groups(), path=pattern))
    held = ", ".join(printable(p.name) for p in islice(sorted(path.rglob("*")), 3)) if path.is_dir() else ""
    there = f"; it holds {held}" if held else ""
    return DataError(f"{pattern}: no such file, folder with data, or match{there}", f"looked for {', '.join(ENDINGS)}")


def _ending(path: Path) -> str:
    """The data ending of a name, without what it is packed by; "" if it has none."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in PACKED_ENDINGS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in ENDINGS else ""


def _inside(folder: Path, choice: Choice) -> list[Path]:
    """A folder's data files, to the bottom; hidden ones are not looked at, others are said."""
    files, others = [], []
    saved: dict[Path, set[str] | None] = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if not path.is_file() or any(part.startswith((".", "_")) for part in inner.parts):
            continue
        if path.parent not in saved:
            saved[path.parent] = _saved_files(path.parent)
        listed = saved[path.parent]
        if path.name not in listed if listed is not None else path.match("cache-*.arrow"):
            continue  # a map's cache, or what describes the data set
        if _ending(path) and (_ending(path) != ".json" or _holds_rows(path)):
            files.append(path)
        elif not BESIDE.fullmatch(path.name):
            others.append(str(inner))
    if files and others:
        choice.notes.append((str(folder), f"not taken, no known kind of data: {_names(others)}"))
    return files


def _saved_files(folder: Path) -> set[str] | None:
    """The files of a data set that `datasets` saved in this folder; None if it did not."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return {entry["filename"] for entry in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _holds_rows(path: Path) -> bool:
    """Whether a .json file is data: a list of objects or several lines; one object alone describes something."""
    try:
        kind = kind_of(str(path))
        first = [record for record, _ in islice(read_records(str(path), kind), 2)]
    except UNREADABLE:
        return False
    return len(first) > (kind == "lines") and isinstance(first[0], dict)


def _one_ending_each(files: list[Path], choice: Choice) -> list[Path]:
    """The same name in several endings is the same data: the preferred ending is taken."""
    best: dict[Path, Path] = {}
    for path in files:
        stem = path.with_name(path.name[: path.name.lower().rindex(_ending(path))])
        other = best.setdefault(stem, path)
        if ENDINGS.index(_ending(path)) < ENDINGS.index(_ending(other)):
            best[stem] = path
    kept = set(best.values())
    if left := [path for path in files if path not in kept]:
        choice.notes.append((str(left[0]), f"not taken, the same name in another ending is ({len(left)} such)"))
    return [path for path in files if path in kept]


def split_of(inner: Path) -> str:
    """The split that a file's own name says, else its folders'; "" for none, or for names of more than one."""
    for part in (inner.stem, *reversed(inner.parent.parts)):
        words = set(re.split(r"[^a-z]+", part.lower()))
        if found := [split for split, names in SPLITS.items() if names & words]:
            return found[0] if len(found) == 1 else ""
    return ""


def _of_split(folder: Path, files: list[Path], split: str, choice: Choice, partly: bool) -> list[Path]:
    """Those of the split asked for, else those that name none. `partly`: a glob, which says more than a folder: it is
    narrowed only where it matches files of that split."""
    if not split or not files:
        return files
    named = {path: split_of(path.relative_to(folder) if path != folder else Path(path.name)) for path in files}
    found = set(named.values())
    take = next((name for name in (*WANTED[split], "") if name in found), None)
    if found == {take} or (partly and not take):
        return files
    if take is None:
        held = ", ".join(sorted(found))
        raise DataError(
            f"{folder}: holds {held} files alone, asked for {split}: {_names(p.name for p in files)}",
            "name the files themselves to take them all the same",
        )
    kept = [path for path in files if named[path] == take]
    left = [str(path.relative_to(folder)) for path in files if named[path] != take]
    what = f"the {take} split" if take else "files that name no split"
    choice.notes.append((str(folder), f"taken {what} ({_names(p.name for p in kept)}), not {_names(left)}"))
    return kept


def _names(names: Iterable[str]) -> str:
    found = [printable(name) for name in names]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
