"""Sends many GETs at once on one thread, by libcurl.

This takes about a third of the CPU time of obstore's synchronous calls on a pool of threads.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import os
import re
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import certifi
import pycurl

from ..proxies import through
from .retry import PassingError

_BUFFER_BYTES = 512 * 1024  # with libcurl's default of 16 KiB a body of 128 KB takes eight calls into Python
_ERROR_TEXT_BYTES = 64 * 1024  # any answer may be this long, because a refusal says why in its body
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_EVENTS = {pycurl.POLL_IN: _READ, pycurl.POLL_OUT: _WRITE, pycurl.POLL_INOUT: _READ | _WRITE}
_REFUSED = frozenset({pycurl.E_COULDNT_CONNECT, pycurl.E_COULDNT_RESOLVE_HOST})
# These are treated as a refused connection, but the message is libcurl's own, because it says why.
_EXPLAINED = frozenset({pycurl.E_PEER_FAILED_VERIFICATION, pycurl.E_SSL_CACERT_BADFILE, pycurl.E_COULDNT_RESOLVE_PROXY})
_NOT_ALLOWED = frozenset({401, 403})
_HOPELESS = frozenset({"refused", "timeout"})  # the rest of a batch would fail too, so it is not sent


class Get(NamedTuple):
    """One request.

    Attributes:
        url: whole and quoted.
        expected_bytes: length of the body. A body that is longer is cut, unless it is at most 64 KiB.
        headers: lines, as ``Name: value``.
        span: bytes to ask for, from the first to before the second number; None asks for the whole object.
    """

    url: str
    expected_bytes: int
    headers: tuple[str, ...] = ()
    span: tuple[int, int] | None = None


class Answer(NamedTuple):
    """A server's answer.

    Attributes:
        status: the HTTP status.
        body: the body; it is cut where it would have been longer than `Get.expected_bytes` allows.
        object_bytes: length of the whole object by the headers; None if they do not tell it.
        retry_after: the value of the Retry-After header; None if there is none.
        span: bytes of the object that the body holds by the headers, from the first to before the second number; None
            if it holds the whole object.
        head: all headers as they arrived.
    """

    status: int
    body: bytes
    object_bytes: int | None
    retry_after: str | None
    span: tuple[int, int] | None = None
    head: bytes = b""

    def generation(self) -> int | None:
        """Return the object's generation by the headers; None if they do not tell it."""
        found = _GENERATION.search(self.head)
        return int(found.group(1)) if found else None

    def crc32c(self) -> int | None:
        """Return the whole object's checksum by the headers, also for a part of it; None if they do not tell it."""
        found = _CRC32C.search(self.head)
        try:
            return int.from_bytes(base64.b64decode(found.group(1), validate=True), "big") if found else None
        except ValueError:
            return None

    def content_encoding(self) -> str | None:
        """Return the encoding with which the object is stored; None if there is none, or the headers do not tell it.

        If a server does not tell the encoding of the stored object, that of the answer is taken.
        """
        head = self.head.lower()  # a search for plain bytes is faster than one for a pattern, and runs for each GET
        for name in (b"\nx-goog-stored-content-encoding:", b"\ncontent-encoding:"):
            at = head.find(name)
            if at >= 0:
                start = at + len(name)
                return head[start : head.find(b"\n", start)].strip().decode("latin-1") or None
        return None


_GENERATION = re.compile(rb"^x-goog-generation: *(\d+)", re.IGNORECASE | re.MULTILINE)
_CRC32C = re.compile(rb"^x-goog-hash:[^\r\n]*\bcrc32c=([A-Za-z0-9+/]+=*)", re.IGNORECASE | re.MULTILINE)


class CutError(PassingError):
    """The connection ended, or fell silent, in the middle of the body of a successful answer.

    Attributes:
        answer: the answer with the part of the body that arrived.
    """

    def __init__(self, kind: str, detail: str, answer: Answer) -> None:
        super().__init__(kind, detail)
        self.answer = answer


class PoolClosedError(RuntimeError):
    """The pool of connections is closed, or its thread failed."""


Outcome: TypeAlias = Answer | PassingError
"""An answer of any status, or the error of the connection."""


