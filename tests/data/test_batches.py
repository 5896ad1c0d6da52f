"""The order of batches and the cache: pure, resumable, disjoint over ranks, safe under kills and several starters."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_rows import good_rows, make_tokenizer, user
from gadcli.chat.tokenize import ChatTokenizer
from gadcli.config.schema import DataConfig
from gadcli.data.batches import BatchOrder, Dataset, Permutation, count_overlap, open_dataset
from gadcli.errors import DataError, ResourceError

Write = Callable[..., str]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_permutation_visits_every_row_once(n: int) -> None:
    assert sorted(Permutation(n, 7, 3)(np.arange(n)).tolist()) == list(range(n))


def test_each_epoch_and_seed_has_its_own_order() -> None:
    orders = {tuple(Permutation(50, seed, epoch)(np.arange(50)).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_of_a_seed_is_pinned_for_resumes_across_versions() -> None:
    # Recorded once: if this changes, runs saved before cannot go on in their order.
    assert BatchOrder(10, 5, seed=1, shuffle=True).rows(0) == [6, 0, 9, 1, 3]


def test_positions_are_spread_evenly() -> None:
    """Row 0's position over 4000 epochs in 8 bins: chi-square with 7 degrees of freedom stays below 24.3 (p 0.001)."""
    n, epochs = 64, 4000
    bins = np.zeros(8)
    for epoch in range(epochs):
        bins[int(np.flatnonzero(Permutation(n, 1, epoch)(np.arange(n)) == 0)[0]) // 8] += 1
    assert ((bins - epochs / 8) ** 2 / (epochs / 8)).sum() < 24.3


def test_a_step_alone_tells_its_rows_and_epochs_drop_their_rest() -> None:
    order = BatchOrder(103, 10, seed=3, shuffle=True)
    assert order.steps_per_epoch == 10  # 103 // 10, as the plan counts
    forward = [order.rows(s) for s in range(20)]
    again = BatchOrder(103, 10, seed=3, shuffle=True)
    assert [again.rows(s) for s in reversed(range(20))] == forward[::-1]
    for epoch in (forward[:10], forward[10:]):
        seen = [i for rows in epoch for i in rows]
        assert len(set(seen)) == 100
        assert max(seen) < 103
    assert forward[:10] != forward[10:]


def test_without_shuffling_rows_come_in_file_order() -> None:
    order = BatchOrder(7, 3, seed=1, shuffle=False)
    assert [order.rows(s) for s in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


def test_a_hundred_million_rows_cost_no_memory_and_no_time() -> None:
    start = time.process_time()
    rows = BatchOrder(100_000_000, 128, seed=1, shuffle=True).rows(700_000)
    assert time.process_time() - start < 1.0
    assert len(set(rows)) == 128


def test_no_full_batch_is_an_error() -> None:
    with pytest.raises(DataError, match="3 rows are fewer than one batch of 4"):
        BatchOrder(3, 4, seed=1, shuffle=True)


def config(path: str, **changes: Any) -> DataConfig:
    return DataConfig(train_files=[path], train_batch_size=2, **changes)


def test_the_cache_is_built_once_and_keyed_by_all_it_depends_on(write: Write, tmp_path: Path, tokenizer: Any) -> None:
    path = write(good_rows(20))
    progress: list[tuple[int, int | None]] = []

    def opened(cfg: DataConfig, tok: Any = tokenizer, length: int = 2048) -> Dataset:
        return open_dataset([], tok, cfg, length, "train", tmp_path / "c", lambda d, t: progress.append((d, t)))

    first = opened(config(path))
    assert progress == [(20, 20)]
    assert opened(config(path)).fingerprint == first.fingerprint
    assert len(progress) == 1  # nothing was tokenised again
    others = [
        opened(config(path, max_response_length=99)),
        opened(config(path), length=2047),
        opened(config(path), make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")),
        opened(config(write(good_rows(20, 1), "other.parquet"))),
    ]
    assert len({first.fingerprint, *(d.fingerprint for d in others)}) == 5
    # Another name, the same bytes: the same data.
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(Path(path).read_bytes())
    assert opened(config(str(copy))).fingerprint == first.fingerprint


def test_a_full_disk_under_the_cache_names_the_cache_and_leaves_nothing(
    write: Write, tmp_path: Path, tokenizer: Any
) -> None:
    """A limit on the size of files stands for the disk."""
    path = write(good_rows(500))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(ResourceError, match=str(tmp_path / "c")) as full:
            open_dataset([], tokenizer, config(path), 2048, "train", tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.value.hint == "free disk space or set GAD_CACHE"
    assert list((tmp_path / "c").glob("*.building")) == []
    assert len(open_dataset([], tokenizer, config(path), 2048, "train", tmp_path / "c")) == 500


def test_a_cache_that_can_keep_no_notes_is_not_blamed_on_the_file(write: Write, tmp_path: Path, tokenizer: Any) -> None:
    """It said that the training file could not be read."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "files").write_text("a file where the folder of notes should be")
    assert len(open_dataset([], tokenizer, config(write(good_rows(20))), 2048, "train", tmp_path / "c")) == 20


def test_a_changed_file_is_noticed_though_its_name_and_size_stay(write: Write, tmp_path: Path, tokenizer: Any) -> None:
    path = write([(user("aa"), "bb")] * 1 + good_rows(3), "rows.jsonl")
    first = open_dataset([], tokenizer, config(path), 2048, "train", tmp_path / "c")
    text = Path(path).read_text().replace('"bb"', '"cc"')
    Path(path).write_text(text)
    second = open_dataset([], tokenizer, config(path), 2048, "train", tmp_path / "c")
    assert (first[0].teacher, second[0].teacher) == ("bb", "cc")


def test_rows_keep_their_text_and_say_where_they_stand(write: Write, tmp_path: Path, tokenizer: Any) -> None:
    one, two = write(good_rows(3), "a.parquet"), write([(user("é漢"), "b"), *good_rows(2)], "b.jsonl")
    cfg = DataConfig(train_files=[one, two], train_batch_size=1)
    data = open_dataset([], tokenizer, cfg, 2048, "train", tmp_path / "c")
    assert (data[3].row_id, data[3].messages, data[3].teacher) == (3, user("é漢"), "b")
    assert all(row.teacher_ids[-1] == tokenizer.eos_token_id for row in data)


def test_held_out_rows_are_split_off_by_content(write: Write, tmp_path: Path, tokenizer: Any) -> None:
    path = write([*good_rows(40), *good_rows(5)])  # questions 0-4 occur twice
    cfg = config(path, val_rows=10)
    train = open_dataset([], tokenizer, cfg, 2048, "train", tmp_path / "c")
    val = open_dataset([], tokenizer, cfg, 2048, "val", tmp_path / "c")
    assert len(val) == 10
    prompts = {r.messages[0]["content"] for r in val}
    assert not prompts & {r.messages[0]["content"] for r in train}
    assert [r.row_id for r in train] == sorted(r.row_id for r in train)
    # The same rows in another order hold out the same prompts.
    shuffled = write([*good_rows(5), *good_rows(40)][::-1], "shuffled.parquet")
    again = open_dataset([], tokenizer, config(shuffled, val_rows=10), 2048, "val", tmp_path / "c")
    assert len({r.messages[0]["content"] for r in again} & prompts) >= 9  # ten rows of which duplicates may share one


def test_overlap_of_train_and_val_files_is_counted(write: Write, tmp_path: Path, tokenizer: Any) -> None:
    train_file, val_file = write(good_rows(10)), write(good_rows(4, 8), "val.parquet")
    cfg = DataConfig(train_files=[train_file], val_files=[val_file], train_batch_size=2)
    train = open_dataset(cfg.train_files, tokenizer, cfg, 2048, "train", tmp_path / "c")
    val = open_dataset(cfg.val_files, tokenizer, cfg, 2048, "val", tmp_path / "c")
    assert (len(train), len(val)) == (10, 4)
    assert count_overlap(train, val) == 2  # questions 8 and 9


def test_duplicates_are_counted_and_strict_refuses_them(write: Write, tmp_path: Path, tokenizer: Any) -> None:
    path = write([*good_rows(4), *good_rows(2)])
    data = open_dataset([], tokenizer, config(path), 2048, "train", tmp_path / "c")
    assert len(data.warnings) == 1
    assert "2  duplicate: repeats row 0" in data.warnings[0]
    with pytest.raises(DataError, match="repeats row 0"):
        open_dataset([], tokenizer, config(path, strict=True), 2048, "train", tmp_path / "c")


def _open(path: str, folder: str, cache: str, queue: Any) -> None:
    calls: list[int] = []
    data = open_dataset([], ChatTokenizer.from_folder(folder), config(path), 2048, "train", cache,
                        lambda done, total: calls.append(done))  # fmt: skip
    queue.put((len(data), bool(calls)))


def test_of_several_ranks_one_builds_and_the_others_wait(write: Write, tmp_path: Path, model_folder: Path) -> None:
    path = write(good_rows(3000))
    spawn = multiprocessing.get_context("spawn")
    queue: Any = spawn.Queue()
    ranks = [spawn.Process(target=_open, args=(path, str(model_folder), str(tmp_path / "c"), queue)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    results = [queue.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(30)
    assert [n for n, _ in results] == [3000] * 3
    assert sum(built for _, built in results) == 1


def test_a_killed_build_leaves_nothing_that_looks_finished(write: Write, tmp_path: Path, model_folder: Path) -> None:
    path = write([(user("word " * 150), "word " * 30 + str(i)) for i in range(6000)])
    cache = tmp_path / "c"
    spawn = multiprocessing.get_context("spawn")
    queue: Any = spawn.Queue()
    process = spawn.Process(target=_open, args=(path, str(model_folder), str(cache), queue))
    process.start()
    deadline = time.monotonic() + 60
    while not list(cache.glob("*.building/ids.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert list(cache.glob("*.building"))
    assert not list(cache.glob("*/meta.json"))
    data = open_dataset([], ChatTokenizer.from_folder(model_folder), config(path), 2048, "train", cache)
    assert len(data) == 6000
    assert not list(cache.glob("*.building"))


def several(n: int) -> list[tuple[Any, Any]]:
    """Row i has 1 + i % 3 answers."""
    return [(user(f"question {i}"), [f"answer {i} {k}" for k in range(1 + i % 3)]) for i in range(n)]


def test_each_answer_of_a_list_is_an_item_and_a_row_has_its_answers_in_turn(
    write: Write, tmp_path: Path, tokenizer: Any
) -> None:
    path = write(several(6), "rows.jsonl")
    rows = open_dataset([], tokenizer, config(path), 2048, "train", tmp_path / "c")
    assert (len(rows), rows.n_rows, rows.several_answers) == (6, 6, True)
    assert [rows.answer(2, draw).teacher for draw in range(4)] == [f"answer 2 {k}" for k in (0, 1, 2, 0)]
    assert [rows.answer(3, draw).teacher for draw in (0, 1, 7)] == ["answer 3 0"] * 3
    each = open_dataset([], tokenizer, config(path), 2048, "train", tmp_path / "c", each_answer=True)
    assert [row.teacher for row in each] == [answer for _, answers in several(6) for answer in answers]
    assert len(each) == 12 and each.n_rows == 6 and {row.row_id for row in each} == set(range(6))
    assert each[4].prompt_ids == rows[2].prompt_ids and each[4].teacher_ids == rows.answer(2, 1).teacher_ids


def test_rows_with_several_answers_are_held_out_whole(write: Write, tmp_path: Path, tokenizer: Any) -> None:
    path = write(several(30), "rows.jsonl")
    cfg = config(path, val_rows=8)
    train = open_dataset([], tokenizer, cfg, 2048, "train", tmp_path / "c", each_answer=True)
    val = open_dataset([], tokenizer, cfg, 2048, "val", tmp_path / "c")
    held = {row.row_id for row in val}
    assert len(val) == len(held) == 8 and train.n_rows == 22
    assert not held & {row.row_id for row in train}
    assert len(train) == sum(1 + i % 3 for i in range(30) if i not in held)
