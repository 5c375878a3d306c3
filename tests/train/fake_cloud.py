"""Google Cloud as `ray up` meets it: a proxy on this machine that answers for Google's hosts, over TLS of its own."""

from __future__ import annotations

import dataclasses
import http.server
import json
import ssl
from typing import Any

import trustme

from tests.web_server import WebServer

PROJECT = "my-project-123"
ACCOUNT = f"ray-autoscaler-sa-v1@{PROJECT}.iam.gserviceaccount.com"


@dataclasses.dataclass
class Call:
    """One request."""

    method: str
    host: str
    path: str
    body: Any


class FakeCloud(WebServer):
    """A project without anything in it. Used as a context manager; `env` leads Google's client to it."""

    def __init__(self, folder: str) -> None:
        self.calls: list[Call] = []
        self._authority = trustme.CA()
        self._authority.cert_pem.write_to_path(f"{folder}/authority.pem")
        self._folder = folder
        self._account: dict[str, str] | None = None
        super().__init__(_handler_of(self))

    @property
    def env(self) -> dict[str, str]:
        """Environment variables of httplib2, Google's client's own HTTP library."""
        return {
            "https_proxy": self.url,
            "no_proxy": "nothing.invalid",
            "HTTPLIB2_CA_CERTS": f"{self._folder}/authority.pem",
        }

    def bodies(self, method: str, ending: str) -> list[Any]:
        """What was sent to paths with that ending."""
        return [call.body for call in self.calls if call.method == method and call.path.endswith(ending)]

    def tls_of(self, host: str) -> ssl.SSLContext:
        """As that host."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert(host).configure_cert(context)
        return context

    def answer(self, call: Call) -> tuple[int, Any]:
        """The status and the JSON of an answer."""
        self.calls.append(call)
        service = call.host.partition(".")[0]
        if service == "cloudresourcemanager":
            if call.path.endswith("IamPolicy"):
                return 200, {"bindings": [], "etag": "x"}
            return 200, {"projectId": PROJECT, "lifecycleState": "ACTIVE"}
        if service == "iam":
            if call.method == "POST":
                self._account = {"email": ACCOUNT, "projectId": PROJECT}
            return (200, self._account) if self._account else (404, {"error": {"code": 404, "message": "no account"}})
        if call.path.endswith("/subnetworks"):
            return 200, {"items": [{"selfLink": f"projects/{PROJECT}/regions/us-central1/subnetworks/default"}]}
        if call.method == "POST" or "/operations/" in call.path:
            return 200, {"name": "operation-1", "status": "DONE"}
        return 200, {"name": PROJECT, "commonInstanceMetadata": {"fingerprint": "x", "items": []}}


def _handler_of(cloud: FakeCloud) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        host = ""

        def do_CONNECT(self) -> None:
            self.host = self.path.partition(":")[0]
            self.send_response(200)
            self.end_headers()
            self.connection = cloud.tls_of(self.host).wrap_socket(self.connection, server_side=True)
            self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", buffering=0)
            self.close_connection = False

        def do_GET(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            status, value = cloud.answer(Call(self.command, self.host, path, json.loads(sent) if sent else None))
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815  the name is the standard library's

        def finish(self) -> None:
            super().finish()
            self.connection.close()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler
