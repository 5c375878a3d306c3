"""A stand-in for an MLflow server that asks for a login, and remembers what it was sent."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME, PASSWORD = "reader", "s3cret/%:pw"  # with characters that a URI quotes
RUN = {"info": {"run_id": "f" * 32, "experiment_id": "1", "status": "RUNNING"}, "data": {}}
ANSWERS: dict[str, Any] = {
    "experiments/search": {"experiments": []},
    "experiments/create": {"experiment_id": "1"},
    "runs/create": {"run": RUN},
    "runs/get": {"run": RUN},
    "runs/update": {"run_info": RUN["info"]},
    "runs/log-batch": {},
}


class FakeMlflow(ThreadingHTTPServer):
    """It has no experiment and no run, and takes every new one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.sent: list[str] = []

    @property
    def url(self) -> str:
        """Its address, without a login."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeMlflow

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  as the base class has it
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.sent.append(f"{self.path} {body.decode()}")
        login = base64.b64encode(f"{NAME}:{PASSWORD}".encode()).decode()
        content = ANSWERS.get(self.path.partition("?")[0].partition("/mlflow/")[2])
        if self.headers.get("Authorization") != f"Basic {login}":
            status, content = 401, {"error_code": "UNAUTHENTICATED", "message": "login"}
        elif content is None:
            status, content = 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}
        else:
            status = 200
        answer = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PATCH = _answer  # noqa: N815


@contextlib.contextmanager
def fake_mlflow() -> Iterator[FakeMlflow]:
    with FakeMlflow() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
