"""Rewards in a process of their own: what they get; every way of failing is an error with the reward's name."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from gadcli.config.rewards import reward_specs
from gadcli.errors import ConfigError, UnhealthyError
from gadcli.rewards.answer import AnswerText
from gadcli.rewards.process import External


def items(*texts: str) -> list[AnswerText]:
    return [
        AnswerText([{"role": "user", "content": f"q{i}"}], text, f"t{i}", len(text), 3, True, row_id=10 + i)
        for i, text in enumerate(texts)
    ]


def python(tmp_path: Path, body: str, **more: float) -> External:
    file = tmp_path / "mine.py"
    file.write_text(body)
    (spec,) = reward_specs([{"name": "mine", "kind": "python", "function": f"{file}:f", **more}])
    return External(spec)


def test_a_function_gets_prompts_answers_and_rows_in_order(tmp_path: Path) -> None:
    reward = python(
        tmp_path,
        "def f(prompts, answers, rows):\n"
        "    assert prompts[1][0]['content'] == 'q1' and rows[1]['teacher_response'] == 't1'\n"
        "    assert [row['row_id'] for row in rows] == [10, 11, 12]\n"
        "    return [len(answer) for answer in answers]\n",
    )
    try:
        assert reward(items("a", "bbb", "")) == [1.0, 3.0, 0.0]
    finally:
        reward.close()


def test_the_child_stays_between_batches_and_prints_do_no_harm(tmp_path: Path) -> None:
    body = "import os\ndef f(p, a, rows):\n    print('noise', flush=True)\n    return [os.getpid()] * len(rows)\n"
    reward = python(tmp_path, body)
    try:
        first, second = reward(items("a")), reward(items("b"))
        assert first == second != [float(os.getpid())]
    finally:
        reward.close()


def test_a_batch_larger_than_any_pipe_passes_both_ways(tmp_path: Path) -> None:
    """64 KiB is a pipe's size; the command echoes 3 MB of input back on stderr while it answers."""
    reward = python(tmp_path, "def f(p, a, rows):\n    return [float(len(x)) for x in a]\n")
    try:
        assert reward(items(*["x" * 1_000_000] * 3)) == [1e6] * 3
    finally:
        reward.close()
    (spec,) = reward_specs([{"kind": "command", "command": "tee /dev/stderr | awk '{print (length($0) > 1000000)}'"}])
    assert External(spec)(items(*["x" * 1_000_000] * 3)) == [1.0] * 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(p, a, r):\n    raise KeyError('no such column')", "KeyError: 'no such column'"),
        ("def f(p, a, r):\n    return [1.0]", "1 scores for 2 answers"),
        ("def f(p, a, r):\n    return [1.0, None]", "None is not a number"),
        ("def f(p, a, r):\n    return ['1.0', 2]", "'1.0' is not a number"),
        ("def f(p, a, r):\n    import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL"),
        ("def f(p, a, r):\n    import sys\n    sys.exit(3)", "exit code 3"),
        ("def g():\n    pass", "has no attribute 'f'"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_a_failure_is_named_and_not_a_zero(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        python(tmp_path, body)(items("a", "b"))
    assert caught.value.message.startswith("reward mine (")
    assert message in caught.value.message


def test_nan_names_its_rows_and_is_unhealthy(tmp_path: Path) -> None:
    with pytest.raises(UnhealthyError, match=r"rows 11$"):
        python(tmp_path, "def f(p, a, r):\n    return [1.0, float('nan')]")(items("a", "b"))


def test_a_hang_ends_at_its_time_limit_with_all_that_it_started(tmp_path: Path) -> None:
    body = (
        "import subprocess, time\n"
        "def f(p, a, r):\n"
        f"    child = subprocess.Popen(['sleep', '60'])\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "    time.sleep(60)\n"
    )
    start = time.monotonic()
    with pytest.raises(ConfigError, match="no answer after 3 s"):
        python(tmp_path, body, timeout_s=3)(items("a"))
    assert time.monotonic() - start < 30
    pid = int((tmp_path / "pid").read_text())
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().split()[2] in "ZX"


def command(text: str, **more: float) -> External:
    (spec,) = reward_specs([{"name": "sh", "kind": "command", "command": text, **more}])
    return External(spec)


def test_a_command_reads_json_lines_and_prints_a_number_each() -> None:
    reward = command("python3 -c \"import sys, json; [print(len(json.loads(x)['answer'])) for x in sys.stdin]\"")
    assert reward(items("a", "bbb")) == [1.0, 3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo oops >&2; exit 4", "exit code 4 (oops)"),
        ("cat >/dev/null; echo 1", "1 scores for 2 answers"),
        ("cat >/dev/null; echo one; echo two", "not one number per line"),
        ("no-such-program-of-ours", "exit code 127"),
        ("kill -9 $$", "ended by SIGKILL"),
    ],
)
def test_a_commands_failure_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command(text)(items("a", "b"))
    assert message in caught.value.message


def test_a_command_that_hangs_is_ended() -> None:
    with pytest.raises(ConfigError, match="no answer after 1 s"):
        command("cat >/dev/null; sleep 60", timeout_s=1)(items("a"))
    with pytest.raises(ConfigError, match="no answer after 1 s"):  # closes its output, but lives on
        command("exec >&-; sleep 60", timeout_s=1)(items("a"))
