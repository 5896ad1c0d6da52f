"""A teacher on loopback for tests: an OpenAI-compatible chat server that can throttle, fail, cut off and refuse."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Script = Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]]]


class Teacher:
    """Serves `POST /v1/chat/completions` on 127.0.0.1. A word in the prompt says what happens to it:

    `throttle` 429 twice with Retry-After, `crash` 500 twice, `drop` the connection is cut twice, `half` the body is
    cut twice, `garbage` an answer that is no JSON once, `down` always 500, `reject` 400, `cut` finish_reason length,
    `filter` content_filter, `refuse` a refusal in the text. `requests` counts by prompt, `keys` holds the
    Authorization headers seen. A `script` answers every request instead: body -> status, body, headers.
    """

    def __init__(self, delay_s: float = 0.0, status: int = 200, script: Script | None = None) -> None:
        self.script = script
        self.requests: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.bodies: list[dict[str, Any]] = []
        self.delay_s, self.status = delay_s, status
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                teacher.keys.add(self.headers.get("Authorization", ""))
                with teacher.lock:
                    teacher.at_once += 1
                    teacher.most_at_once = max(teacher.most_at_once, teacher.at_once)
                    prompt = body["messages"][-1]["content"]
                    teacher.requests[prompt] += 1
                    teacher.bodies.append(body)
                time.sleep(teacher.delay_s)
                try:
                    teacher.answer(self, prompt, teacher.requests[prompt])
                finally:
                    with teacher.lock:
                        teacher.at_once -= 1

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that leave are part of these tests

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, prompt: str, nth: int) -> None:
        if self.script:
            return self.send(handler, *self.script(self.bodies[-1]))
        if self.status != 200:
            return self.send(
                handler, self.status, {"error": {"message": f"bad key {handler.headers['Authorization']}"}}
            )
        if "throttle" in prompt and nth <= 2:
            return self.send(handler, 429, {"error": {"message": "slow down"}}, {"Retry-After": "0.05"})
        if ("crash" in prompt and nth <= 2) or "down" in prompt:
            return self.send(handler, 500, {"error": {"message": "oops"}})
        if "drop" in prompt and nth <= 2:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return None
        if "half" in prompt and nth <= 2:
            self.send(handler, 200, {"choices": []}, {"Content-Length": "5000"})
            handler.close_connection = True
            return None
        if "garbage" in prompt and nth <= 1:
            return self.send(handler, 200, None)
        if "reject" in prompt:
            return self.send(handler, 400, {"error": {"message": "context length exceeded"}})
        text, finish = f"answer to {prompt}", "stop"
        if "cut" in prompt:
            finish = "length"
        if "filter" in prompt:
            text, finish = "", "content_filter"
        if "refuse" in prompt:
            text = "I'm sorry, but I can't help with that."
        return self.send(handler, 200, {
            "id": "1", "object": "chat.completion", "created": 1, "model": "teacher-1",
            "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        })  # fmt: skip

    def send(
        self, handler: BaseHTTPRequestHandler, status: int, body: Any, headers: dict[str, str] | None = None
    ) -> None:
        data = b"{not json" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)
