"""The distance of a real bucket: a loopback proxy that hands everything on a fixed time later, in a process of its own.

It knows next to nothing of HTTP (the Host header is made the server's own, since the server goes by it): what a client
sends is held back, byte for byte and in order, so each request on a connection costs one delay and requests on several
connections are delayed side by side, as on a long wire. Answers are not delayed again: the delay stands for the whole
round trip and the server's own latency.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit


class _Upstream(asyncio.Protocol):
    """The server's side of one connection: what it says goes back at once."""

    def __init__(self, client: asyncio.Transport) -> None:
        self._client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._client.write(data)

    def connection_lost(self, _error: Exception | None) -> None:
        self._client.close()

    def pause_writing(self) -> None:
        self._client.pause_reading()

    def resume_writing(self) -> None:
        self._client.resume_reading()


class _Client(asyncio.Protocol):
    """The client's side of one connection: what it says is handed on later."""

    def __init__(self, host: str, port: int, delay_s: float) -> None:
        self._address = host, port
        self._delay_s = delay_s
        self._held: collections.deque[bytes] = collections.deque()
        self._upstream: _Upstream | None = None
        self._loop = asyncio.get_running_loop()
        self._server_host = f"{host}:{port}\r\n".encode()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._own_host = "{}:{}\r\n".format(*transport.get_extra_info("sockname")).encode()
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            _, upstream = await self._loop.create_connection(lambda: _Upstream(self._transport), *self._address)
        except OSError:
            self._transport.close()
            return
        self._upstream = upstream

    def data_received(self, data: bytes) -> None:
        # A queue, since timers of equal times may fire in another order.
        self._held.append(data.replace(self._own_host, self._server_host))
        self._loop.call_later(self._delay_s, self._hand_on)

    def _hand_on(self) -> None:
        if self._upstream is None:
            self._loop.call_later(0.001, self._hand_on)
        elif not self._upstream.transport.is_closing():
            self._upstream.transport.write(self._held.popleft())

    def connection_lost(self, _error: Exception | None) -> None:
        self._connecting.cancel()
        if self._upstream is not None:
            self._upstream.transport.close()


async def _serve(host: str, port: int, delay_s: float) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: _Client(host, port, delay_s), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def delayed(url: str, latency_ms: float) -> Iterator[tuple[str, int | None]]:
    """Put a delay in front of a server while the context is entered.

    Args:
        url: of the server, ``http://127.0.0.1:PORT``.
        latency_ms: added to every request; 0 or less puts nothing in front.

    Yields:
        Where to ask instead, and the proxy's process id; None where there is none.
    """
    if latency_ms <= 0:
        yield url, None
        return
    parts = urlsplit(url)
    command = [sys.executable, "-m", "benchmarks.latency", str(parts.hostname), str(parts.port), str(latency_ms)]
    root = Path(__file__).resolve().parents[1]  # wherever we are called from
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("latency_ms", type=float)
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(given.host, given.port, given.latency_ms / 1000))
