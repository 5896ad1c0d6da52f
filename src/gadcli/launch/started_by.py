"""Who started this command, read from the environment: nobody, a launcher of ranks, or a controller of machines.

A launcher (torchrun, srun with several tasks per machine) starts one process per device and tells each its place. A job
controller (Kubernetes' training operators, srun with one task per machine) starts one process per machine and tells it
the machine's number: the workers are then ours to start. Whatever else the environment says of a world is refused where
it names more processes than we would start, and reported where it does not matter. No torch.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from gadcli.errors import ConfigError

PORT_BASE, PORT_RANGE = 20_000, 20_000
RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Launchers of processes that we do not join: the variable that holds their number.
OTHER_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec", "MV2_COMM_WORLD_SIZE": "mpirun",
    "JSM_NAMESPACE_SIZE": "jsrun", "PALS_NRANKS": "PALS", "FLUX_JOB_SIZE": "flux", "HOROVOD_SIZE": "horovodrun",
}  # fmt: skip
# Settings of other trainers, some of which transformers would act on in our workers (loading weights on rank 0 alone).
OTHER_TRAINERS = ("ACCELERATE_", "FSDP_", "DEEPSPEED_", "PARALLELISM_CONFIG_")


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
    """One machine of several, where this process is to start `nproc` workers (0: as many as asked for or fit)."""

    rank: int
    count: int
    endpoint: str
    nproc: int = 0


@dataclass(frozen=True)
class Start:
    """How this process was started: as a rank, as a machine of several, or (neither) by hand; `notes` for the user."""

    place: Place | None = None
    node: Node | None = None
    notes: tuple[str, ...] = ()


def read_start(env: Mapping[str, str]) -> Start:
    """Raises ConfigError (2) for variables that contradict each other or name processes that we know nothing of."""
    _check_interfaces(env)
    notes = tuple(_other_trainers(env))
    if "SLURM_STEP_ID" in env and (found := slurm_place(env) or slurm_node(env)):
        return Start(place=found, notes=notes) if isinstance(found, Place) else Start(node=found, notes=notes)
    if (place := torchrun_place(env)) is not None:
        return Start(place=place, notes=notes)
    node, more = controller_node(env)
    if node is None:
        _refuse_other_launchers(env)
        more += _slurm_job(env)
    return Start(node=node, notes=(*notes, *more))


def refuse_worlds(command: str) -> tuple[str, ...]:
    """For commands that run on one machine: ConfigError (2) under a launcher of several processes or machines."""
    start = read_start(os.environ)
    if (start.place is not None and start.place.world > 1) or (start.node is not None and start.node.count > 1):
        raise ConfigError(
            f"{command} runs on one machine, and the environment names several processes or machines",
            "gad train runs in them; start this command by itself",
        )
    return start.notes


# -- launchers of ranks ------------------------------------------------------------------------------------------------


def torchrun_place(env: Mapping[str, str]) -> Place | None:
    """This process's place in a user's own `torchrun … -m gadcli train …`, or another launcher that speaks like it.

    LOCAL_RANK is what tells a launcher's rank from a controller's machine. None without it.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= _given(env):
        return None
    rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE", least=1)
    local_rank, port = _number(env, "LOCAL_RANK"), _number(env, "MASTER_PORT", least=1, most=65535)
    local_world = _number(env, "LOCAL_WORLD_SIZE", least=1) if "LOCAL_WORLD_SIZE" in _given(env) else world
    if rank >= world or local_rank >= local_world or local_world > world or world % local_world:
        raise _contradiction(env)
    restarts = _number(env, "TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in _given(env) else 0
    # Not the count of restarts: it differs between machines when one follows another's restart.
    launch_id = f"{env.get('TORCHELASTIC_RUN_ID', 'static')}-{port}"
    return Place(rank, world, local_rank, local_world, env["MASTER_ADDR"], port, launch_id, restarts > 0)


def slurm_place(env: Mapping[str, str]) -> Place | None:
    """This task's place under `srun` with several tasks per machine (a task is a rank); None otherwise."""
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        return None
    tasks, nodes = _count(env, "SLURM_STEP_NUM_TASKS"), _count(env, "SLURM_STEP_NUM_NODES")
    if tasks <= nodes:
        return None
    if tasks % nodes:
        raise ConfigError(
            f"srun starts {tasks} tasks on {nodes} machines: every machine needs as many as the others",
            "srun --ntasks-per-node=N (a task is a rank), or one task per machine",
        )
    host, port = _meeting(env)
    return Place(
        _number(env, "SLURM_PROCID"), tasks, _number(env, "SLURM_LOCALID"), tasks // nodes, host, port,
        f"{env.get('SLURM_JOB_ID', '')}.{env['SLURM_STEP_ID']}", env.get("SLURM_RESTART_COUNT", "0") not in ("", "0"),
    )  # fmt: skip


# -- controllers of machines -------------------------------------------------------------------------------------------


def slurm_node(env: Mapping[str, str]) -> Node | None:
    """This machine's number under `srun` with one task per machine; None on one machine or outside SLURM."""
    if "SLURM_STEP_ID" not in env or _count(env, "SLURM_STEP_NUM_NODES") < 2:
        return None
    host, port = _meeting(env)
    return Node(_number(env, "SLURM_NODEID"), _count(env, "SLURM_STEP_NUM_NODES"), f"{host}:{port}")


def controller_node(env: Mapping[str, str]) -> tuple[Node | None, list[str]]:
    """The machine that a job controller says this is, and what the user should know of it.

    PET_* (torchrun's own defaults, which Kubernetes' operators set) count before RANK and WORLD_SIZE: these number the
    machines where no LOCAL_RANK stands beside them.
    """
    given = _given(env)
    if "PET_NNODES" in given:
        if ":" in env["PET_NNODES"]:
            raise ConfigError(
                f"PET_NNODES={env['PET_NNODES']}: a number of machines that may change is not supported",
                "a fixed number of machines, or trainer.nnodes=N with --rdzv-endpoint and --node-rank",
            )
        count, names = _number(env, "PET_NNODES", least=1), ["PET_NNODES"]
        rank_name = next((name for name in ("PET_NODE_RANK", "RANK") if name in given), "")
        per_machine = env.get("PET_NPROC_PER_NODE", "")
        nproc = int(per_machine) if per_machine.isdigit() else 0  # "auto", "gpu", "cpu": our own default
    elif given & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}:
        names = sorted(given & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})
        least = {name: 0 if name.endswith("RANK") else 1 for name in names}
        several = any(_number(env, name, least[name]) > least[name] for name in names)
        if several and ({"LOCAL_RANK", "LOCAL_WORLD_SIZE"} & given or not {"RANK", "WORLD_SIZE"} <= given):
            raise _contradiction(env)
        count, rank_name, nproc = _count(env, "WORLD_SIZE"), "RANK" if "RANK" in given else "", 0
    else:
        return None, []
    rank = _number(env, rank_name) if rank_name else 0
    told = ", ".join(f"{name}={env[name]}" for name in dict.fromkeys([*names, *filter(None, [rank_name])]))
    if count == 1:
        alone = [f"the environment names one machine ({told}): training on this one alone"]
        return (Node(0, 1, "", nproc) if nproc else None), alone
    if not rank_name or rank >= count:
        raise _contradiction(env)
    return Node(rank, count, _endpoint(env), nproc), [f"machine {rank} of {count}, by the environment ({told})"]


