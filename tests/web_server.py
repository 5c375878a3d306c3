"""Web servers of the tests, on 127.0.0.1 only."""

from __future__ import annotations

import http.server
import ssl
import threading
from typing import TypeVar

Kind = TypeVar("Kind", bound="WebServer")


class WebServer:
    """Serves by a handler, a thread a connection, while the context is entered.

    Attributes:
        url: without a trailing slash.
    """

    def __init__(self, handler: type[http.server.BaseHTTPRequestHandler], tls: ssl.SSLContext | None = None) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self: Kind) -> Kind:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