class _Batch:
    """The requests of one call, and their outcomes."""

    def __init__(self, gets: Sequence[Get]) -> None:
        self.gets = gets
        self.outcomes: list[Outcome | None] = [None] * len(gets)
        self.refused = False
        self.open = len(gets)
        self.finished = threading.Event()
        self.failed: BaseException | None = None

    def end_one(self) -> None:
        self.open -= 1
        if not self.open:
            self.finished.set()


_NOTHING = _Batch(())


class _Transfer:
    """A libcurl handle, and the request that it serves now."""

    def __init__(self, options: Sequence[tuple[int, Any]]) -> None:
        self.handle: Any = pycurl.Curl()
        for option, value in options:
            self.handle.setopt(option, value)
        self.body: list[bytes] = []
        self.head: list[bytes] = []
        self.handle.setopt(pycurl.WRITEFUNCTION, self.body.append)
        self.handle.setopt(pycurl.HEADERFUNCTION, self.head.append)
        self.forget()

    def forget(self) -> None:
        """Drop the request and its body: handles are reused, and bodies are large."""
        self.batch, self.position = _NOTHING, 0
        self.body.clear()
        self.head.clear()
        self.progress: tuple[int, int] = (0, 0)
        self.progress_s = 0.0

    def begin(self, batch: _Batch, position: int) -> None:
        get = batch.gets[position]
        self.batch, self.position = batch, position
        self.progress_s = time.monotonic()
        handle = self.handle
        handle.setopt(pycurl.URL, get.url.encode())
        handle.setopt(pycurl.HTTPHEADER, list(get.headers))
        # One byte more than expected, so that a body that is cut there never has the expected length.
        handle.setopt(pycurl.MAXFILESIZE_LARGE, max(get.expected_bytes, _ERROR_TEXT_BYTES) + 1)
        if get.span is None:
            handle.unsetopt(pycurl.RANGE)
        else:
            handle.setopt(pycurl.RANGE, f"{get.span[0]}-{get.span[1] - 1}")

    def answer(self, *, cut: bool = False) -> Answer:
        status, body = int(self.handle.getinfo(pycurl.RESPONSE_CODE)), b"".join(self.body)
        if status == 200 and not cut and len(body) == self.batch.gets[self.position].expected_bytes:
            # Most answers end here: parsing the headers takes a tenth of a GET's CPU time.
            return Answer(status, body, len(body), None, None, b"".join(self.head))
        head = b"".join(self.head)
        total = re.search(rb"^content-range: *bytes [^/]*/(\d+)", head, re.IGNORECASE | re.MULTILINE)
        part = re.search(rb"^content-range: *bytes (\d+)-(\d+)/", head, re.IGNORECASE | re.MULTILINE)
        length = re.search(rb"^content-length: *(\d+)", head, re.IGNORECASE | re.MULTILINE)
        after = re.search(rb"^retry-after: *([^\r\n]+)", head, re.IGNORECASE | re.MULTILINE)
        announced = total or length
        return Answer(
            status,
            body,
            int(announced.group(1)) if announced else None,
            after.group(1).decode("latin-1").strip() if after else None,
            (int(part.group(1)), int(part.group(2)) + 1) if part else None,
            head,
        )

    def silent(self, now_s: float, read_timeout_s: float) -> bool:
        """Return whether no byte has arrived for `read_timeout_s`.

        The time to connect does not count, because it has a limit of its own.
        """
        progress = (len(self.head), len(self.body))
        if progress != self.progress or not self.handle.getinfo(pycurl.PRETRANSFER_TIME):
            self.progress, self.progress_s = progress, now_s
            return False
        return now_s - self.progress_s >= read_timeout_s

    def error(self, code: int, text: str) -> Outcome:
        if code == pycurl.E_FILESIZE_EXCEEDED:
            return self.answer(cut=True)
        url = self.batch.gets[self.position].url
        by = through(url)
        if code in _REFUSED and self.handle.getinfo(pycurl.HTTP_CONNECTCODE) in (0, 200):
            return PassingError("refused", f"{urlsplit(url).netloc} takes no connection{by}")
        if code in _REFUSED or code in _EXPLAINED:  # a proxy refused, or we did
            return PassingError("refused", f"{text}{by}")
        kind = "timeout" if code == pycurl.E_OPERATION_TIMEDOUT else "reset"
        if kind == "reset" and (self.body or code == pycurl.E_PARTIAL_FILE):
            kind = "cut"
        answer = self.answer(cut=True) if self.body else None
        if answer is not None and answer.status in (200, 206):
            return CutError(kind, f"{text}{by} ({len(answer.body):,} bytes of the body had come)", answer)
        return PassingError(kind, f"{text}{by}")


