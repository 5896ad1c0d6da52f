"""What listens while ranks of one machine work together: the kernel's list of sockets, in real process groups."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

from gadcli.launch import environment

SOURCE = Path(__file__).resolve().parents[2] / "src"
RANK = """
import json, sys, torch
from gadcli.config.schema import FsdpConfig
from gadcli.distributed.world import init_world, sum_over_ranks
sys.path.insert(0, sys.argv[1])
from test_sockets import listening
world = init_world("cpu", FsdpConfig())
assert sum_over_ranks([1.0]) == [2.0]
group = torch.distributed.new_group(backend="gloo")
torch.distributed.barrier(group)
print(json.dumps(listening()), flush=True)
torch.distributed.barrier()
"""


def listening() -> list[str]:
    """Addresses, as the kernel writes them, that this process listens on (TCP, both families)."""
    mine = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:["):
            mine.add(target[8:-1])
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in mine:  # 0A: LISTEN
                found.append(fields[1].partition(":")[0])
    return found


def is_loopback(address: str) -> bool:
    """127.0.0.0/8 and ::1, in the kernel's spelling (each four bytes in the machine's order)."""
    return address.endswith("7F") if len(address) == 8 else address in ("0" * 24 + "01000000",)


def test_two_ranks_of_one_machine_listen_on_loopback_only(tmp_path: Path) -> None:
    env = environment.base_env(2, one_node=True) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)}
    env |= {environment.STORE_VARIABLE: str(tmp_path / "store"), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(environment.free_port())}  # fmt: skip
    command = [sys.executable, "-c", RANK, str(Path(__file__).parent)]
    ranks = [
        subprocess.Popen(command, env=environment.rank_env(env, rank, 2, rank, 2), stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    found = [address for output in outputs for address in json.loads(output.splitlines()[-1])]
    assert found and all(map(is_loopback, found)), found


def test_a_socket_that_the_network_reaches_would_be_found() -> None:
    before = Counter(listening())  # this process may have process groups of other tests
    with socket.create_server(("0.0.0.0", 0)), socket.create_server(("127.0.0.1", 0)):
        found = Counter(listening()) - before
    assert sorted(is_loopback(address) for address in found.elements()) == [False, True]
