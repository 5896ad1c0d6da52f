"""How a command was started: by hand, under a user's own torchrun, or by SLURM; and SLURM's job file. No torch."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gadcli.config.resolve import resolve
from gadcli.errors import ConfigError, ExitCode, PeerError
from gadcli.files import write_atomic
from gadcli.launch import environment, lifetime
from gadcli.launch import run_folder as folders
from gadcli.launch.display import say
from gadcli.launch.stage import StageRequest, prepare, run_stage, show_plan, take_folder

READY_WAIT_S = 300.0
PORT_BASE, PORT_RANGE = 20_000, 20_000


@dataclass(frozen=True)
class Place:
    """One process of a world that somebody else started. `launch_id` tells this start from every earlier one."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    host: str
    port: int
    launch_id: str
    restarted: bool = False  # as far as the launcher's own variables say

    @property
    def variables(self) -> dict[str, str]:
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port),
        }


@dataclass(frozen=True)
class Node:
    """One machine of several, where this process is to start the workers."""

    rank: int
    count: int
    endpoint: str


def start_stage(request: StageRequest, sbatch: Path | None = None) -> int:
    """Run a stage the way this process was started."""
    if sbatch is not None:
        return write_sbatch(request, sbatch)
    place = torchrun_place(os.environ) or slurm_place(os.environ)
    if place is not None and not request.dry_run:
        return become_worker(request, place)
    return run_stage(on_node(request, slurm_node(os.environ)))


def on_node(request: StageRequest, node: Node | None) -> StageRequest:
    """The request with SLURM's machines filled in, where the user has not said otherwise."""
    if node is None or request.rdzv_endpoint:
        return request
    flags = {"trainer.nnodes": node.count, **request.flags}
    return replace(request, flags=flags, node_rank=node.rank, rdzv_endpoint=node.endpoint)


# -- who started us --------------------------------------------------------------------------------------------------


def torchrun_place(env: Mapping[str, str]) -> Place | None:
    """This process's place in a user's own `torchrun … -m gadcli.cli.app train …`; None when it is in none."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        return None
    restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
    # Not the count of restarts: it differs between machines when one follows another's restart.
    launch_id = f"{env.get('TORCHELASTIC_RUN_ID', 'static')}-{env['MASTER_PORT']}"
    return Place(
        int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")),
        int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])), env["MASTER_ADDR"], int(env["MASTER_PORT"]),
        launch_id, restarts > 0,
    )  # fmt: skip


def slurm_place(env: Mapping[str, str]) -> Place | None:
    """This task's place under `srun` with several tasks a machine (a task is a rank); None otherwise."""
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        return None
    tasks, nodes = int(env.get("SLURM_STEP_NUM_TASKS", "1")), int(env.get("SLURM_STEP_NUM_NODES", "1"))
    if tasks <= nodes:
        return None
    return Place(
        int(env["SLURM_PROCID"]), tasks, int(env.get("SLURM_LOCALID", "0")), tasks // nodes, *_meeting(env),
        f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}", int(env.get("SLURM_RESTART_COUNT", "0")) > 0,
    )  # fmt: skip


def slurm_node(env: Mapping[str, str]) -> Node | None:
    """This machine's number under `srun` with one task a machine; None on one machine or outside SLURM."""
    if "SLURM_STEP_ID" not in env or int(env.get("SLURM_STEP_NUM_NODES", "1")) < 2:
        return None
    host, port = _meeting(env)
    return Node(int(env["SLURM_NODEID"]), int(env["SLURM_STEP_NUM_NODES"]), f"{host}:{port}")


def _meeting(env: Mapping[str, str]) -> tuple[str, int]:
    """The first machine of the step, and a port that all its tasks derive alike."""
    hosts = expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    if not hosts:
        raise ConfigError("SLURM names no machines (SLURM_JOB_NODELIST is empty)", "--rdzv-endpoint HOST:PORT")
    return hosts[0], PORT_BASE + int(env.get("SLURM_JOB_ID", "0")) % PORT_RANGE


def expand_hosts(text: str) -> list[str]:
    """SLURM's short list of hosts, written out: `a[01-03,7],b` is a01 a02 a03 a7 b."""
    hosts = []
    for word in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)?", text):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", word)
        if match is None:
            hosts.append(word)
            continue
        head, inner, rest = match.groups()
        for part in inner.split(","):
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            hosts += [f"{head}{number:0{len(first)}d}{rest}" for number in numbers]
    return hosts


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
    """Write a SLURM job file that runs this very command, one task a machine, told to save before time is up."""
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
