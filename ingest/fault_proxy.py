"""A loopback HTTP proxy in front of the embedded server that injects faults, by seed, and counts requests."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

FaultKind = Literal["latency", "status", "reset", "stall", "truncate", "flip"]
_COMPOSITE = re.compile(r"dataflux-composed-objects/[^/?]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault, and which requests it strikes."""

    kind: FaultKind
    """`latency` delays the request; `status` answers in the server's stead; `reset` resets the connection before
    an answer; `stall` keeps it open without one; `truncate` ends the body half-way; `flip` changes one bit."""

    probability: float = 1.0
    """Of striking a request that matches."""

    request: str = ""
    """Kinds of request (`list`, `read`, `compose`, `delete`, `upload`, `meta`, `bucket`), with ``|`` between them;
    empty is any."""

    method: str = ""
    """HTTP method; empty is any."""

    object_pattern: str = ""
    """Regular expression searched in the object's name; empty is any."""

    target_pattern: str = ""
    """Regular expression searched in the request's path and query; empty is any."""

    status: int = 503
    """Of kind `status`."""

    retry_after_s: int | None = None
    """Sent with the status; None sends none."""

    seconds: float = 0.0
    """Of kinds `latency` and `stall`."""

    after_server: bool = False
    """Of kinds `status`, `reset` and `stall`: strike after the server has done the request, whose answer is lost."""

    times: int | None = None
    """How often it strikes at the most; None is without limit."""


def every_fault(probability: float, *, stall_s: float, latency_s: float = 0.02) -> list[Fault]:
    """Every kind of fault at once, each striking with this probability what it can strike.

    Bytes are flipped in what is read, where checksums guard them: a listing carries none, and over TLS it cannot be
    changed unseen.

    Args:
        probability: of each.
        stall_s: how long a request stays without an answer; more than the client's time-out.
        latency_s: what the latency adds.
    """
    return [
        Fault(kind="latency", probability=probability, seconds=latency_s),
        Fault(kind="status", status=429, probability=probability),
        Fault(kind="status", status=429, retry_after_s=1, probability=probability),
        Fault(kind="status", status=503, probability=probability),
        Fault(kind="status", status=503, retry_after_s=1, probability=probability),
        Fault(kind="status", status=503, after_server=True, probability=probability),
        Fault(kind="reset", probability=probability),
        Fault(kind="reset", after_server=True, probability=probability),
        Fault(kind="stall", seconds=stall_s, probability=probability),
        Fault(kind="truncate", probability=probability),
        Fault(kind="flip", request="read", probability=probability),
        Fault(kind="status", status=403, request="compose", probability=probability),
        Fault(kind="status", status=404, request="read|meta", probability=probability),
    ]


class Required(NamedTuple):
    """The generation that a request requires of an object; 0 is no object."""

    bucket: str
    name: str
    generation: int


class FaultProxy:
    """Stands between clients and the server while the context is entered. Its methods are thread-safe.

    It enforces `ifGenerationMatch` (and the header `x-goog-if-generation-match`) on every upload, compose and delete,
    as GCS does. The embedded server checks multipart uploads only. Requests that bypass the proxy are not held back.

    Attributes:
        faults: changed at will between requests; the first that strikes is injected.
    """

    def __init__(self, upstream_url: str, faults: Sequence[Fault] = (), *, seed: int = 0) -> None:
        """Note the settings.

        Args:
            upstream_url: of the server, ``http://127.0.0.1:PORT``.
            faults: what to inject.
            seed: of the draws. Each is a function of the seed, the fault's place in the list, and which request of
                its kind for its object it is, whatever comes in between; composites go by their sources' names.
        """
        self._upstream = urlsplit(upstream_url)
        self.faults = list(faults)
        self._seed = seed
        self._lock = threading.Lock()
        self._requests: collections.Counter[str] = collections.Counter()
        self._injected: collections.Counter[str] = collections.Counter()
        self._struck: collections.Counter[Fault] = collections.Counter()
        self._composites: set[str] = set()
        self._seen: collections.Counter[tuple[str, str]] = collections.Counter()
        self._sources: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._conditional = asyncio.Lock()
        self._sessions: dict[str, Required] = {}  # of resumable uploads, by their ids
        self.port = 0

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> dict[str, int]:
        """Requests so far, by kind."""
        with self._lock:
            return dict(self._requests)

    @property
    def injected(self) -> dict[str, int]:
        """Faults so far, by kind; of kind `status` by number, as ``status-503``."""
        with self._lock:
            return dict(self._injected)

    @property
    def composites_alive(self) -> frozenset[str]:
        """Names of composites that the server made and has not deleted."""
        with self._lock:
            return frozenset(self._composites)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=2**20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            upstream = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
            while await self._one_request(reader, writer, *upstream):
                pass
        except (OSError, asyncio.IncompleteReadError):
            writer.transport.abort()
        except asyncio.CancelledError:
            writer.transport.abort()  # we are being stopped; nobody waits for this task but `_stop`
        finally:
            self._tasks.discard(task)
            for side in (writer, upstream[1] if upstream else None):
                if side is not None:
                    side.close()

    async def _one_request(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> bool:
        """Pass on one request and its answer; whether the connection goes on."""
        head = await _read_head(reader)
        if not head:
            return False
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        body = await _read_body(reader, head)
        kind, name = classify(method, target)
        fault, place = self._draw(kind, name, method, target, body)
        if fault is not None and fault.kind == "latency":
            await asyncio.sleep(fault.seconds)
        if fault is not None and fault.kind == "stall" and not fault.after_server:
            await asyncio.sleep(fault.seconds)
            return False
        if fault is not None and fault.kind in ("status", "reset") and not fault.after_server:
            return await self._answer_ourselves(writer, fault)
        host = f"{self._upstream.hostname}:{self._upstream.port}"

        async def pass_on() -> tuple[bytes, bytes]:
            up_writer.write(re.sub(rb"(?im)^host:[^\r]*", b"Host: " + host.encode(), head) + body)
            await up_writer.drain()
            up_head = await _read_head(up_reader)
            return up_head, b"" if method == "HEAD" or not up_head else await _read_body(up_reader, up_head)

        required = self._required(method, target, head, body)
        if required is None:
            up_head, up_body = await pass_on()
        else:
            # The embedded server checks preconditions of some requests only. The check and the request are one step.
            async with self._conditional:
                found = await self._generation_of(required)
                if found != required.generation:
                    up_head, up_body = _precondition_answer(required, found)
                else:
                    up_head, up_body = await pass_on()
                    self._note_session(required, up_head)
        if not up_head:
            return False
        self._note_composites(kind, name, int(up_head.split(b" ", 2)[1]))
        if fault is not None and fault.kind == "stall":
            await asyncio.sleep(fault.seconds)
            return False
        if fault is not None and fault.kind in ("status", "reset"):
            return await self._answer_ourselves(writer, fault)
        if fault is not None and fault.kind == "truncate" and up_body:
            writer.write(up_head + up_body[: len(up_body) // 2])
            await writer.drain()
            return False
        if fault is not None and fault.kind == "flip" and up_body:
            at = int(place * len(up_body))
            up_body = up_body[:at] + bytes([up_body[at] ^ 1]) + up_body[at + 1 :]
        # The server names itself in the addresses of resumable uploads; clients must come back through us.
        up_head = up_head.replace(host.encode(), f"127.0.0.1:{self.port}".encode())
        writer.write(up_head + up_body)
        await writer.drain()
        return b"connection: close" not in up_head.lower()

    def _required(self, method: str, target: str, head: bytes, body: bytes) -> Required | None:
        """The precondition of a write or delete; None where the request has none."""
        path, _, query_text = target.partition("?")
        query = parse_qs(query_text, keep_blank_values=True)
        session = query.get("upload_id", [""])[0]
        if session in self._sessions:
            return self._sessions[session]
        header = re.search(rb"(?im)^x-goog-if-generation-match:\s*(\d+)", head)
        generation = query.get("ifGenerationMatch", [header.group(1).decode() if header else ""])[0]
        if not generation or method not in ("POST", "PUT", "DELETE"):
            return None
        json_path = re.fullmatch(r"(?:/upload|/resumable/upload)?/storage/v1/b/([^/]+)/o(?:/(.+))?", path)
        if json_path is None:
            bucket, _, key = path.lstrip("/").partition("/")
            return Required(unquote(bucket), unquote(key), int(generation))
        name = unquote(json_path[2] or "").removesuffix("/compose") or query.get("name", [""])[0] or _name_in(body)
        return Required(unquote(json_path[1]), name, int(generation))

    async def _generation_of(self, required: Required) -> int:
        """Ask the server for an object's generation; 0 is no object."""
        place = f"/storage/v1/b/{quote(required.bucket, safe='')}/o/{quote(required.name, safe='')}?alt=json"
        reader, writer = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
        try:
            host = f"{self._upstream.hostname}:{self._upstream.port}"
            writer.write(f"GET {place} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            await writer.drain()
            head = await _read_head(reader)
            body = await _read_body(reader, head)
        finally:
            writer.close()
        return int(json.loads(body)["generation"]) if b" 200 " in head.split(b"\r\n", 1)[0] else 0

    def _note_session(self, required: Required, up_head: bytes) -> None:
        """Keep the precondition of a resumable upload: its later requests carry the upload's id only."""
        location = re.search(rb"(?im)^location:.*[?&]upload_id=([^&\s]+)", up_head)
        if location:
            self._sessions[location.group(1).decode()] = required

    def _draw(self, kind: str, name: str, method: str, target: str, body: bytes) -> tuple[Fault | None, float]:
        """The fault that strikes, and a number from 0 to 1 that says where."""
        with self._lock:
            self._requests[kind] += 1
            if kind == "compose":
                self._sources[name] = _sources_of(body)
            drawn_as = self._sources.get(name, name)
            self._seen[kind, drawn_as] += 1
            number = self._seen[kind, drawn_as]
            for position, fault in enumerate(self.faults):
                matches = (
                    (not fault.request or kind in fault.request.split("|"))
                    and fault.method in ("", method)
                    and re.search(fault.object_pattern, name)
                    and re.search(fault.target_pattern, target)
                )
                spent = fault.times is not None and self._struck[fault] >= fault.times
                if not matches or spent:
                    continue
                drawn = hashlib.blake2b(f"{self._seed} {position} {kind} {number} {drawn_as}".encode()).digest()
                if int.from_bytes(drawn[:8], "big") / 2**64 < fault.probability:
                    self._struck[fault] += 1
                    self._injected[f"status-{fault.status}" if fault.kind == "status" else fault.kind] += 1
                    return fault, int.from_bytes(drawn[8:14], "big") / 2**48
        return None, 0.0

    async def _answer_ourselves(self, writer: asyncio.StreamWriter, fault: Fault) -> bool:
        if fault.kind == "reset":
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return False
        after = f"Retry-After: {fault.retry_after_s}\r\n" if fault.retry_after_s is not None else ""
        body = b'{"error": {"code": %d, "message": "injected"}}' % fault.status
        head = f"HTTP/1.1 {fault.status} Injected\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write((head + after + "\r\n").encode() + body)
        await writer.drain()
        return True

    def _note_composites(self, kind: str, name: str, status: int) -> None:
        if not _COMPOSITE.search(name):
            return
        with self._lock:
            if kind == "compose" and status == 200:
                self._composites.add(name)
            elif kind == "delete" and status in (200, 204):
                self._composites.discard(name)


def classify(method: str, target: str) -> tuple[str, str]:
    """Kind of a request to GCS's JSON or XML interface, and the object's name; the name is empty where none is."""
    path, _, query = target.partition("?")
    if path.startswith("/upload/") or "uploadType=" in query:
        return "upload", unquote(query.partition("name=")[2].partition("&")[0])
    json_path = re.fullmatch(r"(?:/download)?/storage/v1/b(?:/([^/]+))?(?:/o(?:/(.+))?)?/?", path)
    if json_path is None:
        _, _, key = path.lstrip("/").partition("/")
        kind = {"GET": "read", "DELETE": "delete", "PUT": "upload", "HEAD": "meta"}.get(method, "other")
        return (kind, unquote(key)) if key else ("bucket", "")
    _bucket, key = json_path.groups()
    if not key:
        return ("list" if path.rstrip("/").endswith("/o") else "bucket"), ""
    if method == "POST" and key.endswith("/compose"):
        return "compose", unquote(key.removesuffix("/compose"))
    if method == "DELETE":
        return "delete", unquote(key)
    if method == "GET":
        return ("read" if "alt=media" in query else "meta"), unquote(key)
    return "other", unquote(key)


def _name_in(body: bytes) -> str:
    """The object's name in the JSON that begins a resumable upload, or that is the first part of a multipart one."""
    start = body.find(b"{")
    try:
        about, _ = json.JSONDecoder().raw_decode(body[start : start + 2**16].decode("utf-8", "replace"))
        return str(about["name"])
    except (ValueError, KeyError, TypeError):
        return ""


def _precondition_answer(required: Required, found: int) -> tuple[bytes, bytes]:
    message = f"{required.name}: required generation {required.generation}, found {found}"
    body = json.dumps({"error": {"code": 412, "message": message}}, allow_nan=False).encode()
    head = "HTTP/1.1 412 Precondition Failed\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode(), body


def _sources_of(compose_body: bytes) -> str:
    """What a composite is made of, in one word: its own name is another one in each run."""
    try:
        return " ".join(source["name"] for source in json.loads(compose_body)["sourceObjects"])
    except (ValueError, KeyError, TypeError):
        return ""


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


async def _read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    lowered = head.lower()
    length = re.search(rb"(?m)^content-length:\s*(\d+)", lowered)
    if length:
        return await reader.readexactly(int(length.group(1)))
    if not re.search(rb"(?m)^transfer-encoding:\s*chunked", lowered):
        return b""
    parts: list[bytes] = []
    while True:
        size_line = await reader.readuntil(b"\r\n")
        size = int(size_line.split(b";")[0], 16)
        chunk = await reader.readexactly(size + 2)
        parts += [size_line, chunk]
        if size == 0:
            return b"".join(parts)
