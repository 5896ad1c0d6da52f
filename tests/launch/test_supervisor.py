"""The supervisor with real processes: exit codes kept, dead and frozen ranks noticed, signals passed on, nothing left.

Pins: a worker's own exit code and words come through · the first cause wins over its consequences · a killed rank ends
the run with 7 within 10 s · a stopped rank ends it within the time limit + 5 s · a busy rank is not taken for frozen ·
no descendant of any kind lives after INT, TERM, HUP or KILL of the parent.
"""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from launch.processes import Start, alive, wait_until

PEERS = 7


def test_a_run_that_ends_well_is_0_and_its_records_are_on_stdout(start: Start) -> None:
    code, out, err = start("steps=3").end()
    assert code == 0, err
    # one header, three steps, one end
    assert [json.loads(line)["type"] for line in out.splitlines()] == ["run", "step", "step", "step", "end"]


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6, 7])
def test_a_workers_exit_code_and_words_come_through(start: Start, code: int) -> None:
    got, _, err = start(f"steps=1 code={code}").end()
    assert got == code
    assert f"outcome {code} rank 0: what went wrong, where | what=to_do" in err


def test_a_traceback_without_a_record_is_a_bug_with_the_log_named(start: Start) -> None:
    code, _, err = start("steps=1 raise").end()
    assert code == 1
    assert "rank_0.log" in err and "tail ValueError: a bug for the log" in err


@pytest.mark.parametrize("status", [0, 1, 77])
def test_an_exit_from_inside_without_a_record_is_a_bug_with_the_logs_end(start: Start, status: int) -> None:
    code, _, err = start(f"steps=1 silent={status}").end()
    assert code == 1
    assert f"rank 0 exited with code {status} without an error record" in err and "tail rank 0 is up" in err


def test_an_abort_after_the_work_was_done_is_still_0(start: Start) -> None:
    assert start("steps=1 abort").end()[0] == 0


def test_the_rank_with_a_reason_of_its_own_is_named_and_the_waiting_one_is_ended(start: Start) -> None:
    parent = start("steps=1 code=3 rank=1 others", nproc=2)
    waiting = parent.pid_of("pid_0")
    code, _, err = parent.end(30)
    assert code == 3 and "outcome 3 rank 1: what went wrong, where" in err
    assert not alive(waiting)


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSEGV, "crashed in native code (SIGSEGV)")],
)
def test_a_killed_rank_ends_the_run_with_7_within_10_s(start: Start, number: signal.Signals, words: str) -> None:
    parent = start("steps=1 hang", nproc=2)
    victim, other = parent.pid_of("pid_1"), parent.pid_of("pid_0")
    parent.stepping()
    began = time.monotonic()
    os.kill(victim, number)
    code, _, err = parent.end()
    assert code == PEERS and time.monotonic() - began < 10
    assert f"outcome 7 rank 1: rank 1 {words}" in err
    assert not alive(other)


def test_a_stopped_rank_ends_the_run_within_the_limit_and_5_s(start: Start) -> None:
    parent = start("steps=1000 sleep=0.1", nproc=2, timeout_s=2.0)
    parent.stepping()
    frozen = parent.pid_of("pid_1")
    began = time.monotonic()
    os.kill(frozen, signal.SIGSTOP)
    code, _, err = parent.end()
    took = time.monotonic() - began
    assert code == PEERS and 2.0 <= took < 2.0 + 5.0
    assert "rank 1 is stopped" in err
    assert not alive(frozen)


def test_a_hanging_run_is_ended_and_its_stacks_are_in_the_log(start: Start) -> None:
    parent = start("steps=1 hang deaf", timeout_s=600)
    parent.stepping()
    pid = parent.pid_of("pid_0")
    os.kill(pid, signal.SIGUSR2)  # what the parent sends before it kills
    log = parent.run_dir / "logs" / "rank_0.log"
    assert wait_until(lambda: "misbehave" in log.read_text())
    assert alive(pid)


def test_a_busy_rank_that_writes_nothing_is_not_taken_for_frozen(start: Start) -> None:
    # 3 s of work without a record, with a limit of 1 s: processor time is a sign of life
    assert start("steps=1 spin=3", timeout_s=1.0).end()[0] == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)], ids=["INT", "TERM", "HUP"]
)
def test_a_signal_lets_the_workers_save_and_nothing_lives_after(
    start: Start, number: signal.Signals, code: int
) -> None:
    parent = start("steps=1000 sleep=0.1 child", nproc=2)
    parent.stepping()
    pids = [parent.pid_of(name) for name in ("pid_0", "pid_1", "child_0", "child_1")]
    os.kill(parent.process.pid, number)
    got, out, _ = parent.end(10)
    assert got == code
    assert "saved at step" in out or number == signal.SIGHUP  # after HUP nobody reads
    assert not any(map(alive, pids))


def test_a_stop_while_the_workers_load_ends_them_at_once(start: Start) -> None:
    parent = start("boot=60", nproc=2)
    pids = [parent.pid_of("pid_0"), parent.pid_of("pid_1")]
    os.kill(parent.process.pid, signal.SIGUSR1)  # too early to save anything: no reason to die of it
    time.sleep(0.3)
    assert all(map(alive, pids))
    os.kill(parent.process.pid, signal.SIGTERM)
    code, _, err = parent.end(10)
    assert code == 143 and "nothing to save" in err
    assert not any(map(alive, pids))


def test_nothing_lives_after_the_parent_itself_was_killed(start: Start) -> None:
    parent = start("steps=1000 sleep=0.1 child", nproc=2)
    parent.stepping()
    pids = [parent.pid_of(name) for name in ("pid_0", "pid_1", "child_0", "child_1")]
    parent.process.kill()
    assert wait_until(lambda: not any(map(alive, pids)), 10)


def test_a_frozen_worker_dies_with_a_killed_parent_too(start: Start) -> None:
    parent = start("steps=1000 sleep=0.1")
    parent.stepping()
    pid = parent.pid_of("pid_0")
    os.kill(pid, signal.SIGSTOP)
    parent.process.kill()
    assert wait_until(lambda: not alive(pid), 10)


def test_a_second_ctrl_c_ends_workers_that_do_not_listen(start: Start) -> None:
    parent = start("steps=1000 sleep=0.1 deaf", nproc=2)
    parent.stepping()
    pid = parent.pid_of("pid_0")
    os.kill(parent.process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert alive(pid) and parent.process.poll() is None
    os.kill(parent.process.pid, signal.SIGINT)
    code, _, err = parent.end(10)
    assert code == 130 and "nothing more was saved" in err
    assert not alive(pid)


def test_sigusr1_saves_and_goes_on(start: Start) -> None:
    parent = start("steps=20 sleep=0.1")
    parent.stepping()
    os.kill(parent.process.pid, signal.SIGUSR1)
    code, out, _ = parent.end()
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [r["kind"] for r in records if r["type"] == "event"] == ["save"]
    assert sum(r["type"] == "step" for r in records) == 20


def test_a_closed_stdout_does_not_stop_the_run(start: Start) -> None:
    parent = start("steps=10 sleep=0.1")
    assert parent.process.stdout is not None
    parent.process.stdout.close()
    assert parent.process.wait(20) == 0
    assert '"type":"end"' in (parent.run_dir / "metrics.jsonl").read_text()
