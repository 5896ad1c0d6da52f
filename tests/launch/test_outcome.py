"""From workers' ends to one outcome, and the environment they start with: pure functions over real values."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gadcli.launch import environment, lifetime
from gadcli.launch.outcome import LostRank, RankEnd, StopRequest, judge, last_words, oom_kills
from gadcli.launch.supervisor import lost_rank

NO_STOP = StopRequest()


def ended(code: int, message: str = "m") -> dict[str, object]:
    return {"code": code, "message": message, "hint": "h"}


def test_sigkill_is_7_and_6_when_the_kernel_killed_for_memory_meanwhile(tmp_path: Path) -> None:
    ends = [RankEnd(0, -signal.SIGKILL, 1.0)]
    assert judge(ends, tmp_path, NO_STOP).code == 7
    short = judge(ends, tmp_path, NO_STOP, oom=True)
    assert short.code == 6 and "memory" in short.message and "micro_batch_tokens" in short.hint
    # only SIGKILL is the kernel's way of freeing memory
    assert judge([RankEnd(0, -signal.SIGSEGV, 1.0)], tmp_path, NO_STOP, oom=True).code == 7


def test_the_kernels_kill_counters_are_summed_and_missing_ones_skipped(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 7\noom_kill 2\n")
    (tmp_path / "events").write_text("max 9\noom 5\noom_kill 3\noom_group_kill 4\n")
    paths = [str(tmp_path / name) for name in ("vmstat", "events", "absent")]
    assert oom_kills(paths) == 5  # 2 + 3


@pytest.mark.parametrize(
    ("ends", "code", "rank"),
    [
        # the peer's 7 came first, but it is a consequence of rank 1's 5
        ([RankEnd(0, 7, 1.0, record=ended(7)), RankEnd(1, 5, 2.0, record=ended(5))], 5, 1),
        # whom the parent killed is never the culprit
        ([RankEnd(0, -9, 1.0, ours=True), RankEnd(1, 3, 2.0, record=ended(3))], 3, 1),
        # of two with reasons of their own, the first
        ([RankEnd(0, 6, 2.0, record=ended(6)), RankEnd(1, 3, 1.0, record=ended(3))], 3, 1),
        # a killed rank counts before the peers that noticed
        ([RankEnd(0, 7, 1.0, record=ended(7)), RankEnd(1, -9, 2.0)], 7, 1),
    ],
)
def test_the_first_cause_wins_over_its_consequences(tmp_path: Path, ends: list[RankEnd], code: int, rank: int) -> None:
    outcome = judge(ends, tmp_path, NO_STOP)
    assert (outcome.code, outcome.rank) == (code, rank)


def test_what_a_rank_recorded_counts_more_than_how_its_process_went(tmp_path: Path) -> None:
    assert judge([RankEnd(0, -signal.SIGABRT, 1.0, record=ended(0))], tmp_path, NO_STOP).code == 0


def test_a_frozen_rank_is_named_even_when_its_peers_gave_up_first(tmp_path: Path) -> None:
    ends = [RankEnd(0, 7, 1.0, record=ended(7)), RankEnd(1, -9, 2.0, ours=True)]
    outcome = judge(ends, tmp_path, NO_STOP, LostRank(1, "rank 1 is stopped"))
    assert (outcome.code, outcome.rank, outcome.message) == (7, 1, "rank 1 is stopped")


def test_a_stop_before_the_workers_listened_is_an_interruption_and_no_loss(tmp_path: Path) -> None:
    stop = StopRequest(signal.SIGINT)
    assert judge([RankEnd(0, -signal.SIGINT, 1.0)], tmp_path, stop).code == 130
    # the same death without anyone asking is a loss
    assert judge([RankEnd(0, -signal.SIGINT, 1.0)], tmp_path, NO_STOP).code == 7


def test_a_logs_end_is_that_of_its_last_start_without_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("--- started 1 ---\nold\n--- started 2 ---\na\n\nb\x1b[31m\n \nc\n")
    assert last_words(tmp_path / "log", 2) == ["b[31m", "c"]
    assert last_words(tmp_path / "log") == ["a", "b[31m", "c"]
    (tmp_path / "log").write_text("old\n--- started 3 ---\n")
    assert last_words(tmp_path / "log") == last_words(tmp_path / "absent") == []


def test_after_a_crash_in_native_code_the_frames_where_it_happened_are_shown(tmp_path: Path) -> None:
    """A real one, in a deep stack with another thread: Python's report ends in what helps nobody."""
    program = (
        "import ctypes, faulthandler, threading, numpy; faulthandler.enable()\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "def culprit(): ctypes.string_at(0)\n"
        "def deep(n): deep(n - 1) if n else culprit()\n"
        "deep(40)"
    )
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([sys.executable, "-c", program], stderr=log, stdout=log, check=False)
    said = judge([RankEnd(0, done.returncode, 1.0)], tmp_path, NO_STOP)
    assert (said.code, said.message.split(";")[0]) == (7, "rank 0 crashed in native code (SIGSEGV)")
    told = last_words(tmp_path / "log")
    assert told[0] == "Fatal Python error: Segmentation fault" and len(told) <= 8
    assert any("in culprit" in line for line in told)


