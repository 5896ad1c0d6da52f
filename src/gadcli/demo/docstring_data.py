"""The demo's text: questions about Python's standard library, answered from its docstrings by a fixed rule.

Every machine that runs `gad` already has this text, so the demo downloads nothing and the repository copies no
sentence of it. The source files are parsed, never imported. A prompt asks what a function does and gives the
facts as notes; the "teacher" is a rule that sets the same facts in one terse form:

    Does: Remove any common leading whitespace from every line in text. Takes: text. Module: textwrap.

The answer is derivable from the prompt, so held-out rows can be right; no base model answers in this form; and
each copied field stands between a space and a full stop in the notes and in the answer alike, so that it is
tokenized the same in both.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import random
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gadcli.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

SYSTEM_PROMPT = "Answer from the notes."
QUESTIONS = ("What does {name} do?", "Tell me about {name}.", "What is {name} for?")
VAL_ROWS = 256
TEST_ROWS = 256
MIN_HELD_OUT = 200
MIN_WORDS, MAX_WORDS = 4, 16
MAX_ARGUMENTS = 4
MAX_CHARS = 110

# Not every machine has the GUI packages, and tests and tools are no library.
SKIPPED_PARTS = {
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
    *("test", "tests", "idlelib", "lib2to3", "ensurepip", "pydoc_data"),
    *("tkinter", "turtle.py", "turtledemo"),
}
ALLOWED_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ,.'()-_/=")
LABELS = ("Does: ", " Takes: ", " Module: ")


@dataclass(frozen=True)
class Entry:
    """One documented function: dotted name within its module, argument names, first sentence of its docstring."""

    module: str
    name: str
    arguments: str
    sentence: str

    @property
    def key(self) -> str:
        return f"{self.module}:{self.name}"

    def messages(self) -> list[dict[str, str]]:
        """The prompt: a short system message, and a question with the facts as notes."""
        question = QUESTIONS[_hash(self.key) % len(QUESTIONS)].format(name=self.name)
        notes = f"Notes: it lives in {self.module}. It accepts {self.arguments}. Its docstring says: {self.sentence}"
        return [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": f"{question}\n{notes}"},
        ]

    def answer(self) -> str:
        """The rule's answer: the same facts in the demo's form."""
        return f"Does: {self.sentence} Takes: {self.arguments}. Module: {self.module}."


@dataclass(frozen=True)
class DemoFiles:
    """The parquet files of the demo, and the rows in each."""

    train: Path
    val: Path
    test: Path
    train_rows: int
    val_rows: int
    test_rows: int


def has_form(answer: str) -> bool:
    """Whether an answer has the rule's form: the three labels once each, in order, each followed by something
    that ends in a full stop, and nothing before or after. Says nothing about whether the content is right."""
    if any(answer.count(label.strip()) != 1 for label in LABELS) or not answer.startswith(LABELS[0]):
        return False
    fields = []
    rest = answer[len(LABELS[0]) :]
    for label in LABELS[1:]:
        field, found, rest = rest.partition(label)
        if not found:
            return False
        fields.append(field)
    fields.append(rest)
    return all(len(field) > 1 and field.endswith(".") and field == field.strip() for field in fields)


def stdlib_entries(root: Path | None = None) -> list[Entry]:
    """Public functions and methods with a usable first sentence, one a sentence, sorted by module and name.

    Raises DataError where the standard library is not there as source files (a zipped or stripped Python).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    entries: dict[str, Entry] = {}
    for path in _source_files(root):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for entry in _entries_of(path, module):
            entries.setdefault(_normalised(entry.sentence), entry)
    if not entries:
        raise DataError(
            f"{root}: no documented Python source, so the demo has no text",
            "use a Python that ships its standard library as .py files, or train on your own data.train_files",
        )
    return sorted(entries.values(), key=lambda entry: (entry.module, entry.name))