def _endpoint(env: Mapping[str, str]) -> str:
    """HOST:PORT where a controller's machines meet."""
    if "PET_RDZV_ENDPOINT" in _given(env):
        return env["PET_RDZV_ENDPOINT"]
    for prefix in ("PET_", ""):
        if {f"{prefix}MASTER_ADDR", f"{prefix}MASTER_PORT"} <= _given(env):
            return f"{env[f'{prefix}MASTER_ADDR']}:{_number(env, f'{prefix}MASTER_PORT', least=1, most=65535)}"
    raise ConfigError(
        "the environment names several machines and no MASTER_ADDR and MASTER_PORT to meet at",
        "--rdzv-endpoint HOST:PORT of the first machine, with --nnodes and --node-rank",
    )


def _meeting(env: Mapping[str, str]) -> tuple[str, int]:
    """The first machine of SLURM's step, and a port that all its tasks derive alike."""
    hosts = expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    if not hosts:
        raise ConfigError("SLURM names no machines (SLURM_JOB_NODELIST is empty)", "--rdzv-endpoint HOST:PORT")
    return hosts[0], PORT_BASE + (_number(env, "SLURM_JOB_ID") if "SLURM_JOB_ID" in env else 0) % PORT_RANGE


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


# -- what we do not join -----------------------------------------------------------------------------------------------


