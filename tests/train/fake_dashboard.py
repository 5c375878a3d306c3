"""A stand-in for Ray's dashboard: answers as it was measured to answer, and remembers what it was sent."""

from __future__ import annotations

import contextlib
import json
import platform
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ray


class FakeDashboard(ThreadingHTTPServer):
    """One node of 8 CPUs with our versions, which takes every job; attributes change what it says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ray_version = ray.__version__
        self.python_version = platform.python_version()
        self.nodes: list[dict[str, Any]] = [node("127.0.0.1", {"CPU": 8.0})]
        self.blind_answers = 0  # so many times it knows of no node, as one does whose head has just started
        self.dropped = 0  # so many connections it closes without an answer
        self.refusal: tuple[int, str] | None = None
        self.taken: set[str] = set()
        self.submitted: list[dict[str, Any]] = []
        self.uploaded_bytes: list[int] = []

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"


def node(ip: str, resources: dict[str, float], state: str = "ALIVE", *, head: bool = True) -> dict[str, Any]:
    return {"node_ip": ip, "is_head_node": head, "state": state, "resources_total": resources}


class Handler(BaseHTTPRequestHandler):
    server: FakeDashboard

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  as the base class has it
        pass

    def _answer(self, status: int, content: Any) -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        facts = self.server
        path = self.path.partition("?")[0]
        if path.startswith(("/api/v0/", "/api/jobs/")) and facts.dropped > 0:
            facts.dropped -= 1
            self.close_connection = True
        elif facts.refusal is not None:
            self._answer(*facts.refusal)
        elif path == "/api/version":
            self._answer(200, {"version": "4", "ray_version": facts.ray_version, "ray_commit": "x"})
        elif path == "/api/v0/cluster_metadata":
            self._answer(200, {"result": True, "data": {"pythonVersion": facts.python_version}})
        elif path == "/api/v0/nodes":
            nodes = [] if facts.blind_answers > 0 else facts.nodes
            facts.blind_answers -= 1
            self._answer(200, {"result": True, "data": {"result": {"result": nodes}}})
        else:
            self._answer(404, "Job or package does not exist")

    def do_PUT(self) -> None:
        self.server.uploaded_bytes.append(len(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(200, "")

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = job["submission_id"]
        if name in self.server.taken:
            self._answer(500, f"Traceback\nValueError: Job with submission_id {name} already exists.")
            return
        self.server.submitted.append(job)
        self._answer(200, {"job_id": name, "submission_id": name})


@contextlib.contextmanager
def fake_dashboard() -> Iterator[FakeDashboard]:
    """A running one."""
    with FakeDashboard() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
