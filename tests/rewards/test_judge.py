"""A judge as a reward: grades become numbers, nothing is paid twice, and a judge that does not grade is an error."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gadcli.config.rewards import reward_specs
from gadcli.errors import ConfigError, DataError
from gadcli.rewards.answer import AnswerText
from gadcli.rewards.judge import Judge


class Grader:
    """An endpoint on the loopback that replies with what the answer itself says, `replies` counted."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.dies_after = 10**6
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = body["messages"][-1]["content"].partition("# Answer\n")[2]
                status = 200 if len(outer.asked) < outer.dies_after else 401
                if status == 200:
                    outer.asked.append(answer)
                data = json.dumps({"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def grader() -> Iterator[Grader]:
    server = Grader()
    yield server
    server.http.shutdown()


def judge(grader: Grader, folder: Path) -> Judge:
    (spec,) = reward_specs([{"name": "j", "kind": "judge", "endpoint": grader.url, "model": "m"}])
    return Judge(spec, folder / "j.jsonl")


def items(*answers: str) -> list[AnswerText]:
    return [AnswerText([{"role": "user", "content": "q"}], a, "t", 3, 3, True, i) for i, a in enumerate(answers)]


def test_grades_from_1_to_10_become_0_to_1_and_the_last_one_counts(grader: Grader, tmp_path: Path) -> None:
    found = judge(grader, tmp_path)(items("poor [[1]]", "[[10]]", "first [[2]], no: [[7]]"))
    assert found == pytest.approx([0.0, 1.0, 6 / 9])


def test_a_reply_without_a_grade_counts_as_the_mean_of_the_others(grader: Grader, tmp_path: Path) -> None:
    assert judge(grader, tmp_path)(items("[[1]]", "[[10]]", "[[11]] or [[0]]")) == pytest.approx([0.0, 1.0, 0.5])


def test_a_judge_that_grades_fewer_than_half_is_an_error(grader: Grader, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reward j: m graded 1 of 3 answers"):
        judge(grader, tmp_path)(items("[[1]]", "good", "fine"))


def test_what_was_graded_before_a_failure_is_not_asked_again(grader: Grader, tmp_path: Path) -> None:
    answers = items(*(f"answer {i} [[5]]" for i in range(12)))
    grader.dies_after = 5
    with pytest.raises((ConfigError, DataError)):
        judge(grader, tmp_path)(answers)
    assert len(grader.asked) == 5
    grader.dies_after = 10**6
    assert judge(grader, tmp_path)(answers) == pytest.approx([4 / 9] * 12)
    assert len(grader.asked) == len(set(grader.asked)) == 12