def split_entries(entries: list[Entry], seed: int) -> dict[str, list[Entry]]:
    """Train, val and test rows, by content hash; the seed orders the training rows and moves none of them.

    So rows tuned on under one seed are never another seed's test rows. Sentences that begin or end with the same
    five words, or share all words but one, count as near duplicates and stay together.
    """
    groups = _near_duplicates(entries)
    groups.sort(key=lambda group: _hash(min(entry.key for entry in group)))
    splits: dict[str, list[Entry]] = {"test": [], "val": [], "train": []}
    wanted = {"test": TEST_ROWS, "val": VAL_ROWS}
    for group in groups:
        # A large family of look-alikes would fill a held-out split with one sentence pattern.
        room = [name for name in wanted if len(splits[name]) < wanted[name] and len(group) <= wanted[name] // 10]
        splits[room[0] if room else "train"] += group
    if min(len(splits["val"]), len(splits["test"])) < MIN_HELD_OUT or not splits["train"]:
        raise DataError(
            f"only {len(entries)} usable docstrings: too few to hold {MIN_HELD_OUT} rows out twice",
            "use a full CPython installation, or train on your own data.train_files",
        )
    random.Random(seed).shuffle(splits["train"])
    return splits


def write_demo_data(folder: Path, seed: int = 0) -> DemoFiles:
    """Write train.parquet, val.parquet and test.parquet (columns content, teacher_response, source) to a folder.

    No tuning may look at the test file: it is for the table at the end. Takes about 4 s. Deterministic for a
    given Python and seed. Raises DataError where the standard library has no source.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = split_entries(stdlib_entries(), seed)
    for name, entries in splits.items():
        _write_parquet(entries, folder / f"{name}.parquet")
    train, val, test = (folder / f"{name}.parquet" for name in ("train", "val", "test"))
    return DemoFiles(train, val, test, len(splits["train"]), len(splits["val"]), len(splits["test"]))


def _write_parquet(entries: Iterable[Entry], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    python = f"cpython-{platform.python_version()}"
    rows: list[dict[str, Any]] = [
        {
            "content": entry.messages(),
            "teacher_response": entry.answer(),
            "source": f"{python} {entry.module}.{entry.name}",
        }
        for entry in entries
    ]
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), unfinished)
    unfinished.replace(path)


def _schema() -> pa.Schema:
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    fields = [("content", pa.list_(message)), ("teacher_response", pa.string()), ("source", pa.string())]
    return pa.schema(fields, metadata={"teacher": "a fixed rule, not a language model", "text": "Python docstrings"})


def _source_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        private = any(part.startswith("_") and part != "__init__.py" for part in parts)
        if not private and not SKIPPED_PARTS.intersection(parts) and not parts[0].startswith("config-"):
            yield path


def _entries_of(path: Path, module: str) -> Iterator[Entry]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules hold invalid escapes: a SyntaxWarning when parsed
        tree = ast.parse(path.read_bytes(), filename=str(path))
    for owner, function in _functions(tree.body, ""):
        sentence = _first_sentence(ast.get_docstring(function) or "")
        arguments = _argument_names(function.args)
        if sentence and len(arguments) <= MAX_ARGUMENTS:
            yield Entry(module, owner + function.name, ", ".join(arguments) or "nothing", sentence)


def _functions(body: list[ast.stmt], owner: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield owner, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _functions(node.body, f"{owner}{node.name}.")


def _argument_names(args: ast.arguments) -> list[str]:
    names = [arg.arg for arg in args.posonlyargs + args.args]
    names += [args.vararg.arg] if args.vararg else []
    names += [arg.arg for arg in args.kwonlyargs]
    names += [args.kwarg.arg] if args.kwarg else []
    return [name for name in names if name not in ("self", "cls")]


def _first_sentence(docstring: str) -> str:
    """The first sentence, ending in a full stop; empty where it is none (code, fragments, markup) or too long."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    head, _, tail = paragraph.partition(". ")
    sentence = head.removesuffix(".") + "."
    words = sentence.split()
    usable = (
        MIN_WORDS <= len(words) <= MAX_WORDS
        and len(sentence) <= MAX_CHARS
        and ALLOWED_CHARS.issuperset(sentence)
        and words[0][:1].isupper()
        and words[0].isalpha()
        and (not tail or tail[:1].isupper())  # else the stop belonged to an abbreviation
        and sentence[-2:-1].isalnum()  # "…)." and "'." would join the stop in one token on one side only
        and not any(label.strip() in sentence for label in LABELS)
    )
    return sentence if usable else ""


def _normalised(sentence: str) -> str:
    return " ".join("".join(char if char.isalnum() else " " for char in sentence.casefold()).split())


def _near_duplicates(entries: list[Entry]) -> list[list[Entry]]:
    """Groups of entries joined, directly or through others, by the same first or last five words or by having the
    same words but for one."""
    parent = list(range(len(entries)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[tuple[str, ...], int] = {}
    for i, entry in enumerate(entries):
        words = _normalised(entry.sentence).split()
        # Sets less any one word: equal for sentences that differ by one word, added, left out or exchanged.
        bags = [tuple(sorted(set(words) - {word})) for word in ("", *words)]
        for key in (("first", *words[:5]), ("last", *words[-5:]), *bags):
            parent[root(i)] = root(seen.setdefault(key, i))
    groups: dict[int, list[Entry]] = {}
    for i, entry in enumerate(entries):
        groups.setdefault(root(i), []).append(entry)
    return list(groups.values())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


if __name__ == "__main__":  # a process of its own, for callers that must stay small
    import sys

    files = write_demo_data(Path(sys.argv[1]))
    print(
        f"{files.train_rows} rows to train on, {files.val_rows} to tune by, {files.test_rows} that nothing is tuned by"
    )
