"""Two machines as far as the network can tell: two network namespaces joined by one cable (a pair of virtual cards).

Pins: two launchers, one in each, train one world over that cable, although the machine's name means 127.0.0.1 to both
(as /etc/hosts often has it) · the address and interface that lead to an endpoint.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gadcli.checkpoint.manifest import list_checkpoints, verify
from gadcli.launch.environment import address_towards, interface_of, reached_at
from train.training import SMALL, environment, records, write_inputs

ENTER = [
    "unshare",
    "-Urnm",
    "--kill-child",
]  # of a user, a network and a mount namespace: no root needed, all gone after
CABLE = """
mount -t tmpfs tmpfs /run && mkdir /run/netns || exit 99
for node in 0 1; do ip netns add n$node && ip -n n$node link set lo up || exit 99; done
ip link add card0 netns n0 type veth peer name card1 netns n1 || exit 99
for node in 0 1; do ip -n n$node addr add 10.77.0.1$node/24 dev card$node; ip -n n$node link set card$node up; done
"""
NODES = """
for node in 0 1; do nsenter --net=/run/netns/n$node "$@" --node-rank $node > out_$node 2>&1 & pids="$pids $!"; done
failed=0; for pid in $pids; do wait $pid || failed=$?; done; exit $failed
"""


def why_not() -> str:
    """Why namespaces cannot be had here; empty where they can."""
    missing = [name for name in ("unshare", "ip", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    tried = subprocess.run([*ENTER, "sh", "-c", CABLE], capture_output=True, text=True, check=False)
    return f"namespaces are not allowed: {tried.stderr.strip()[:200]}" if tried.returncode else ""


@pytest.mark.slow
def test_two_launchers_in_two_network_namespaces_train_one_world(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    inputs = write_inputs(tmp_path / "inputs")
    settings = [f"actor.model.path={inputs / 'model'}", f"data.train_files=[{inputs / 'train.parquet'}]",
                "data.val_rows=0", "trainer.device=cpu", "trainer.total_steps=2", "trainer.save_freq=1"]  # fmt: skip
    gad = [sys.executable, "-m", "gadcli", "train", "seqkd", "--preset", "demo", "--exp-name", "e", "--nnodes", "2",
           "--nproc", "1", "--rdzv-endpoint", "10.77.0.10:29511"]  # fmt: skip
    words = [*ENTER, "sh", "-c", CABLE + NODES, "sh", *gad, *SMALL, *settings]
    env = {name: value for name, value in environment().items() if name != "GLOO_SOCKET_IFNAME"}
    done = subprocess.run(words, cwd=tmp_path, env=env, timeout=300, check=False)
    logs = "".join(path.read_text()[-2000:] for path in [*tmp_path.glob("out_*"), *tmp_path.glob("runs/e/logs/*.log")])
    assert done.returncode == 0, logs
    run_dir = tmp_path / "runs/e"
    assert [r["step"] for r in records(run_dir) if r["type"] == "step"] == [1, 2]
    assert [verify(path).world_size for path in list_checkpoints(run_dir)] == [2, 2]


def test_the_way_to_an_endpoint_decides_the_address_and_its_interface() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
        here.bind(("127.0.0.1", 0))
        assert address_towards(f"127.0.0.1:{here.getsockname()[1]}") == "127.0.0.1"
    names = [name for _, name in socket.if_nameindex()]
    assert interface_of("127.0.0.1") in names and interface_of("203.0.113.7") == ""
    assert reached_at("127.0.0.1") == {"GLOO_SOCKET_IFNAME": interface_of("127.0.0.1"), "VLLM_HOST_IP": "127.0.0.1"}


@pytest.mark.parametrize("endpoint", ["", "no.such.host.invalid:29500", "127.0.0.1:port"])
def test_an_endpoint_that_leads_nowhere_leaves_the_choice_to_torch(endpoint: str) -> None:
    assert address_towards(endpoint) == "" and reached_at("") == {}