class CurlPool:
    """Sends GETs for all threads of this process, at most `in_flight` at a time, in the order of the calls.

    Connections stay open between requests. The first request starts the pool's thread, and `close` ends it. A pool does
    not survive a fork: the child makes its own.
    """

    def __init__(
        self,
        in_flight: int,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        user_agent: str,
        proxy: str | None = None,
    ) -> None:
        authorities = os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE") or certifi.where()
        self._options: tuple[tuple[int, Any], ...] = (
            (pycurl.BUFFERSIZE, _BUFFER_BYTES),
            (pycurl.CAPATH if os.path.isdir(authorities) else pycurl.CAINFO, os.fsencode(authorities)),  # noqa: PTH112
            (pycurl.CONNECTTIMEOUT_MS, max(1, round(1000 * connect_timeout_s))),
            # With HTTP/2 all requests would share one connection, and so one TCP window.
            (pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1),
            (pycurl.NOSIGNAL, 1),
            (pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS),
            (pycurl.TCP_KEEPALIVE, 1),
            (pycurl.USERAGENT, user_agent),
            *([(pycurl.PROXY, proxy)] if proxy else []),  # else libcurl goes by the environment
        )
        self._in_flight = in_flight
        self._read_timeout_s = read_timeout_s
        self._lock = threading.Lock()
        self._waiting: collections.deque[tuple[_Batch, int]] = collections.deque()
        self._thread: threading.Thread | None = None
        self._closing = False

    def get(self, gets: Sequence[Get]) -> list[Outcome | None]:
        """Send requests and wait for all of them.

        A body may take any time; a request times out only if no byte of it arrives for `read_timeout_s`.

        Returns:
            One entry a request, in the order given. After a 401, a 403, a refused connection or a time-out the requests
            that were not sent yet stay unsent, and their entries are None.

        Raises:
            PoolClosedError: the pool is closed, or its thread has failed.
        """
        if not gets:
            return []
        batch = _Batch(gets)
        with self._lock:
            if self._closing:
                raise PoolClosedError("expected an open pool of connections, found it closed; make a new one")
            self._waiting.extend((batch, position) for position in range(len(gets)))
            if self._thread is None:
                self._wake_in, self._wake_out = socket.socketpair()
                self._wake_out.setblocking(False)
                self._thread = threading.Thread(target=self._serve, name="voxflux-curl", daemon=True)
                self._thread.start()
            self._wake_in.send(b"x")
        batch.finished.wait()
        if batch.failed is not None:
            raise PoolClosedError(f"the thread that sends requests failed: {batch.failed!r}") from batch.failed
        return batch.outcomes

    @property
    def closed(self) -> bool:
        """Whether the pool takes no more requests."""
        return self._closing

    def close(self) -> None:
        """End the thread; calls that wait for requests raise PoolClosedError."""
        with self._lock:
            self._closing = True
            thread, self._thread = self._thread, None
            if thread is not None:
                self._wake_in.send(b"x")
        if thread is not None:
            thread.join()
            self._wake_in.close()
            self._wake_out.close()

    def _serve(self) -> None:
        loop: _Loop | None = None
        try:
            loop = _Loop(self._options, self._in_flight, self._wake_out, self._read_timeout_s)
            while not self._closing:
                loop.start(self._waiting)
                loop.turn()
            raise PoolClosedError("it was closed")
        except BaseException as error:  # of any kind: no caller may wait for this thread any longer
            with self._lock:
                self._closing = True
                batches = {id(batch): batch for batch, _ in self._waiting}
            for batch in (batches | (loop.batches() if loop else {})).values():
                batch.failed = error
                batch.finished.set()
            if not isinstance(error, Exception):
                raise
        finally:
            if loop is not None:
                loop.close()


