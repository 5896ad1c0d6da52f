"""A stage in the world it was started in: a rank of another launcher, one machine of several; SLURM's job file."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

from gadcli.config.resolve import resolve
from gadcli.errors import ConfigError, ExitCode, PeerError
from gadcli.files import write_atomic
from gadcli.launch import environment, lifetime
from gadcli.launch import run_folder as folders
from gadcli.launch.display import say
from gadcli.launch.stage import StageRequest, prepare, run_stage, show_plan, take_folder, with_runs_own_config
from gadcli.launch.started_by import Place, Start, read_start

READY_WAIT_S = 300.0
READY_WAIT_S = 300.0


def start_stage(request: StageRequest, sbatch: Path | None = None) -> int:
    """Run a stage the way this process was started."""
    if sbatch is not None:
        return write_sbatch(request, sbatch)
    start = read_start(os.environ)
    request = in_its_world(request, start)
    if start.place is not None and not request.dry_run:
        return become_worker(request, start.place)
    return run_stage(request)


def in_its_world(request: StageRequest, start: Start) -> StageRequest:
    """The request with the world that this process was started in; what the user asks for is not overruled.

    Raises ConfigError (2) where the two differ, so that a world is never silently smaller than one of them says.
    """
    request = replace(request, notes=(*request.notes, *start.notes))
    place, node = start.place, start.node
    if place is None and node is None:
        return request
    asked = with_runs_own_config(request)
    trainer = resolve(
        asked.stage, asked.preset, asked.config_file, dict(asked.flags), list(asked.overrides)
    ).config.trainer
    if place is not None:
        _agree("trainer.nproc", trainer.nproc, place.local_world, "processes on this machine")
        _agree("trainer.nnodes", trainer.nnodes, place.world // place.local_world, "machines")
        world = {"trainer.nproc": place.local_world, "trainer.nnodes": place.world // place.local_world}
        return replace(
            request, flags={**request.flags, **world}, is_rank=True, rdzv_endpoint=f"{place.host}:{place.port}"
        )
    assert node is not None
    if request.rdzv_endpoint:
        return replace(request, notes=(*request.notes, "--rdzv-endpoint is given: the environment's world is not used"))
    _agree("trainer.nnodes", trainer.nnodes, node.count, "machines")
    if request.node_rank not in (None, node.rank):
        raise ConfigError(
            f"--node-rank is {request.node_rank}, but this is machine {node.rank} of {node.count} by the environment",
            "leave it out, or give --rdzv-endpoint too: the environment then counts for nothing",
        )
    flags = {**request.flags, "trainer.nnodes": node.count}
    if node.nproc and not trainer.nproc:
        flags["trainer.nproc"] = node.nproc
    return replace(request, flags=flags, node_rank=node.rank, rdzv_endpoint=node.endpoint)


def _agree(key: str, asked: int, given: int, what: str) -> None:
    """nproc 0 and nnodes 1 are the defaults, which ask for nothing."""
    if asked not in (given, 0) and (key, asked) != ("trainer.nnodes", 1):
        raise ConfigError(
            f"{key} is {asked}, but this was started as part of {given} {what}",
            f"{key}={given} or without it; or change what the launcher starts",
        )


# -- being a worker ----------------------------------------------------------------------------------------------------


def become_worker(request: StageRequest, place: Place) -> int:
    """Rank 0 prepares the folder, the others wait for it; then each turns into a worker. Does not return."""
    if not request.resume:
        named = resolve(request.stage, request.preset, request.config_file, dict(request.flags), request.overrides)
        again = place.restarted or lifetime.started_before(folders.run_dir_of(named.config) / "logs")
        request = replace(request, resume=again)
    # The others look at the same data and config, so that all fail alike, but only rank 0 writes.
    prepared = prepare(request if place.rank == 0 else replace(request, force=True))
    ready = prepared.run_dir / "logs" / "ready.json"
    if place.rank == 0:
        show_plan(prepared, request)
        take_folder(prepared, request)
        folders.write_run_files(prepared.run_dir, prepared.resolved, prepared.plan.to_json(), prepared.lineage)
        write_atomic(ready, json.dumps({"launch": place.launch_id, "resume": request.resume}))
        say(sys.stderr, f"gad: rank 0 of {place.world} logs to {prepared.run_dir / 'logs'}")
    else:
        _wait_for(ready, place.launch_id)
    env = environment.base_env(place.local_world, one_node=place.local_world == place.world)
    env |= place.variables | {lifetime.LOG_DIR_VARIABLE: str(prepared.run_dir / "logs")}
    words = ["--run-dir", str(prepared.run_dir), *(["--resume"] if request.resume else [])]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(
        sys.executable,
        [sys.executable, "-P", "-m", "gadcli.launch.lifetime", request.worker_module, *words],
        env,
    )


def _wait_for(ready: Path, launch_id: str) -> None:
    deadline = time.monotonic() + READY_WAIT_S
    while time.monotonic() < deadline:
        try:
            if json.loads(ready.read_text())["launch"] == launch_id:
                return
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.2)
    raise PeerError(
        f"{ready}: rank 0 did not prepare the run's folder within {READY_WAIT_S:.0f} s",
        "all machines must see the same folder (trainer.output_dir)",
    )


# -- the job file ------------------------------------------------------------------------------------------------------


def write_sbatch(request: StageRequest, path: Path) -> int:
    """Write a SLURM job file that runs this very command, one task per machine, told to save before time is up."""
    prepared = prepare(replace(request, rdzv_endpoint=request.rdzv_endpoint or "slurm"))
    if path.exists() and not request.force:
        raise ConfigError(f"{path}: exists", "--force writes over it, or name another file")
    config = prepared.config
    words = [word for word in without_option(sys.argv[1:], "--sbatch") if word != "--force"]
    command = " ".join(shlex.quote(word) for word in [sys.executable, "-m", "gadcli.cli.app", *words])
    gpus = [] if config.trainer.device == "cpu" else [f"#SBATCH --gpus-per-node={prepared.nproc}"]
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={prepared.run_dir.name}",
        f"#SBATCH --nodes={config.trainer.nnodes}",
        "#SBATCH --ntasks-per-node=1",
        *gpus,
        f"#SBATCH --output={prepared.run_dir.name}-%j.log",
        "#SBATCH --signal=TERM@300   # five minutes before the end: finish the step, save, leave",
        "#SBATCH --requeue",
        "",
        "# A requeued job goes on from its last checkpoint.",
        'again=""; [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && again="--resume"',
        f"srun --kill-on-bad-exit=1 {command} $again",
    ]
    path.write_text("\n".join(lines) + "\n")
    say(sys.stderr, f"gad: wrote {path}; sbatch {path} submits it")
    return int(ExitCode.OK)


def without_option(words: list[str], option: str) -> list[str]:
    """A command line without one option and its value, in either spelling."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word == option:
            skip = True
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept
