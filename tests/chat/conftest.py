"""A model's tokenizer on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_rows import make_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the tokenizer, as `-t` takes it."""
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(folder)
    return folder
