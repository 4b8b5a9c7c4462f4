"""A chat completions server in a thread: it answers as a script says, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class StubServer:
    """``respond(prompt, attempt)`` gives ``(status, body, headers)``; a number as body means: say nothing for so many
    seconds and hang up; a ``str`` is sent as it is; anything else as JSON.
    """

    def __init__(self, respond) -> None:
        self.respond = respond
        self.requests: list[tuple[dict, dict]] = []  # (headers under lower-case names, body)
        self.attempts: dict[str, int] = {}
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                stub.handle(self)

            def log_message(self, *arguments):
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> StubServer:
        self.thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @property
    def prompts(self) -> list[str]:
        """What was asked, in order of arrival."""
        return [body["messages"][-1]["content"] for _, body in self.requests]

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with self._lock:
            self.requests.append(({k.lower(): v for k, v in handler.headers.items()}, {**body, "path": handler.path}))
            attempt = self.attempts[prompt] = self.attempts.get(prompt, 0) + 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        status, answer, headers = self.respond(prompt, attempt)
        if isinstance(answer, float):
            time.sleep(answer)
            handler.close_connection = True
        else:
            payload = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            handler.send_response(status)
            fields = {"Content-Type": "application/json", "Content-Length": str(len(payload))}
            for name, value in {**headers, **fields}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(payload)
        with self._lock:
            self.at_once -= 1


@pytest.fixture
def serve() -> type[StubServer]:
    """``with serve(respond) as server``."""
    return StubServer
