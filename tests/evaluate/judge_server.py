"""An OpenAI-compatible server on the loopback whose verdicts are a function of the two answers; for tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str, str], str]


class JudgeServer:
    """An OpenAI-compatible server whose verdict is a function of the two answers."""

    def __init__(self) -> None:
        self.reply: Reply = lambda a, b: "[[C]]"
        self.message: Callable[[str], dict[str, Any]] = lambda verdict: {"content": f"I think … {verdict}"}
        self.finish = "stop"
        self.failures: list[int] = []  # status codes to answer with first
        self.location = ""
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.requests.append({"path": handler.path, **body})
        self.keys.append(handler.headers["Authorization"])
        status = self.failures.pop(0) if self.failures else 200
        if status == 200:
            question = body["messages"][-1]["content"]
            a = question.split("# Answer A\n")[1].split("\n\n# Answer B\n")[0]
            b = question.split("# Answer B\n")[1].split("\n\nWhich")[0]
            message = self.message(self.reply(a, b))
            payload: Any = {"choices": [{"message": message, "finish_reason": self.finish}]}
        else:
            payload = {"error": f"no: {handler.headers['Authorization']}"}
        data = json.dumps(payload).encode()
        handler.send_response(status)
        if self.location:
            handler.send_header("Location", self.location)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