def _refuse_other_launchers(env: Mapping[str, str]) -> None:
    """Each of their processes would train alone, into one folder."""
    for name, launcher in OTHER_LAUNCHERS.items():
        if name in _given(env) and _number(env, name) > 1:
            raise ConfigError(
                f"{launcher} started {env[name]} processes ({name}), which gad does not join",
                f"start gad once per machine with --nproc N, or: env -u {name} gad … for this process alone",
            )


def _slurm_job(env: Mapping[str, str]) -> list[str]:
    """A job of several machines or tasks, and no step that would use them."""
    names = ("SLURM_JOB_NUM_NODES", "SLURM_NNODES", "SLURM_NTASKS")
    machines, nodes, tasks = (int(value) if (value := env.get(name, "")).isdigit() else 1 for name in names)
    if "SLURM_JOB_ID" not in env or max(machines, nodes, tasks) < 2:
        return []
    job = f"SLURM job {env['SLURM_JOB_ID']} has {max(machines, nodes)} machines and {tasks} tasks"
    return [f"{job}: this process trains alone on this machine (srun gad … uses all)"]


def _check_interfaces(env: Mapping[str, str]) -> None:
    """A cluster's image may name a network interface that this machine does not have: gloo and NCCL then fail late."""
    there = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        names = [name.lstrip("=") for name in env.get(variable, "").split(",") if name]
        if env.get(variable, "").startswith("^") or not names:  # NCCL's "all but"
            continue
        by_prefix = variable.startswith("NCCL")
        found = [any(here.startswith(name) if by_prefix else here == name for here in there) for name in names]
        if not (any(found) if by_prefix else all(found)):
            raise ConfigError(
                f"{variable}={env[variable]}: no such network interface here ({', '.join(there)})",
                f"correct it, or: env -u {variable} gad …",
            )


def _other_trainers(env: Mapping[str, str]) -> list[str]:
    names = sorted(name for name in env if name.startswith(OTHER_TRAINERS))
    return [f"settings of another trainer are not used: {', '.join(names[:4])}{' …' if names[4:] else ''}"] * bool(
        names
    )


def _given(env: Mapping[str, str]) -> set[str]:
    """Names of the variables that hold anything: an empty one says nothing."""
    return {name for name, value in env.items() if value.strip()}


def _count(env: Mapping[str, str], name: str) -> int:
    return _number(env, name, least=1) if name in _given(env) else 1


def _number(env: Mapping[str, str], name: str, least: int = 0, most: int = 2**31) -> int:
    text = env.get(name, "")
    if not text.strip().isdecimal() or not least <= int(text) <= most:
        limit = f" to {most}" if most < 2**31 else ""
        raise ConfigError(
            f"{name}={text!r} in the environment is not a number from {least}{limit}",
            f"correct it, or: env -u {name} gad … where nothing else started this process",
        )
    return int(text)


def _contradiction(env: Mapping[str, str]) -> ConfigError:
    told = ", ".join(f"{name}={env[name]}" for name in RANK_NAMES if name in _given(env))
    return ConfigError(
        f"the environment names a process of several, but does not add up: {told}",
        "a launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; for this process alone: "
        "env -u RANK -u WORLD_SIZE -u LOCAL_RANK gad …",
    )
