"""A run's folder: whose it is, whether this launch may use it, and what the parent writes into it. No torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from gadcli.config.plan import run_name
from gadcli.config.resolve import Resolved, load_resolved
from gadcli.config.schema import GadConfig
from gadcli.config.tree import differences, is_neutral
from gadcli.errors import CheckpointError, ConfigError
from gadcli.files import locked, write_atomic
from gadcli.metrics.runlog import METRICS_FILE

CONFIG_FILE = "config.yaml"
PLAN_FILE = "plan.json"
LINEAGE_FILE = "lineage.json"
LOCK_FILE = ".lock"
SHOWN_DIFFERENCES = 3
PEEK_BYTES = 1 << 16


def run_dir_of(config: GadConfig) -> Path:
    """Where a run lives: `<output_dir>/<exp_name>`, by default named after preset and stage."""
    return Path(config.trainer.output_dir).expanduser() / (config.trainer.exp_name or run_name(config))


def holds_run(folder: Path) -> bool:
    """Whether a folder has something of a run that could be lost: a step taken or a checkpoint. One with other files,
    or where a run never got to its first step, is free."""
    return any(folder.glob("global_step_*")) or _has_steps(folder / METRICS_FILE)


def ended_well(folder: Path) -> bool:
    """Whether a run's last record says that it was done."""
    path = folder / METRICS_FILE
    if not path.exists():
        return False
    lines = path.read_text().splitlines()
    try:
        last = json.loads(lines[-1]) if lines else {}
    except ValueError:  # torn by a kill
        return False
    return last.get("type") == "end" and last.get("code") == 0


def can_resume(folder: Path) -> bool:
    """Whether a run was begun here; one that was killed before its first checkpoint begins again."""
    return (folder / CONFIG_FILE).exists()


def _has_steps(metrics: Path) -> bool:
    try:
        with metrics.open("rb") as file:
            return b'"type":"step"' in file.read(PEEK_BYTES)
    except OSError:  # none there, or nothing that could be a run's
        return False


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Held while a run uses its folder: two launches must not write into one. ConfigError (2) where another does."""
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(locked(folder / LOCK_FILE, wait=False))
        except BlockingIOError:
            holder = (folder / LOCK_FILE).read_text(errors="replace").strip()
            raise ConfigError(
                f"{folder}: a run is using this folder now ({holder})",
                f"gad monitor {folder} shows it; another --exp-name starts a second run",
            ) from None
        stream.truncate(0)
        stream.write(f"pid {os.getpid()} on {os.uname().nodename}".encode())
        stream.flush()
        yield


def check_free(folder: Path, resolved: Resolved, lineage: dict[str, Any], *, resume: bool, force: bool) -> list[str]:
    """May this launch use the folder? Returns what to tell the user; changes nothing.

    Raises ConfigError (2) for a folder that holds a run when neither --resume nor --force is given, or that has none
    to resume; CheckpointError (4) when the run to resume had another config or other data and --force is not given.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file, not a folder", "another --exp-name")
    if resume:
        if not can_resume(folder):
            raise ConfigError(f"{folder}: no run to resume", "without --resume this starts one")
        changed = changes(folder, resolved.config, lineage) if holds_run(folder) else []
        if changed and not force:
            shown = "; ".join(changed[:SHOWN_DIFFERENCES])
            more = f" (and {len(changed) - SHOWN_DIFFERENCES} more)" if len(changed) > SHOWN_DIFFERENCES else ""
            raise CheckpointError(
                f"{folder}: cannot resume, settings differ from the saved run: {shown}{more}",
                "--resume alone takes the run's own settings; --resume --force goes on with the new ones",
            )
        return [f"resuming with other settings: {text}" for text in changed]
    if holds_run(folder) and not force:
        raise ConfigError(
            f"{folder}: holds a run already",
            "--resume goes on with it, --force moves it aside and starts anew, or another --exp-name",
        )
    return []


def changes(folder: Path, config: GadConfig, lineage: dict[str, Any]) -> list[str]:
    """What differs between a folder's run and this launch, a line each: keys that matter, then the data itself."""
    if not (folder / CONFIG_FILE).exists():
        return []
    before = load_resolved(folder / CONFIG_FILE)
    if before.stage != config.stage:
        return [f"stage {before.stage} -> {config.stage}"]
    found = [f"{key} {old} -> {new}" for key, old, new in differences(before, config) if not is_neutral(key)]
    old_data = read_lineage(folder).get("data", {})
    new_data = lineage.get("data", {})
    changed = [name for name in new_data if name in old_data and old_data[name]["sha256"] != new_data[name]["sha256"]]
    return found + [f"contents of {name} have changed" for name in changed]


def read_lineage(folder: Path) -> dict[str, Any]:
    """A run's lineage.json, {} where there is none."""
    try:
        lineage = json.loads((folder / LINEAGE_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return lineage if isinstance(lineage, dict) else {}


def move_aside(folder: Path) -> Path:
    """Rename a run's folder to NAME.bak-TIMESTAMP; nothing is deleted."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target = folder.with_name(f"{folder.name}.bak-{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.bak-{stamp}-{number}")
    folder.rename(target)
    return target


def open_folder(folder: Path) -> None:
    """Make the folder and see that it can be written; ConfigError (2) when it cannot, before anything is loaded."""
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        probe = folder / "logs" / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot write there ({error.strerror})", "trainer.output_dir=… or --exp-name names another place"
        ) from error


def write_run_files(folder: Path, resolved: Resolved, plan: dict[str, Any], lineage: dict[str, Any]) -> None:
    """config.yaml, plan.json and lineage.json; on resume the lineage keeps what it knew and notes this start."""
    before = read_lineage(folder)
    starts = [*before.get("starts", []), {"time": time.time()}]
    write_atomic(folder / CONFIG_FILE, resolved.to_yaml(with_origins=True))
    write_atomic(folder / PLAN_FILE, json.dumps(plan, indent=2) + "\n")
    write_atomic(folder / LINEAGE_FILE, json.dumps({**before, **lineage, "starts": starts}, indent=2) + "\n")
