"""Arrow's values by their buffers: the same as by its own conversions, and without pandas."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from data_rows import good_rows
from gadcli.data.arrays import indexes, strings, truths, whole_numbers


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 30])
@pytest.mark.parametrize("nulls", [True, False])
def test_slices_and_nulls_read_as_arrow_reads_them(start: int, nulls: bool) -> None:
    rng = np.random.default_rng(start)
    flags = [None if nulls and rng.random() < 0.3 else bool(rng.random() < 0.5) for _ in range(40)]
    array = pa.array(flags, pa.bool_()).slice(start, 9)
    assert truths(array).tolist() == [bool(v) for v in array.to_pylist()]
    for kind in (pa.int32(), pa.int64()):
        numbers = pa.array([None if v is None else int(rng.integers(-5, 99)) for v in flags], kind).slice(start, 9)
        assert whole_numbers(numbers, null=-7).tolist() == [-7 if v is None else v for v in numbers.to_pylist()]


@pytest.mark.parametrize("values", [[], [None], ["a"], ["", None, "é漢", "x" * 99, None]])
@pytest.mark.parametrize("large", [True, False])
def test_texts_become_the_array_that_arrow_makes(values: list[str | None], large: bool) -> None:
    kind = pa.large_string() if large else pa.string()
    made = strings(values, large)
    made.validate(full=True)
    assert made.equals(pa.array(values, kind))
    assert made.null_count == values.count(None)
    assert pc.binary_length(made).to_pylist() == [None if v is None else len(v.encode()) for v in values]


def test_indexes_take_what_they_name() -> None:
    assert strings(["a", "b", "c"]).take(indexes(np.array([2, 0]))).to_pylist() == ["c", "a"]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_checking_and_counting_do_not_import_pandas(name: str, write: Callable[..., str], model_folder: Path) -> None:
    code = (
        "import sys; from gadcli.cli.app import run; codes = [run(['data', *words, '-q']) for words in "
        "(['check', sys.argv[1]], ['check', sys.argv[1], '-t', sys.argv[2]])]; print(codes, 'pandas' in sys.modules)"
    )
    env: dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, write([*good_rows(20), (None, None)], name), str(model_folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[3, 3] False", done.stderr
