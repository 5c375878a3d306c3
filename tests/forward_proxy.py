"""A small forward proxy: hands every request on to one server, whatever host it names, and counts them."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class ForwardProxy(ThreadingHTTPServer):
    """It resolves no names, so that a test may name a host that does not exist."""

    def __init__(self, server_url: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = urlsplit(server_url).netloc
        self.hosts: list[str] = []

    @property
    def url(self) -> str:
        """Its address, with a login that it does not look at."""
        return f"http://me:h1dden@127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: ForwardProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  as the base class has it
        pass

    def _hand_on(self) -> None:
        url = urlsplit(self.path)
        self.server.hosts.append(url.netloc)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = http.client.HTTPConnection(self.server.target, timeout=240)
        headers = {name: value for name, value in self.headers.items() if not name.lower().startswith("proxy-")}
        headers["Host"] = self.server.target  # the embedded server answers to its own name alone
        connection.request(self.command, f"{url.path}?{url.query}", body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _hand_on  # noqa: N815


@contextlib.contextmanager
def forward_proxy(server_url: str) -> Iterator[ForwardProxy]:
    with ForwardProxy(server_url) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy
        proxy.shutdown()
