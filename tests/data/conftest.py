"""Fixtures of the data tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_rows import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder that holds the tokenizer, as `-t` takes it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write(rows, "name.parquet" | "name.jsonl", **pyarrow options) -> path."""

    def writer(rows: list[tuple[Any, Any]], name: str = "rows.parquet", types: Any = None, **options: Any) -> str:
        path = tmp_path / name
        if name.endswith(".jsonl"):
            lines = [json.dumps({"content": c, "teacher_response": t}) for c, t in rows]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            return str(path)
        content, teacher = types or (None, None)
        table = pa.table(
            {
                "content": pa.array([c for c, _ in rows], content),
                "teacher_response": pa.array([t for _, t in rows], teacher),
            }
        )
        pq.write_table(table, path, **options)
        return str(path)

    return writer
