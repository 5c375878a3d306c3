"""Bodies of direct reads: slow ones, cut ones, changed ones, and what an answer's own headers say of them."""

from __future__ import annotations

import base64
import http.server
import re
import threading
from collections.abc import Callable

import google_crc32c
import pytest

from ingest.emulator import EmbeddedServer
from ingest.errors import CorruptObjectError, StaleManifestError, UnreachableError
from ingest.fault_proxy import Fault, FaultProxy
from ingest.stores import ObjectMeta, Store, StoreConfig, open_store
from ingest.stores.base import RangeRequest

from .gcs_place import GCSPlace
from .web_server import WebServer

BODY = bytes(range(256)) * 400
Handler = http.server.BaseHTTPRequestHandler


def crc32c_of(body: bytes) -> int:
    return int(google_crc32c.value(body))


class ObjectServer(WebServer):
    """Serves one object as GCS does, in ranges too; what `spoil` does to each answer is a test's.

    Attributes:
        asked: the target and the Range header of each request.
        generation: of the object; another one asked for is a 404.
    """

    def __init__(self, body: bytes, spoil: Callable[[ObjectServer, Handler, bytes], bytes | None]) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.body, self.generation = body, 7
        self.over = threading.Event()
        outer = self

        class Answers(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers.get("Range")))
                wanted = re.search(r"generation=(\d+)", self.path)
                if wanted and int(wanted.group(1)) != outer.generation:
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                first, last = (int(span.group(1)), int(span.group(2))) if span else (0, len(outer.body) - 1)
                part = outer.body[first : last + 1]
                self.send_response(206 if span else 200)
                if span:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(outer.body)}")
                checksum = base64.b64encode(crc32c_of(outer.body).to_bytes(4, "big")).decode()
                self.send_header("x-goog-generation", str(outer.generation))
                self.send_header("x-goog-hash", f"crc32c={checksum},md5=AAAA")
                said = spoil(outer, self, part)
                if said is not None:
                    self.send_header("Content-Length", str(len(said)))
                    self.end_headers()
                    self.wfile.write(said)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        super().__init__(Answers)

    def __exit__(self, *arguments: object) -> None:
        self.over.set()
        super().__exit__(*arguments)


def opened(server: ObjectServer, monkeypatch: pytest.MonkeyPatch, **settings: float) -> Store:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    config = {"retry_first_s": 0.001, "retry_longest_s": 0.01} | settings
    return open_store("gs://some-bucket", StoreConfig(transport="direct", **config))


class Now:
    """What a listing says of the object once it is overwritten."""

    size, generation = len(BODY), 8


def begin(handler: Handler, part: bytes, send: int) -> None:
    """The headers of the whole part, and its first bytes."""
    handler.send_header("Content-Length", str(len(part)))
    handler.end_headers()
    handler.wfile.write(part[:send])
    handler.wfile.flush()


def test_a_body_that_takes_longer_than_the_read_timeout_is_read_by_one_request_as_long_as_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trickle(server: ObjectServer, handler: Handler, part: bytes) -> None:
        begin(handler, part, 0)
        step = -(-len(part) // 10)
        for start in range(0, len(part), step):
            server.over.wait(0.5)
            handler.wfile.write(part[start : start + step])
            handler.wfile.flush()

    with ObjectServer(BODY, trickle) as server:
        store = opened(server, monkeypatch, read_timeout_s=4)
        assert store.fetch([ObjectMeta("a", len(BODY), 7, crc32c_of(BODY))]) == [BODY]
        assert len(server.asked) == 1


def cut_half(server: ObjectServer, handler: Handler, part: bytes) -> bytes | None:
    """Cut all that is longer than 4 KB in its middle."""
    if len(part) <= 4096:
        return part
    begin(handler, part, len(part) // 2)
    handler.close_connection = True
    return None


def fall_silent(server: ObjectServer, handler: Handler, part: bytes) -> bytes | None:
    """Send half of all that is longer than 30 KB, and then no more."""
    if len(part) <= 30_000:
        return part
    begin(handler, part, len(part) // 2)
    server.over.wait(60)
    handler.close_connection = True
    return None


@pytest.mark.parametrize("generation", [7, None])
@pytest.mark.parametrize("spoil", [cut_half, fall_silent])
def test_a_body_that_was_cut_is_continued_on_the_same_generation(
    spoil: Callable[[ObjectServer, Handler, bytes], bytes | None],
    generation: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ObjectServer(BODY, spoil) as server:
        store = opened(server, monkeypatch, read_timeout_s=1 if spoil is fall_silent else 30)
        assert store.fetch([ObjectMeta("a", len(BODY), generation, crc32c_of(BODY))]) == [BODY]
        starts = [int(asked.split("=")[1].split("-")[0]) if asked else 0 for _, asked in server.asked]
        assert starts == sorted(starts)
        assert starts.count(0) == 1
        assert all("generation=7" in target for target, _ in server.asked[1:])
        server.asked.clear()
        (piece,) = store.fetch_ranges([RangeRequest(ObjectMeta("a", len(BODY), 7), 100, 90_000)])
        assert bytes(piece) == BODY[100:90_000]
        assert server.asked[0][1] == "bytes=100-89999"
        assert len({asked for _, asked in server.asked}) == len(server.asked)


def test_a_body_that_is_overwritten_while_it_is_continued_is_read_from_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overwrite_once(server: ObjectServer, handler: Handler, part: bytes) -> bytes | None:
        if server.generation == 8:
            return part
        begin(handler, part, len(part) // 2)
        server.body, server.generation = BODY[::-1], 8
        handler.close_connection = True
        return None

    with ObjectServer(BODY, overwrite_once) as server:
        store = opened(server, monkeypatch)
        monkeypatch.setattr(
            "ingest.stores.gcs_direct.DirectReader._now",
            lambda *_: type("Now", (), {"size": len(BODY), "generation": 8}),
        )
        assert store.fetch([ObjectMeta("a", len(BODY))]) == [BODY[::-1]]


def test_silence_names_the_setting_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(server: ObjectServer, handler: Handler, _part: bytes) -> None:
        server.over.wait(60)
        handler.close_connection = True

    with ObjectServer(BODY, silent) as server:
        store = opened(server, monkeypatch, read_timeout_s=0.1, retry_deadline_s=0.3)
        with pytest.raises(UnreachableError, match=r"no byte came for 0\.1 s.*raise read_timeout_s"):
            store.fetch([ObjectMeta("a", len(BODY))])


def test_a_bit_flipped_is_seen_by_the_answers_own_checksum_where_the_listing_has_none(
    gcs_server: EmbeddedServer, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(gcs_server.url, [Fault(kind="flip", request="read", probability=0.2)], seed=5) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        place = GCSPlace(open_store(f"gs://{bucket}", StoreConfig(transport="direct", retry_first_s=0.001)), proxy.url)
        bodies = [bytes([number]) * 700 for number in range(60)]
        listed = [ObjectMeta(f"{number:02d}", 700) for number in range(60)]
        for meta, body in zip(listed, bodies, strict=True):
            place.write(meta.name, body)
        assert place.store.fetch(listed) == bodies
        assert proxy.injected["flip"] > 0


def test_parts_of_an_object_without_a_listed_generation_are_never_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite_after_each(server: ObjectServer, _handler: Handler, part: bytes) -> bytes:
        server.body, server.generation = bytes(len(BODY)), server.generation + 1
        return part

    with ObjectServer(BODY, overwrite_after_each) as server:
        store = opened(server, monkeypatch, range_gap_bytes=1)
        monkeypatch.setattr(
            "ingest.stores.gcs_direct.DirectReader._now",
            lambda *_: type("Now", (), {"size": len(BODY), "generation": 8}),
        )
        meta = ObjectMeta("a", len(BODY))
        first, second = store.fetch_ranges([RangeRequest(meta, 0, 10), RangeRequest(meta, 50_000, 50_010)])
        assert first == BODY[:10]
        assert isinstance(second, StaleManifestError)


def test_a_wrong_length_of_the_listed_generation_is_a_damaged_answer_and_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def short_at_first(server: ObjectServer, _handler: Handler, part: bytes) -> bytes:
        return part[:-1] if len(server.asked) == 1 else part

    with ObjectServer(BODY, short_at_first) as server:
        store = opened(server, monkeypatch)
        assert store.fetch([ObjectMeta("a", len(BODY), 7, crc32c_of(BODY))]) == [BODY]
        assert len(server.asked) == 2


def test_a_wrong_length_that_stays_is_corrupt_and_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    with ObjectServer(BODY, lambda _server, _handler, part: part[:-1]) as server:
        store = opened(server, monkeypatch, retry_corrupt_tries=2)
        (found,) = store.fetch_each([ObjectMeta("a", len(BODY), 7)])
        assert isinstance(found, CorruptObjectError)
