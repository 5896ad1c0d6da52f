"""The environment workers start with: what must stand before python does, and how ranks find each other. No torch."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import gadcli
from gadcli.config.machine import cache_folder, cores, gpus, version_of
from gadcli.launch.started_by import OTHER_TRAINERS, RANK_NAMES

LOOPBACK = "127.0.0.1"
SIOCGIFADDR = 0x8915  # Linux: an interface's IPv4 address
STORE_VARIABLE = "GAD_STORE_FILE"  # where ranks of one machine meet, in place of a socket

# Must stand before torch or vllm is imported. The first keeps vLLM's engine in the trainer's process, the rest quiet.
ENGINE_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TQDM_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
}


# vLLM compiles one small function of its log-probs with inductor: 10 to 28 s before the first rollout, and a C++
# compiler that a laptop may not have, for nothing that a CPU run would notice.
# glibc's heaps give tensors their memory, not the kernel: where it maps every tensor of 1 MiB and more, clearing pages
# takes as long as a step's products do. What stays free at the heap's top is bounded. glibc reads both at its start.
CPU_VARIABLES = {
    "TORCHDYNAMO_DISABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}
# Micro-batches of ever new lengths break the allocator's blocks into pieces of no use: segments that grow do not.
GPU_VARIABLES = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def engine_variables() -> dict[str, str]:
    """`ENGINE_VARIABLES`, and `GPU_VARIABLES` or, on machines without a GPU, `CPU_VARIABLES`."""
    return ENGINE_VARIABLES | (GPU_VARIABLES if gpu_count() else CPU_VARIABLES)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def address_towards(endpoint: str) -> str:
    """This machine's address on the way to HOST:PORT, which its peers reach it at; empty where there is no way."""
    host, _, port = endpoint.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port or 0), type=socket.SOCK_DGRAM)
        family, kind, protocol, _, target = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # of a datagram socket: asks the routing table, sends nothing
            return str(probe.getsockname()[0])
    except (OSError, ValueError, IndexError):
        return ""


def interface_of(address: str) -> str:
    """The network interface that has this IPv4 address; empty where none has (or the kernel does not say)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def reached_at(address: str) -> dict[str, str]:
    """Variables that make gloo and vLLM use this address, where they would ask the machine's name."""
    interface = interface_of(address) if address else ""
    return ({"GLOO_SOCKET_IFNAME": interface} if interface else {}) | ({"VLLM_HOST_IP": address} if address else {})


def gpu_count() -> int:
    """GPUs a worker would see, without importing torch: 0 where torch is a CPU build."""
    if (version_of("torch") or "").endswith("+cpu"):
        return 0
    return len(gpus())


def processes_here(nproc: int, device: str) -> int:
    """How many workers to start on this machine: what was asked, else one a GPU, else one."""
    if nproc > 0:
        return nproc
    return max(1, gpu_count()) if device != "cpu" else 1


def with_bytecode(env: dict[str, str]) -> dict[str, str]:
    """`env`, in which compiled modules are kept in our own cache folder if PYTHONDONTWRITEBYTECODE is set.

    Containers like to set it, so that no .pyc lies beside the sources; then each worker compiles torch and vLLM anew,
    10 s before its first step.
    """
    if env.get("PYTHONDONTWRITEBYTECODE") and not env.get("PYTHONPYCACHEPREFIX"):
        env = {name: value for name, value in env.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = str(cache_folder() / "bytecode")
    return env


def base_env(nproc: int, one_node: bool) -> dict[str, str]:
    """This process's environment with the engine's variables; what the user has set stays as set.

    Threads: the cores are shared out among the workers. More than one thread needs OMP_WAIT_POLICY=PASSIVE: spinning
    threads beside a busy core cut throughput tenfold.
    """
    # transformers and torch's launcher obey settings that other launchers left (FSDP_CPU_RAM_EFFICIENT_LOADING: weights
    # on rank 0 alone; PET_STANDALONE): `started_by` has told the user of them.
    env = {name: value for name, value in os.environ.items() if not name.startswith((*OTHER_TRAINERS, "PET_"))}
    for name, value in engine_variables().items():
        env.setdefault(name, value)
    threads = max(1, cores() // max(1, nproc))
    env.setdefault("OMP_NUM_THREADS", str(threads))
    if env["OMP_NUM_THREADS"] != "1":
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if one_node:  # every socket stays on this machine
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        for name, value in (
            ("GLOO_SOCKET_IFNAME", loopback),
            ("NCCL_SOCKET_IFNAME", loopback),
            ("TP_SOCKET_IFNAME", loopback),
            ("VLLM_HOST_IP", LOOPBACK),
        ):
            env.setdefault(name, value)
    env["PYTHONPATH"] = python_path()
    return with_bytecode(env)


def python_path() -> str:
    """PYTHONPATH for a child that is started with -P: a checkout that `gadcli` was imported from must be on it."""
    folder = Path(gadcli.__file__).resolve().parents[1]
    installed = folder.name in ("site-packages", "dist-packages")
    return os.pathsep.join(filter(None, ["" if installed else str(folder), os.environ.get("PYTHONPATH", "")]))


def rank_env(env: Mapping[str, str], rank: int, world: int, local_rank: int, local_world: int) -> dict[str, str]:
    """One rank's place in a world on this machine. A world of one needs no rendezvous, so it gets no variables."""
    if world == 1:
        return {name: value for name, value in env.items() if name not in RANK_NAMES}
    return {
        **env,
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world),
    }
