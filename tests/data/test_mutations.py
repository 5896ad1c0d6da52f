"""Byte-mutated files: documented exit codes, no traceback, no hang, no crash, bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from data_rows import good_rows

# Runs in a process of its own: a crash inside Arrow must fail this test and not end the test run.
MUTATE = """
import sys, random, collections, time
from pathlib import Path
from gadcli.cli.app import run
from gadcli.errors import ExitCode
source, folder, first, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
whole = source.read_bytes()
codes = collections.Counter()
for seed in range(first, first + count):
    rng = random.Random(seed)
    data = bytearray(whole)
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:
        at = len(data) - rng.randint(1, min(len(data), 900))  # the footer
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[rng.randrange(len(data)) :]
    else:
        a, b = sorted(rng.randrange(len(data)) for _ in range(2))
        data[a:b] = rng.randbytes(rng.randint(0, 64))
    path = folder / ("m" + source.suffix)
    path.write_bytes(data)
    started = time.monotonic()
    code = run(["data", "check", str(path), "-q"])
    assert code in (0, 3, 6), (seed, code)
    assert time.monotonic() - started < 20, seed
    codes[code] += 1
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
print(dict(codes), peak)
assert peak < 1200, peak
"""


def mutate(source: str, folder: Path, first: int, count: int) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", MUTATE, source, str(folder), str(first), str(count)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "name", ["snappy.parquet", "zstd.parquet", "plain.parquet", "dictionary.parquet", "rows.jsonl"]
)
def test_mutated_files_end_in_documented_exit_codes(name: str, write: Callable[..., str], tmp_path: Path) -> None:
    options = {
        "snappy.parquet": {},
        "zstd.parquet": {"compression": "zstd", "data_page_version": "2.0", "row_group_size": 40},
        "plain.parquet": {"compression": "none", "use_dictionary": False, "write_page_checksum": True},
        "dictionary.parquet": {"types": (None, pa.dictionary(pa.int32(), pa.string()))},
        "rows.jsonl": {},
    }[name]
    out = mutate(write(good_rows(100), name, **options), tmp_path, 0, 60)
    assert "3:" in out  # some of them were bad, and said so


@pytest.mark.slow
@pytest.mark.parametrize("name", ["snappy.parquet", "zstd.parquet"])
def test_a_thousand_mutated_parquets_end_in_documented_exit_codes(
    name: str, write: Callable[..., str], tmp_path: Path
) -> None:
    options = {"compression": name.split(".", maxsplit=1)[0], "row_group_size": 50}
    mutate(write(good_rows(100), name, **options), tmp_path, 1000, 500)
