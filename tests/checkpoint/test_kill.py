"""kill -9 while writing, committing or pruning: no committed checkpoint lost, no partial one chosen.

A few kills here; `make test-kill` does 100.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_kills(folder: Path, kills: int, seed: int) -> dict[str, int]:
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/checkpoint/kill_loop.py"), str(folder), str(kills), str(seed)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killing_a_saver_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    counts = run_kills(tmp_path / "run", kills=8, seed=3)
    assert counts["kills"] == 8
    assert counts["lost"] == 0
    assert counts["partial_chosen"] == 0
