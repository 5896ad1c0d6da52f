"""The demo's text: what a row looks like, that the splits do not leak, and that the form is told from others."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gadcli.demo import docstring_data as stdlib_text
from gadcli.demo.docstring_data import DemoFiles, Entry, has_form
from gadcli.errors import DataError
from gadcli.evaluate import text

DEDENT = Entry("textwrap", "dedent", "text", "Remove any common leading whitespace from every line in text.")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return stdlib_text.write_demo_data(tmp_path_factory.mktemp("demo"))


def test_an_entry_becomes_a_question_with_notes_and_the_rules_answer() -> None:
    system, user = DEDENT.messages()
    assert system == {"role": "system", "content": "Answer from the notes."}
    question, notes = user["content"].split("\n")
    assert question in [q.format(name="dedent") for q in stdlib_text.QUESTIONS]
    assert notes == (
        "Notes: it lives in textwrap. It accepts text. "
        "Its docstring says: Remove any common leading whitespace from every line in text."
    )
    assert DEDENT.answer() == (
        "Does: Remove any common leading whitespace from every line in text. Takes: text. Module: textwrap."
    )


def test_only_the_rules_form_has_the_form() -> None:
    assert has_form(DEDENT.answer())
    assert has_form("Does: Wrong but well formed. Takes: a, b. Module: os.path.")
    assert not has_form("Takes: text. Does: Remove it. Module: textwrap.")  # order
    assert not has_form("Does: Remove it. Takes: text. Module: textwrap")  # no stop
    assert not has_form("Does: Remove it. Takes: . Module: textwrap.")  # empty field
    assert not has_form("Does: Remove it. Takes: a. Takes: b. Module: textwrap.")  # label twice
    assert not has_form("Sure! " + DEDENT.answer())
    assert not has_form("The dedent function removes leading whitespace. It is in textwrap.")
    assert not has_form("")


def test_every_row_has_the_form_and_its_facts_stand_in_the_prompt(files: DemoFiles) -> None:
    for path in (files.train, files.val, files.test):
        table = pq.read_table(path)
        assert table.column_names == ["content", "teacher_response", "source"]
        assert b"rule" in table.schema.metadata[b"teacher"]
        for row in table.to_pylist():
            assert has_form(row["teacher_response"])
            does, _, rest = row["teacher_response"].removeprefix("Does: ").partition(" Takes: ")
            takes, _, module = rest.partition(" Module: ")
            for fact in (does, takes, module):
                assert f" {fact}" in row["content"][-1]["content"]


def test_the_splits_are_large_enough_and_share_no_near_duplicate(files: DemoFiles) -> None:
    rows = {name: pq.read_table(getattr(files, name)).to_pylist() for name in ("train", "val", "test")}
    assert {name: len(found) for name, found in rows.items()} == {
        "train": files.train_rows,
        "val": files.val_rows,
        "test": files.test_rows,
    }
    assert files.val_rows >= 200
    assert files.test_rows >= 200
    assert files.train_rows >= 1000
    firsts, lasts, whole, sets = {}, {}, {}, {}
    for name, found in rows.items():
        words = [text.tokens(row["teacher_response"].removeprefix("Does: ").partition(" Takes: ")[0]) for row in found]
        firsts[name] = {tuple(word[:5]) for word in words}
        lasts[name] = {tuple(word[-5:]) for word in words}
        whole[name] = {tuple(word) for word in words}
        assert len(whole[name]) == len(found)
        sets[name] = [set(word) for word in words]
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        for kind in (firsts, lasts, whole):
            assert not kind[a] & kind[b]
    exchanged = [
        (one, two) for one in sets["val"] for two in sets["test"] if len(one - two) <= 1 and len(two - one) <= 1
    ]
    assert exchanged == []


def test_a_seed_orders_the_training_rows_and_moves_none_between_splits() -> None:
    words = [f"{a}{b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"]
    entries = [Entry("m", word, "x", f"Only{word} these{word} words{word} differ{word}.") for word in words]
    one, two = stdlib_text.split_entries(entries, 1), stdlib_text.split_entries(entries, 2)
    assert one["val"] == two["val"]
    assert one["test"] == two["test"]
    assert one["train"] != two["train"]
    assert sorted(one["train"], key=lambda e: e.key) == sorted(two["train"], key=lambda e: e.key)
    assert stdlib_text.split_entries(entries, 1) == one


def test_sentences_that_differ_by_one_word_stay_together() -> None:
    pairs = [
        "Return the mode of it all.",
        "Return the median of it all.",
        "Close the file now open here.",
        "Close the big file now open here.",
    ]
    entries = [
        Entry("m", str(i), "x", sentence) for i, sentence in enumerate([*pairs, "Nothing like the others at all."])
    ]
    groups = stdlib_text._near_duplicates(entries)
    assert sorted(sorted(entry.name for entry in group) for group in groups) == [["0", "1"], ["2", "3"], ["4"]]


def test_sources_are_parsed_not_imported_and_fragments_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(
        "raise SystemExit('imported')\n"
        "class Box:\n"
        "    def put(self, item, *, key=None):\n"
        '        """Put one item into the box. More is said here."""\n'
        "def short():\n"
        '    """Too short."""\n'
        "def _private():\n"
        '    """Nobody should see this private helper."""\n'
        "def abbreviated():\n"
        '    """Like the others, e.g. those above it."""\n'
        "def code():\n"
        '    """Evaluate `this` piece of markup here."""\n'
        "def copy():\n"
        '    """Put one item into the box."""\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "case.py").write_text('def f():\n    """This is not part of the library."""\n')
    found = stdlib_text.stdlib_entries(tmp_path)
    assert found == [Entry("good", "Box.put", "item, key", "Put one item into the box.")]


def test_a_python_without_sources_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documented Python source") as caught:
        stdlib_text.stdlib_entries(tmp_path)
    assert caught.value.hint is not None
    assert "data.train_files" in caught.value.hint


def test_too_few_docstrings_to_hold_rows_out_is_an_error() -> None:
    with pytest.raises(DataError, match="too few"):
        stdlib_text.split_entries([DEDENT], 0)
