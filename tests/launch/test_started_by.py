"""What the environment says of a world is obeyed, refused with exit 2, or ignored and said: never half believed.

Pinned here: a launcher's ranks have a LOCAL_RANK, a controller's machines have none · torchrun's own defaults (PET_*)
count before RANK and WORLD_SIZE · numbers that do not add up, or are none, are refused by name · processes of launchers
that we do not join are refused · a job's unused machines are reported · what the user asks for must agree with it.
"""

from __future__ import annotations

import pytest

from gadcli.errors import ConfigError
from gadcli.launch import environment
from gadcli.launch.cluster import in_its_world
from gadcli.launch.stage import StageRequest, prepare
from gadcli.launch.started_by import Node, Start, read_start, refuse_worlds

MASTER = {"MASTER_ADDR": "first", "MASTER_PORT": "23456"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MASTER}
PODS = {"RANK": "1", "WORLD_SIZE": "2", **MASTER}


def test_a_plain_shell_and_a_kubernetes_pod_are_no_world() -> None:
    assert read_start({"HOME": "/h", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "NCCL_DEBUG": "INFO"}) == Start()


def test_a_launchers_rank_is_one_whatever_else_is_set() -> None:
    start = read_start(TORCHRUN | {"OMPI_COMM_WORLD_SIZE": "4", "PET_NNODES": "2"})
    assert start.node is None and start.place is not None
    assert (start.place.rank, start.place.world, start.place.local_rank, start.place.local_world) == (3, 4, 1, 2)


@pytest.mark.parametrize(
    ("env", "node"),
    [
        (PODS, Node(1, 2, "first:23456")),
        # an operator that counts processes in WORLD_SIZE and machines in PET_NNODES
        (PODS | {"WORLD_SIZE": "4", "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "2",
                 "PET_MASTER_ADDR": "m", "PET_MASTER_PORT": "1234"}, Node(1, 2, "m:1234", 2)),
        ({"PET_NNODES": "3", "PET_NODE_RANK": "0", "PET_RDZV_ENDPOINT": "h:9", "PET_NPROC_PER_NODE": "auto"},
         Node(0, 3, "h:9")),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "4"}, Node(0, 1, "", 4)),
    ],
)  # fmt: skip
def test_a_controllers_machine_starts_its_share_of_the_workers(env: dict[str, str], node: Node) -> None:
    start = read_start(env)
    assert start.place is None and start.node == node
    assert "the environment" in " ".join(start.notes)


@pytest.mark.parametrize(
    "env",
    [{"WORLD_SIZE": "1", "RANK": "0", **MASTER}, {"WORLD_SIZE": "1", "RANK": "", **MASTER}, {"RANK": "0"},
     {"LOCAL_RANK": "0"}, {"PET_NNODES": "1", "WORLD_SIZE": "1"}],
)  # fmt: skip
def test_a_world_of_one_changes_nothing_and_is_reported(env: dict[str, str]) -> None:
    start = read_start(env)
    assert start.place is None and start.node is None
    (note,) = start.notes
    assert "one machine" in note and next(iter(env)) in note


@pytest.mark.parametrize(
    ("env", "named"),
    [
        (PODS | {"RANK": "first"}, "RANK='first'"),
        (PODS | {"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        (PODS | {"MASTER_PORT": "70000"}, "from 1 to 65535"),
        (PODS | {"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        (PODS | {"RANK": "2"}, "RANK=2"),  # of two
        ({"WORLD_SIZE": "2", **MASTER}, "WORLD_SIZE=2"),  # which of them?
        ({"RANK": "1"}, "RANK=1"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),  # where do they meet?
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3"),  # 4 processes on machines of 3
        ({"PET_NNODES": "1:4", "PET_RDZV_ENDPOINT": "h:1"}, "PET_NNODES=1:4"),
        ({"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "h:1"}, "does not add up"),  # no machine's number
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun started 4"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpiexec started 2"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NUM_NODES": "2"},
         "3 tasks on 2 machines"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "a"},
         "SLURM_PROCID='x'"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_refused_by_name_with_the_way_out(env: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_start(env)
    assert named in caught.value.message and caught.value.hint


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_a_network_interface_that_is_not_here_is_refused(variable: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable}=ib9: no such network interface"):
        read_start({variable: "ib9"})
    assert read_start({variable: "lo"}) == read_start({"NCCL_SOCKET_IFNAME": "^docker"}) == Start()


def test_a_job_whose_machines_are_not_used_is_reported() -> None:
    """salloc's shell, or a batch script without srun; and SLURM's interactive step, which is one task."""
    job = {"SLURM_JOB_ID": "5", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    for env in (job, job | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}):
        (note,) = read_start(env).notes
        assert "SLURM job 5 has 2 machines" in note and "srun gad" in note
    assert read_start({"SLURM_JOB_ID": "5", "SLURM_NNODES": "1", "SLURM_NTASKS": "1"}) == Start()


def test_settings_of_other_trainers_are_reported_and_do_not_reach_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With these two, transformers reads weights on the first rank alone."""
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING", "PET_STANDALONE")
    for name in names:
        monkeypatch.setenv(name, "true")
    (note,) = read_start(dict.fromkeys(names, "true")).notes
    assert "ACCELERATE_USE_FSDP" in note
    assert not set(names) & set(environment.base_env(2, one_node=True))


# ---- with what the user asks for ----


def request(*overrides: str, **more: object) -> StageRequest:
    flags = {"actor.model.path": "org/student", "trainer.device": "cpu"}
    return StageRequest("seqkd", "demo", flags=flags, overrides=overrides, dry_run=True, **more)  # type: ignore[arg-type]


def test_the_plan_under_a_launcher_is_of_the_whole_world() -> None:
    """A dry run counts the processes that the run would have: 4 on 2 machines."""
    asked = in_its_world(request(), read_start(TORCHRUN))
    assert prepare(asked).plan.world_size == 4
    asked = in_its_world(request("trainer.nproc=3"), read_start(PODS))
    assert prepare(replace_batch(asked)).plan.world_size == 6


def replace_batch(asked: StageRequest) -> StageRequest:
    import dataclasses

    return dataclasses.replace(asked, overrides=(*asked.overrides, "data.train_batch_size=12"))


@pytest.mark.parametrize(
    ("env", "override", "named"),
    [
        (TORCHRUN, "trainer.nproc=4", "part of 2 processes on this machine"),
        (TORCHRUN, "trainer.nnodes=3", "part of 2 machines"),
        (PODS, "trainer.nnodes=3", "part of 2 machines"),
    ],
)
def test_a_world_that_differs_from_what_is_asked_for_is_refused(env: dict[str, str], override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        in_its_world(request(override), read_start(env))


def test_a_meeting_point_of_the_users_counts_before_the_controllers_and_that_is_said() -> None:
    asked = in_its_world(request(rdzv_endpoint="mine:1", node_rank=0), read_start(PODS))
    assert (asked.rdzv_endpoint, asked.node_rank) == ("mine:1", 0)
    assert "not used" in asked.notes[-1]


def test_commands_of_one_machine_refuse_several(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PET_NNODES", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert refuse_worlds("gad run") == () or "another trainer" in refuse_worlds("gad run")[0]
    for name, value in PODS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="gad run runs on one machine"):
        refuse_worlds("gad run")
