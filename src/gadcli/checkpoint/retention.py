"""Which checkpoints of a run stay: the newest few and the best one. Deletes only after a newer one is committed."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

from gadcli.checkpoint.manifest import list_checkpoints, read_manifest, step_of
from gadcli.errors import CheckpointError, ConfigError
from gadcli.files import fsync_path

# Metrics of which less is better; of all others (rouge_l, exact_match, d_acc …) more is.
_LESS_IS_BETTER = ("loss", "perplexity", "ppl", "kl", "nll", "length_auc")


def less_is_better(metric: str) -> bool:
    """Whether the best value of a val metric is the smallest; `min:` or `max:` before the name decides it."""
    if metric.startswith(("min:", "max:")):
        return metric.startswith("min:")
    return metric.rsplit("/", 1)[-1].endswith(_LESS_IS_BETTER)


def best_checkpoint(run_dir: Path, metric: str) -> Path | None:
    """The committed checkpoint with the best recorded `metric` (ties: the newest); None if none recorded it."""
    name = metric.split(":", 1)[1] if metric.startswith(("min:", "max:")) else metric
    sign = -1.0 if less_is_better(metric) else 1.0
    best: tuple[float, Path] | None = None
    for path in list_checkpoints(run_dir):
        try:
            value = read_manifest(path).metrics.get(name)
        except CheckpointError:
            continue  # an unreadable manifest cannot claim to be the best; latest_valid names it when it matters
        if value is not None and math.isfinite(value) and (best is None or sign * value >= best[0]):
            best = (sign * value, path)
    return None if best is None else best[1]


def check_keep_last(keep_last: int) -> None:
    """ConfigError below 2: the newest may turn out damaged, and then the one before is all there is."""
    if keep_last < 2:
        raise ConfigError(f"trainer.keep_last is {keep_last}: one damaged file would lose the run", "keep_last=2")


def prune(run_dir: Path, keep_last: int, keep_best: str = "") -> list[Path]:
    """Deletes all but the `keep_last` newest and the best by `keep_best`; returns what was deleted.

    A folder is renamed before it is emptied, so that a kill in between leaves no half-empty global_step_N.
    """
    check_keep_last(keep_last)
    committed = list_checkpoints(run_dir)
    keep = set(committed[-keep_last:])
    if keep_best:
        best = best_checkpoint(run_dir, keep_best)
        if best is not None:
            keep.add(best)
    deleted = [path for path in committed if path not in keep]
    for path in deleted:
        doomed = path.with_name(path.name + ".old")
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(path, doomed)
    if deleted:
        fsync_path(run_dir)
    remove_leftovers(run_dir, unfinished=False)
    return deleted


def set_aside_newer(run_dir: Path, chosen: Path | None) -> list[Path]:
    """Renames every global_step_N newer than `chosen` to global_step_N.damaged; returns the new names.

    `chosen` is latest_valid's answer, so these are damaged or were never finished. A resumed run comes to the same
    steps again and must be able to commit them; nothing is deleted.
    """
    floor = -1 if chosen is None else step_of(chosen) or 0
    moved = []
    for path in sorted(p for p in run_dir.iterdir() if (step_of(p) or -1) > floor):
        target = path.with_name(f"{path.name}.damaged")
        number = 1
        while target.exists():
            number += 1
            target = path.with_name(f"{path.name}.damaged-{number}")
        os.rename(path, target)
        moved.append(target)
    return moved


def remove_leftovers(run_dir: Path, *, unfinished: bool = True) -> None:
    """Removes what a kill left behind: half-deleted `.old` folders and, before a new save, half-written `.tmp` ones."""
    suffixes = (".old", ".tmp") if unfinished else (".old",)
    for path in run_dir.iterdir():
        if path.suffix in suffixes and step_of(path.with_suffix("")) is not None and not path.is_symlink():
            shutil.rmtree(path)
