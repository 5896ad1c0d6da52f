"""Which folder a RUN argument means: a path, a name in runs/, or of a row of stages (`gad run`) the newest one."""

from __future__ import annotations

import difflib
from pathlib import Path

from gadcli.errors import ConfigError

RUNS = Path("runs")
RECORDS = "metrics.jsonl"
STAGES_FILE = "run.json"  # of a folder that `gad run` made; each stage is a folder in it


def find_run(name: str) -> Path:
    """The run's folder. Raises ConfigError naming the nearest one there is."""
    for path in (Path(name), RUNS / name):
        if path.is_dir():
            return newest_stage(path) if (path / STAGES_FILE).is_file() else path
    if Path(name).is_file() and Path(name).name == RECORDS:
        return Path(name).parent
    there = sorted(p.name for p in RUNS.iterdir() if p.is_dir()) if RUNS.is_dir() else []
    near = difflib.get_close_matches(name, there, n=3, cutoff=0.4) or there[-3:]
    hint = f"runs here: {', '.join(near)}" if near else f"give the folder that holds {RECORDS}"
    raise ConfigError(f"there is no run {name}", hint)


def newest_stage(folder: Path) -> Path:
    """The stage whose records were written last; the folder itself while there are none."""
    records = list(folder.glob(f"*/{RECORDS}"))
    return max(records, key=lambda path: path.stat().st_mtime).parent if records else folder
