"""Worlds that the parent does not start alone: a user's torchrun, two launchers that meet, SLURM.

Pins: torchrun's ranks turn into workers, each with its log, over one folder · two launchers form one world and all end
with 0 · a rank killed on one machine ends both with 7, long before any collective's time limit · ranks that a launcher
starts again resume · what SLURM's variables mean · the job file asks for a signal before the end and goes on after a
requeue.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gadcli.launch.cluster import without_option
from gadcli.launch.environment import free_port
from gadcli.launch.started_by import Node, expand_hosts, slurm_node, slurm_place, torchrun_place
from launch.processes import HERE, SOURCE, alive, wait_until

GAD = str(HERE / "gad_process.py")
SEQKD = ["train", "seqkd", "--preset", "demo", "--model", "org/student", "--exp-name", "e",
         "data.train_files=train.parquet", "data.train_batch_size=8"]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    rows = [{"content": [{"role": "user", "content": str(i)}], "teacher_response": "x"} for i in range(16)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    return tmp_path


def begin(place: Path, words: list[str], does: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": f"{SOURCE}:{HERE}", "SMALL_WORKER": does, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *words], cwd=place, env=env, text=True, **pipes)


def two_launchers(place: Path, does: str, *more: str) -> list[subprocess.Popen[str]]:
    meeting = f"127.0.0.1:{free_port()}"
    world = ["--nnodes", "2", "--nproc", "1", "--rdzv-endpoint", meeting, *more]
    return [begin(place, [GAD, *SEQKD, *world, "--node-rank", str(node)], does) for node in range(2)]


def resumed_starts(metrics: Path) -> list[bool]:
    """Whether each start that a log holds went on from a checkpoint."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [record["resumed"] for record in records if record["type"] == "run"]