class _Loop:
    """An event loop: a selector watches libcurl's sockets and timer. Not thread-safe."""

    def __init__(
        self, options: Sequence[tuple[int, Any]], in_flight: int, wake: socket.socket, read_timeout_s: float
    ) -> None:
        self._options = options
        self._read_timeout_s = read_timeout_s
        # libcurl's own LOW_SPEED_TIME counts whole seconds, and takes the mean speed over five of them.
        self._look_every_s = read_timeout_s / 8
        self._look_s = time.monotonic() + self._look_every_s
        self._wake = wake
        self._selector = selectors.DefaultSelector()
        self._selector.register(wake, _READ)
        self._due_s: float | None = None
        self._idle: list[_Transfer] = []
        self._active: dict[Any, _Transfer] = {}
        self._in_flight = in_flight
        self._multi: Any = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_MAXCONNECTS, in_flight)
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)

    def start(self, waiting: collections.deque[tuple[_Batch, int]]) -> None:
        """Start waiting requests until `in_flight` are under way."""
        while waiting and len(self._active) < self._in_flight:
            batch, position = waiting[0]  # it leaves the queue once it is active, so that a failure always finds it
            if batch.refused:
                waiting.popleft()
                batch.end_one()
                continue
            transfer = self._idle.pop() if self._idle else _Transfer(self._options)
            transfer.begin(batch, position)
            self._active[transfer.handle] = transfer
            waiting.popleft()
            self._multi.add_handle(transfer.handle)

    def turn(self) -> None:
        """Wait for the next event of a socket, the timer or a new request, and handle it."""
        timeout_s = None if self._due_s is None else max(0.0, self._due_s - time.monotonic())
        if self._active:
            look_s = max(0.0, self._look_s - time.monotonic())
            timeout_s = look_s if timeout_s is None else min(timeout_s, look_s)
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._wake:
                self._wake.recv(4096)
                continue
            flags = (pycurl.CSELECT_IN if events & _READ else 0) | (pycurl.CSELECT_OUT if events & _WRITE else 0)
            self._multi.socket_action(key.fd, flags)
        if self._due_s is not None and time.monotonic() >= self._due_s:
            self._due_s = None
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        left = 1
        while left:
            left, good, bad = self._multi.info_read()
            for handle in good:
                self._end(handle, None)
            for handle, code, text in bad:
                self._end(handle, (code, text))
        if time.monotonic() >= self._look_s:  # after the sockets were read, so that a late thread ends no live request
            self._end_silent()

    def _end_silent(self) -> None:
        now_s = time.monotonic()
        self._look_s = now_s + self._look_every_s
        silent = [handle for handle, each in self._active.items() if each.silent(now_s, self._read_timeout_s)]
        for handle in silent:
            text = f"no byte came for {self._read_timeout_s:g} s, which is read_timeout_s"
            self._end(handle, (pycurl.E_OPERATION_TIMEDOUT, text))

    def batches(self) -> dict[int, _Batch]:
        """Return the batches that have requests in flight, by identity."""
        return {id(transfer.batch): transfer.batch for transfer in self._active.values()}

    def close(self) -> None:
        """Close all connections."""
        for handle in self._active:
            with contextlib.suppress(pycurl.error):  # it may be removed already
                self._multi.remove_handle(handle)
            handle.close()
        for transfer in self._idle:
            transfer.handle.close()
        self._multi.close()
        self._selector.close()

    def _end(self, handle: Any, error: tuple[int, str] | None) -> None:
        transfer = self._active[handle]
        self._multi.remove_handle(handle)
        batch = transfer.batch
        outcome = transfer.answer() if error is None else transfer.error(*error)
        batch.outcomes[transfer.position] = outcome
        if isinstance(outcome, Answer):
            hopeless = outcome.status in _NOT_ALLOWED
        else:  # a server that sent part of a body is still there
            hopeless = outcome.kind in _HOPELESS and not isinstance(outcome, CutError)
        if hopeless:
            batch.refused = True
        del self._active[handle]
        transfer.forget()
        self._idle.append(transfer)
        batch.end_one()

    def _watch(self, what: int, fd: int, _multi: Any, _data: Any) -> None:
        known = fd in self._selector.get_map()
        if what == pycurl.POLL_REMOVE or what not in _EVENTS:
            if known:
                self._selector.unregister(fd)
        elif known:
            self._selector.modify(fd, _EVENTS[what])
        else:
            self._selector.register(fd, _EVENTS[what])

    def _set_timer(self, timeout_ms: int) -> None:
        self._due_s = None if timeout_ms < 0 else time.monotonic() + timeout_ms / 1000