def test_a_success_or_a_stop_that_nobody_recorded_is_a_failure(tmp_path: Path) -> None:
    """os._exit(0) in a library, or in a user's reward function, is no run that is done."""
    for status in (0, 130, 143, 99):
        said = judge([RankEnd(0, status, 1.0)], tmp_path, NO_STOP)
        assert said.code == 1 and said.message == f"rank 0 exited with code {status} without an error record"
        assert said.tail == ["(the log is empty)"] and str(tmp_path / "rank_0.log") in said.hint


def test_the_rank_that_torchs_launcher_lost_is_read_from_its_log(tmp_path: Path) -> None:
    block = "[{}]:\n  time      : now\n  host      : h\n  rank      : {} (local_rank: 0)\n  exitcode  : {} (pid: 7)\n"
    log = tmp_path / "node_0.log"
    log.write_text(f"--- started 1 ---\nRoot Cause (first observed failure):\n{block.format(0, 9, -9)}"
                   f"--- started 2 ---\nFailures:\n{block.format(1, 2, -15)}"
                   f"Root Cause (first observed failure):\n{block.format(0, 1, -11)}")  # fmt: skip
    assert lost_rank(log) == (1, -11)
    assert lost_rank(tmp_path / "absent") is None


def test_cores_are_shared_out_and_waiting_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(environment, "cores", lambda: 8)
    assert environment.base_env(1, True)["OMP_NUM_THREADS"] == "8"
    assert environment.base_env(1, True)["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment.base_env(3, True)["OMP_NUM_THREADS"] == "2"  # 8 // 3
    alone = environment.base_env(16, True)
    assert alone["OMP_NUM_THREADS"] == "1" and "OMP_WAIT_POLICY" not in alone


def test_what_the_user_has_set_stays_and_hub_settings_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    env = environment.base_env(1, True)
    assert env["OMP_NUM_THREADS"] == "3" and env["GLOO_SOCKET_IFNAME"] == "eth7"
    assert "HF_HUB_OFFLINE" not in env
    assert env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_sockets_stay_on_loopback_on_one_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert environment.base_env(1, one_node=True)["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in environment.base_env(1, one_node=False)


def test_a_world_of_one_gets_no_rendezvous_variables() -> None:
    env = {"RANK": "5", "MASTER_PORT": "1", "HOME": "/h"}
    assert environment.rank_env(env, 0, 1, 0, 1) == {"HOME": "/h"}
    assert environment.rank_env({}, 1, 2, 1, 2)["RANK"] == "1"


def test_a_worker_that_its_launcher_starts_again_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["gadcli.train.worker", "--run-dir", "d"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert lifetime.with_resume(words, tmp_path) == words  # the first start
    assert lifetime.with_resume(words, tmp_path) == [*words, "--resume"]
    assert lifetime.with_resume([*words, "--resume"], tmp_path) == [*words, "--resume"]
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert lifetime.with_resume(words, tmp_path) == words  # another rank's first start
    monkeypatch.setattr(lifetime, "agent_key", lambda: "another launcher")
    assert lifetime.with_resume(words, tmp_path) == words  # a new launch over an old folder


def test_a_rank_that_ended_with_6_and_no_word_is_not_called_a_bug(tmp_path: Path) -> None:
    found = judge([RankEnd(0, 6, 1.0)], tmp_path, NO_STOP)
    assert found.code == 6 and "out of disk or memory" in found.message and "--resume" in found.hint


def test_workers_on_cpus_start_with_an_allocator_that_gives_tensors_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What glibc reads at a process's start must be in the environment it is started with; the user's word stands."""
    monkeypatch.setattr(environment, "gpu_count", lambda: 0)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert environment.base_env(1, one_node=True)["MALLOC_MMAP_THRESHOLD_"] == "33554432"
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert environment.base_env(1, one_node=True)["MALLOC_MMAP_THRESHOLD_"] == "65536"
    monkeypatch.setattr(environment, "gpu_count", lambda: 8)
    assert "TORCHDYNAMO_DISABLE" not in environment.engine_variables()


def test_where_bytecode_may_not_lie_beside_the_sources_workers_keep_it_in_our_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each start compiles torch and vLLM anew. What a real child writes, and where."""
    monkeypatch.setenv("GAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "a_module.py").write_text("x = 1\n")
    env = environment.base_env(1, one_node=True) | {"PYTHONPATH": str(tmp_path / "sources")}
    subprocess.run([sys.executable, "-c", "import a_module"], env=env, check=True)
    assert [path.suffix for path in (tmp_path / "sources").rglob("*") if path.is_file()] == [".py"]
    assert [path.name.split(".")[0] for path in (tmp_path / "cache" / "bytecode").rglob("a_module*")] == ["a_module"]

    monkeypatch.setenv("PYTHONPYCACHEPREFIX", "/elsewhere")
    assert environment.base_env(1, one_node=True)["PYTHONPYCACHEPREFIX"] == "/elsewhere"
    monkeypatch.delenv("PYTHONPYCACHEPREFIX")
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE")
    assert "PYTHONPYCACHEPREFIX" not in environment.base_env(1, one_node=True)