@pytest.mark.slow
def test_ranks_of_a_users_torchrun_become_workers_over_one_folder(place: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", GAD]
    process = begin(place, [*torchrun, *SEQKD], "steps=2")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    logs = place / "runs/e/logs"
    assert ["up" in (logs / f"rank_{rank}.log").read_text() for rank in range(2)] == [True, True]
    assert err.count("plan: seqkd") == 1  # rank 0 alone speaks


@pytest.mark.slow
def test_a_users_torchrun_that_restarts_its_ranks_goes_on_with_the_run(place: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1",
                f"--master-port={free_port()}", GAD]  # fmt: skip
    process = begin(place, [*torchrun, *SEQKD], "steps=60 sleep=0.1")
    metrics = place / "runs/e/metrics.jsonl"
    assert wait_until(lambda: metrics.exists() and '"step"' in metrics.read_text(), 90)
    victim = place / "runs/e/pid_1"
    assert wait_until(lambda: victim.exists() and victim.read_text() != "", 30)
    os.kill(int(victim.read_text()), signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert resumed_starts(metrics) == [False, True]


@pytest.mark.slow
def test_two_launchers_form_one_world_and_a_killed_rank_ends_both_with_7(place: Path) -> None:
    launchers = two_launchers(place, "steps=1 hang")
    pids = [place / "runs/e" / f"pid_{rank}" for rank in range(2)]
    assert wait_until(lambda: all(path.exists() and path.read_text() for path in pids), 90)
    victim, other = (int(path.read_text()) for path in pids)
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    errors = [launcher.communicate(timeout=60)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [7, 7], errors
    assert time.monotonic() - began < 20
    assert not alive(other)


@pytest.mark.slow
def test_a_killed_rank_under_two_launchers_is_started_again_and_all_resume(place: Path) -> None:
    launchers = two_launchers(place, "steps=60 sleep=0.1", "--max-restarts", "1")
    pids = [place / "runs/e" / f"pid_{rank}" for rank in range(2)]
    metrics = place / "runs/e/metrics.jsonl"
    assert wait_until(lambda: metrics.exists() and '"step"' in metrics.read_text(), 90)
    assert wait_until(lambda: all(path.exists() and path.read_text() for path in pids), 30)
    before = [int(path.read_text()) for path in pids]
    for pid in reversed(before):  # these workers have no collectives by which the first death would end the other
        os.kill(pid, signal.SIGKILL)
    errors = [launcher.communicate(timeout=90)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors
    assert all(int(path.read_text()) != pid for path, pid in zip(pids, before, strict=True))
    assert resumed_starts(metrics) == [False, True]


@pytest.mark.slow
def test_two_launchers_that_are_told_to_stop_save_and_end_with_143(place: Path) -> None:
    launchers = two_launchers(place, "steps=10000 sleep=0.1")
    path = place / "runs/e/metrics.jsonl"
    assert wait_until(lambda: path.exists() and '"step"' in path.read_text(), 90)
    for launcher in launchers:
        launcher.terminate()
    errors = [launcher.communicate(timeout=60)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [143, 143], errors
    assert "saved at step" in path.read_text()


def test_torchruns_variables_are_this_processs_place() -> None:
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h",
           "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "x"}  # fmt: skip
    place = torchrun_place(env)
    assert place is not None
    assert (place.rank, place.world, place.local_rank, place.local_world) == (3, 4, 1, 2)
    assert place.restarted and place.launch_id == "x-29500"
    assert torchrun_place({"RANK": "3"}) is None


SRUN = {"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[08-09]"}


def test_srun_with_a_task_a_machine_makes_each_a_launcher() -> None:
    env = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "1"}
    # port: 20000 + 71 % 20000
    assert slurm_node(env) == Node(1, 2, "gpu08:20071")
    assert slurm_place(env) is None


def test_srun_with_several_tasks_a_machine_makes_each_a_rank() -> None:
    env = {**SRUN, "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
    place = slurm_place(env)
    assert place is not None
    assert (place.rank, place.world, place.local_rank, place.local_world) == (5, 8, 1, 4)
    assert (place.host, place.port) == ("gpu08", 20071)


def test_a_single_machine_or_a_login_shell_is_no_slurm_world() -> None:
    assert slurm_node({"SLURM_JOB_ID": "71"}) is None and slurm_place({"SLURM_JOB_ID": "71"}) is None
    alone = {**SRUN, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert slurm_node(alone) is None and slurm_place(alone) is None


@pytest.mark.parametrize(
    ("short", "hosts"),
    [
        ("a1", ["a1"]),
        ("a[08-10]", ["a08", "a09", "a10"]),
        ("a[1,3-4],b", ["a1", "a3", "a4", "b"]),
        ("r[1-2]-x,c7", ["r1-x", "r2-x", "c7"]),
    ],
)
def test_slurms_short_host_lists_are_written_out(short: str, hosts: list[str]) -> None:
    assert expand_hosts(short) == hosts


def test_the_job_file_runs_this_command_and_is_told_before_time_is_up(place: Path) -> None:
    words = [GAD, *SEQKD, "--nnodes", "2", "--nproc", "4", "--sbatch", "job.sh"]
    process = begin(place, words, "")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    job = (place / "job.sh").read_text()
    assert "#SBATCH --nodes=2" in job and "--signal=TERM@300" in job and "--requeue" in job
    (command,) = [line for line in job.splitlines() if line.startswith("srun ")]
    assert "--sbatch" not in command and "data.train_files=train.parquet" in command and command.endswith("$again")
    assert subprocess.run(["bash", "-n", "job.sh"], cwd=place).returncode == 0
    assert not (place / "runs").exists()


def test_an_option_is_taken_out_of_a_command_line_in_both_spellings() -> None:
    assert without_option(["a", "--sbatch", "f", "b"], "--sbatch") == ["a", "b"]
    assert without_option(["a", "--sbatch=f", "b"], "--sbatch") == ["a", "b"]


def test_a_nodes_board_ignores_what_an_earlier_launch_left(tmp_path: Path) -> None:
    from gadcli.launch.supervisor import LaunchSpec, NodeBoard

    spec = LaunchSpec(tmp_path, nnodes=2, node_rank=0)
    spec.logs.mkdir()
    stale = spec.logs / "node_1.exit.json"
    stale.write_text(json.dumps({"code": 7}))
    os.utime(stale, (time.time() - 60, time.time() - 60))
    board = NodeBoard(spec)
    board.CHECK_EVERY_S = 0.0  # type: ignore[misc]
    board.begin()
    assert board.failed_elsewhere() is None
    stale.write_text(json.dumps({"code": 7}))
    assert board.failed_elsewhere() == 1
