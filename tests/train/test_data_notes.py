"""What a run says about its data before it trains: warnings of the checks, and prompts that are also held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from gadcli.config.schema import DataConfig, GadConfig
from gadcli.data.batches import Dataset, open_dataset
from gadcli.errors import DataError
from gadcli.train.build import _open_data, data_notes
from tiny import tiny_tokenizer, write_tiny_data


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """24 training rows; 6 held-out rows with the prompts of the first 6."""
    monkeypatch.setenv("GAD_CACHE", str(tmp_path / "cache"))
    train, val = (str(write_tiny_data(tmp_path / name, n)) for name, n in (("t.parquet", 24), ("v.parquet", 6)))
    return DataConfig(train_files=[train], val_files=[val], train_batch_size=8)


def opened(data: DataConfig) -> tuple[Dataset, Dataset | None]:
    return _open_data(GadConfig(data=data), tiny_tokenizer())


def test_prompts_that_are_also_held_out_are_told_and_counted(data: DataConfig) -> None:
    notes = data_notes(GadConfig(data=data), *opened(data))
    assert any(note.startswith("6 training rows have a prompt that is also held out") for note in notes)


def test_a_strict_run_refuses_them(data: DataConfig) -> None:
    data.strict = True
    train, val = opened(data)
    with pytest.raises(DataError, match="6 training rows have a prompt that is also held out"):
        data_notes(GadConfig(data=data), train, val)


def test_what_the_checks_noticed_is_told_with_its_side(data: DataConfig) -> None:
    train, val = opened(data)
    train.warnings.append("2 rows repeat others")
    assert data_notes(GadConfig(data=data), train, None)[-1] == "training data: 2 rows repeat others"
    assert "training data: 2 rows repeat others" in data_notes(GadConfig(data=data), train, val)


def test_rows_split_off_the_training_file_are_opened_and_never_shared(data: DataConfig) -> None:
    data.val_files, data.val_rows = [], 4
    train, val = opened(data)
    assert val is not None
    assert (len(train), len(val)) == (20, 4)
    assert not any("held out" in note for note in data_notes(GadConfig(data=data), train, val))


def test_without_held_out_rows_there_is_no_held_out_set(data: DataConfig) -> None:
    data.val_files = []
    assert opened(data)[1] is None
    assert len(open_dataset(data.train_files, tiny_tokenizer(), data, 2048, "train")) == 24
