"""Collecting teacher answers from a server of ours on loopback: retries, marks, kills, costs, and no key in sight."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_rows import make_tokenizer, user
from gadcli.cli.app import run
from gadcli.endpoint import client
from teacher_server import Teacher

SECRET = "sk-canary-0123456789abcdef"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


def prompts_file(tmp_path: Path, texts: list[str]) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"content": user(t)}) + "\n" for t in texts))
    return str(path)


def words(tmp_path: Path, teacher: Teacher, prompts: str, *more: str) -> list[str]:
    out = str(tmp_path / "out.parquet")
    return [
        "data",
        "collect",
        prompts,
        "-o",
        out,
        "--endpoint",
        teacher.url,
        "--model",
        "teacher",
        "--timeout",
        "20",
        *more,
    ]


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return pq.read_table(tmp_path / "out.parquet").to_pylist()


def test_answers_come_in_the_prompts_order_and_train_as_they_are(tmp_path: Path) -> None:
    texts = [f"q{i}" for i in range(40)]
    with Teacher() as teacher:
        code = run(
            words(tmp_path, teacher, prompts_file(tmp_path, texts), "--max-tokens", "64", "--temperature", "0.5")
        )
    assert code == 0
    assert [r["content"] for r in rows(tmp_path)] == [user(t) for t in texts]
    assert [r["teacher_response"] for r in rows(tmp_path)] == [f"answer to {t}" for t in texts]
    assert teacher.bodies[0]["max_tokens"] == 64
    assert teacher.bodies[0]["temperature"] == 0.5
    make_tokenizer().save_pretrained(tmp_path / "model")
    assert run(["data", "check", str(tmp_path / "out.parquet"), "-t", str(tmp_path / "model"), "-q"]) == 0


@pytest.mark.parametrize("fault", ["throttle", "crash", "drop", "half", "garbage"])
def test_a_passing_fault_is_retried_until_the_answer_comes(fault: str, tmp_path: Path) -> None:
    with Teacher() as teacher:
        assert run(words(tmp_path, teacher, prompts_file(tmp_path, [f"{fault} me", "plain"]), "-q")) == 0
    assert teacher.requests[f"{fault} me"] == (2 if fault == "garbage" else 3)
    assert teacher.requests["plain"] == 1
    assert len(rows(tmp_path)) == 2


def test_a_lasting_fault_ends_in_exit_3_and_is_asked_again_next_time(tmp_path: Path, capsys: Any) -> None:
    prompts = prompts_file(tmp_path, ["down", "fine"])
    with Teacher() as teacher:
        assert run(words(tmp_path, teacher, prompts, "--retries", "1", "-q")) == 3
        assert "1 of 2 prompts got no answer" in capsys.readouterr().err
        assert len(rows(tmp_path)) == 1
        assert run(words(tmp_path, teacher, prompts, "--retries", "1", "-q")) == 3
    assert teacher.requests == {"down": 4, "fine": 1}


def test_an_endpoint_that_is_down_ends_the_run_soon_and_the_rest_is_asked_when_it_is_back(
    tmp_path: Path, capsys: Any
) -> None:
    """Else a million prompts would each wait through all their retries."""
    texts = ["good", *[f"down {i}" for i in range(200)]]
    command = ["--retries", "1", "--concurrency", "2", "-q"]
    with Teacher() as teacher:
        assert run(words(tmp_path, teacher, prompts_file(tmp_path, texts), *command)) == 3
    assert "prompts in a row got no answer" in capsys.readouterr().err
    # 8 prompts asked twice each, and at most one more by the other worker.
    assert 16 <= sum(n for text, n in teacher.requests.items() if text != "good") <= 18
    assert [r["teacher_response"] for r in rows(tmp_path)] == ["answer to good"]
    with Teacher() as teacher:
        back = prompts_file(tmp_path, ["good", "up"])
        assert run(words(tmp_path, teacher, back, *command)) == 0
    assert teacher.requests == {"up": 1}


def test_failures_between_answers_do_not_end_the_run(tmp_path: Path) -> None:
    texts = [f"{'down' if i % 2 else 'fine'} {i}" for i in range(40)]
    with Teacher() as teacher:
        more = ("--retries", "0", "--concurrency", "1", "-q")
        assert run(words(tmp_path, teacher, prompts_file(tmp_path, texts), *more)) == 3
    assert len(rows(tmp_path)) == 20
    assert sum(teacher.requests.values()) == 40


def test_refusals_and_cut_answers_are_marked_and_left_out_unless_asked_for(tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path, ["fine", "cut", "filter", "refuse", "reject"])
    with Teacher() as teacher:
        assert run(words(tmp_path, teacher, prompts, "-q")) == 0
        assert [r["content"][0]["content"] for r in rows(tmp_path)] == ["fine"]
        assert run(words(tmp_path, teacher, prompts, "-q", "--exclude", "none")) == 0
    assert {r["content"][0]["content"]: r["status"] for r in rows(tmp_path)} == {
        "fine": "ok", "cut": "truncated", "filter": "refused", "refuse": "refused",
    }  # fmt: skip
    assert set(teacher.requests.values()) == {1}  # the second run paid for nothing


def test_repeated_prompts_are_asked_once_and_other_settings_anew(tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path, ["same", "same", "other"])
    with Teacher() as teacher:
        assert run(words(tmp_path, teacher, prompts, "-q")) == 0
        assert teacher.requests == {"same": 1, "other": 1}
        assert run(words(tmp_path, teacher, prompts, "-q", "--temperature", "0.1")) == 0
        assert teacher.requests == {"same": 2, "other": 2}


def test_requests_at_once_stay_within_concurrency(tmp_path: Path) -> None:
    with Teacher(delay_s=0.05) as teacher:
        prompts = prompts_file(tmp_path, [f"q{i}" for i in range(24)])
        assert run(words(tmp_path, teacher, prompts, "-q", "--concurrency", "6")) == 0
    assert 2 <= teacher.most_at_once <= 6


def test_a_refused_key_stops_at_once_and_appears_nowhere(tmp_path: Path, capfd: Any) -> None:
    with Teacher(status=401) as teacher:
        prompts = prompts_file(tmp_path, [f"q{i}" for i in range(50)])
        assert run(words(tmp_path, teacher, prompts, "--concurrency", "4")) == 2
    assert teacher.keys == {f"Bearer {SECRET}"}
    assert sum(teacher.requests.values()) <= 8
    out, err = capfd.readouterr()
    assert "401" in err
    assert "Traceback" not in err
    everything = out + err + "".join(p.read_text(errors="replace") for p in tmp_path.iterdir())
    assert SECRET not in everything
    assert "canary" not in everything


def test_a_password_in_the_url_is_not_repeated(tmp_path: Path, capfd: Any) -> None:
    with Teacher(status=401) as teacher:
        command = words(tmp_path, teacher, prompts_file(tmp_path, ["q"]))
        command[command.index(teacher.url)] = teacher.url.replace("//", "//me:hunter2@")
        assert run(command) == 2
    out, err = capfd.readouterr()
    assert "//***@127.0.0.1" in err
    assert "hunter2" not in out + err


def test_an_endpoint_that_rejects_everything_is_a_wrong_request(tmp_path: Path) -> None:
    with Teacher() as teacher:
        prompts = prompts_file(tmp_path, [f"reject {i}" for i in range(60)])
        assert run(words(tmp_path, teacher, prompts, "-q", "--concurrency", "1")) == 2
    assert sum(teacher.requests.values()) == 5


def test_the_cost_is_told(tmp_path: Path, capsys: Any) -> None:
    with Teacher() as teacher:
        prompts = prompts_file(tmp_path, [f"q{i}" for i in range(10)])
        prices = ("--price-in", "1000", "--price-out", "2000")
        assert run(words(tmp_path, teacher, prompts, "--json", *prices)) == 0
    told = json.loads(capsys.readouterr().out)
    # 10 answers of 10 prompt and 5 answer tokens: 100 * 1000/1e6 + 50 * 2000/1e6 = 0.2
    assert (told["tokens_in"], told["tokens_out"]) == (100, 50)
    assert told["cost"] == pytest.approx(0.2)


def test_plain_text_prompts_and_a_system_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "hello"}\n{"prompt": "[1] is a list"}\n{"prompt": null}\n')
    with Teacher() as teacher:
        more = ("--prompt-key", "prompt", "--system", "be brief", "-q")
        assert run(words(tmp_path, teacher, str(path), *more)) == 0
    assert teacher.bodies[0]["messages"] == [{"role": "system", "content": "be brief"}, *user("hello")]
    assert rows(tmp_path)[0]["prompt"][0] == {"role": "system", "content": "be brief"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_in_the_middle_it_goes_on_without_paying_twice(how: signal.Signals, tmp_path: Path) -> None:
    count, concurrency = 60, 4
    prompts = prompts_file(tmp_path, [f"q{i}" for i in range(count)])
    journal = tmp_path / "out.parquet.journal.jsonl"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with Teacher(delay_s=0.05) as teacher:
        command = words(tmp_path, teacher, prompts, "--concurrency", str(concurrency))
        child = subprocess.Popen(
            [sys.executable, "-m", "gadcli.cli.app", *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 60
        while (not journal.exists() or journal.read_bytes().count(b"\n") < 15) and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(how)
        _, err = child.communicate(timeout=30)
        assert b"Traceback" not in err
        if how == signal.SIGINT:
            assert child.returncode == 130
            assert b"run the same command to resume" in err
        paid = journal.read_bytes().count(b"\n")
        assert 15 <= paid < count
        with open(journal, "ab") as file:
            file.write(b'{"key": "torn')  # as a kill in the middle of a write leaves it
        assert run([*command, "-q"]) == 0
    assert [r["teacher_response"] for r in rows(tmp_path)] == [f"answer to q{i}" for i in range(count)]
    # Only what was in flight at the kill was asked twice.
    assert sum(teacher.requests.values()) <= count + concurrency


def test_two_collectors_on_one_file_are_refused(tmp_path: Path, capsys: Any) -> None:
    from gadcli.endpoint.journal import Journal

    with Teacher() as teacher, Journal(tmp_path / "out.parquet.journal.jsonl"):
        assert run(words(tmp_path, teacher, prompts_file(tmp_path, ["q"]), "-q")) == 2
    assert "another collect" in capsys.readouterr().err


def test_a_file_that_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.parquet").write_text("precious")
    with Teacher() as teacher:
        assert run(words(tmp_path, teacher, prompts_file(tmp_path, ["q"]), "-q")) == 2
    assert (tmp_path / "out.parquet").read_text() == "precious"
    assert not teacher.requests


def scripted(message: dict[str, Any], finish: str = "stop", usage: tuple[int, int] = (5, 7)) -> Any:
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    body = {"model": "m", "choices": [{"message": message, "finish_reason": finish}], "usage": counts}
    return lambda _: (200, body, {})


def test_reasoning_has_a_column_of_its_own(tmp_path: Path) -> None:
    script = scripted({"content": "It is 3", "reasoning_content": "First I think."})
    with Teacher(script=script) as teacher:
        assert run(words(tmp_path, teacher, prompts_file(tmp_path, ["q"]), "-q")) == 0
    assert [(r["teacher_response"], r["reasoning"]) for r in rows(tmp_path)] == [("It is 3", "First I think.")]
    with Teacher() as teacher:
        assert run(words(tmp_path, teacher, prompts_file(tmp_path, ["other"]), "-q")) == 0
    assert rows(tmp_path)[0]["reasoning"] is None


@pytest.mark.parametrize(
    ("message", "finish", "said"),
    [
        ({"content": None, "reasoning_content": "I thought until the end"}, "length", "3 truncated"),
        ({"content": "", "reasoning_content": "I thought, and stopped"}, "stop", "3 empty"),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls", "3 tool_call"),
        ({"content": "I'm sorry, but I can't help with that."}, "stop", "3 refused"),
    ],
)
def test_a_file_without_one_usable_answer_is_a_data_error(
    message: dict[str, Any], finish: str, said: str, tmp_path: Path, capsys: Any
) -> None:
    prompts = prompts_file(tmp_path, ["a", "b", "c"])
    with Teacher(script=scripted(message, finish)) as teacher:
        assert run(words(tmp_path, teacher, prompts, "-q")) == 3
        assert said in capsys.readouterr().err
        assert run(words(tmp_path, teacher, prompts, "-q")) == 3
    assert len(teacher.bodies) == 3  # answers without use are paid for once too
    assert rows(tmp_path) == []


def test_several_answers_per_prompt_are_rows_of_their_own(tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path, ["a", "b"])
    with Teacher() as teacher:
        assert run(words(tmp_path, teacher, prompts, "-q")) == 0
        assert run(words(tmp_path, teacher, prompts, "-q", "--n", "3")) == 0
    assert teacher.requests == {"a": 3, "b": 3}  # the first answer of each is that of the first run
    assert [r["content"][0]["content"] for r in rows(tmp_path)] == ["a", "a", "a", "b", "b", "b"]


def test_the_budget_is_never_exceeded_and_counts_earlier_runs(tmp_path: Path, capsys: Any) -> None:
    """An answer costs 5 * 100/1e6 + 7 * 500/1e6 = 0.004: a budget of 0.03 pays for 7, one of 0.05 for 12."""
    prompts = prompts_file(tmp_path, [f"q{i}" for i in range(30)])
    money = ("--price-in", "100", "--price-out", "500", "--concurrency", "4")
    with Teacher(script=scripted({"content": "fine"})) as teacher:
        assert run(words(tmp_path, teacher, prompts, *money, "--budget", "0.03")) == 0
        assert "stopped at the budget of 0.03: 23 not asked, 0.0280 spent" in capsys.readouterr().out
        assert (len(teacher.bodies), len(rows(tmp_path))) == (7, 7)
        assert run(words(tmp_path, teacher, prompts, *money, "--budget", "0.05", "--json")) == 0
        assert json.loads(capsys.readouterr().out)["spent"] == pytest.approx(0.048)
        assert len(teacher.bodies) == 12
        assert run(words(tmp_path, teacher, prompts, *money, "--budget", "0.05", "-q")) == 0
    assert len(teacher.bodies) == 12  # nothing more fits


def test_a_budget_needs_an_endpoint_that_counts_tokens(tmp_path: Path, capsys: Any) -> None:
    prompts = prompts_file(tmp_path, ["a", "b", "c"])
    with Teacher(script=scripted({"content": "fine"}, usage=(0, 0))) as teacher:
        assert run(words(tmp_path, teacher, prompts, "-q", "--price-out", "1", "--budget", "1")) == 2
    assert len(teacher.bodies) == 1
    assert "--budget cannot be kept" in capsys.readouterr().err


def test_credit_that_ends_half_way_leaves_what_was_paid_for(tmp_path: Path, capsys: Any) -> None:
    prompts = prompts_file(tmp_path, [f"q{i}" for i in range(9)])
    quota = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    with Teacher() as teacher:
        answer = scripted({"content": "fine"})
        teacher.script = lambda body: answer(body) if len(teacher.bodies) <= 4 else (429, quota, {})
        assert run(words(tmp_path, teacher, prompts, "-q", "--concurrency", "1")) == 3
        assert "no credit is left" in capsys.readouterr().err
        assert (len(rows(tmp_path)), len(teacher.bodies)) == (4, 5)
        teacher.script = answer
        assert run(words(tmp_path, teacher, prompts, "-q")) == 0
    assert (len(rows(tmp_path)), len(teacher.bodies)) == (9, 10)


def test_rejected_requests_are_asked_again_once_the_endpoint_takes_them(tmp_path: Path) -> None:
    """While nothing at all was answered, the fault is the request's or the server's, not a prompt's."""
    prompts = prompts_file(tmp_path, [f"q{i}" for i in range(6)])
    with Teacher(script=lambda _: (400, {"error": {"message": "no chat template"}}, {})) as teacher:
        assert run(words(tmp_path, teacher, prompts, "-q", "--concurrency", "1")) == 2
        teacher.script = scripted({"content": "fine"})
        assert run(words(tmp_path, teacher, prompts, "-q")) == 0
    assert len(rows(tmp_path)) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--extra-body", "{"], "not JSON"),
        (["--extra-body", "[1]"], "not a JSON object"),
        (["--extra-body", '{"messages": []}'], "which gad sets itself"),
        (["--budget", "3"], "--budget needs prices"),
        (["--n", "2", "--temperature", "0"], "equal answers"),
        (["--endpoint", "teacher/v1"], "not an http"),
        (["--endpoint", "https://teacher/v1/chat/completions"], "give the base address"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_asked(
    options: list[str], said: str, tmp_path: Path, capsys: Any
) -> None:
    with Teacher() as teacher:
        assert run(words(tmp_path, teacher, prompts_file(tmp_path, ["q"]), *options)) == 2
    assert said in capsys.readouterr().err
    assert not teacher.bodies
    assert not (tmp_path / "out.parquet").exists()


def test_extra_fields_are_sent_and_change_what_is_asked(tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path, ["q"])
    with Teacher() as teacher:
        assert run(words(tmp_path, teacher, prompts, "-q")) == 0
        assert run(words(tmp_path, teacher, prompts, "-q", "--extra-body", '{"seed": 7}')) == 0
    assert [body.get("seed") for body in teacher.bodies] == [None, 7]
