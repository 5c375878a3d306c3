"""GETs by libcurl: many at once and never more than allowed, over TLS, and each failure of its own kind."""

from __future__ import annotations

import concurrent.futures
import gc
import http.server
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from ingest.errors import CorruptObjectError, CredentialsError
from ingest.stores import ObjectMeta, StoreConfig, open_store
from ingest.stores.base import RangeRequest
from ingest.stores.curl import Answer, CurlPool, Get, PoolClosedError
from ingest.stores.gcs_clients import curl_pool
from ingest.stores.retry import PassingError

from .web_server import WebServer

Answering = Callable[[http.server.BaseHTTPRequestHandler], None]


class Server(WebServer):
    """A web server of ours: what `answering` does, and how many requests it met, at most at a time."""

    def __init__(self, answering: Answering, tls: ssl.SSLContext | None = None) -> None:
        self.requests, self.busy, self.busiest = 0, 0, 0
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with outer._lock:
                    outer.requests += 1
                    outer.busy += 1
                    outer.busiest = max(outer.busiest, outer.busy)
                try:
                    answering(self)
                finally:
                    with outer._lock:
                        outer.busy -= 1

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        super().__init__(Handler, tls)


def say(handler: http.server.BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in ({"Content-Length": str(len(body))} | named).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def say_path(handler: http.server.BaseHTTPRequestHandler) -> None:
    say(handler, 200, handler.path.encode())


@pytest.fixture
def pool() -> Iterator[CurlPool]:
    pool = CurlPool(4, connect_timeout_s=5, read_timeout_s=1, user_agent="test")
    yield pool
    pool.close()


def test_many_threads_get_each_their_own_in_order_and_never_more_at_a_time_than_allowed(pool: CurlPool) -> None:
    def slowly(handler: http.server.BaseHTTPRequestHandler) -> None:
        time.sleep(0.002)
        say_path(handler)

    with Server(slowly) as server, concurrent.futures.ThreadPoolExecutor(8) as threads:
        batches = [[f"/{batch}/{number}" for number in range(25)] for batch in range(8)]
        asked = [threads.submit(pool.get, [Get(server.url + path, 100) for path in paths]) for paths in batches]
        for paths, answers in zip(batches, asked, strict=True):
            assert [answer.body.decode() for answer in answers.result() if isinstance(answer, Answer)] == paths
        assert server.busiest == 4
        assert server.requests == 200


def test_over_tls_an_authority_that_is_known_is_trusted_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    with Server(say_path, tls) as server:
        for known in (False, True):
            if known:
                monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
            pool = CurlPool(2, connect_timeout_s=5, read_timeout_s=5, user_agent="test")
            (outcome,) = pool.get([Get(f"{server.url}/x", 2)])
            pool.close()
            if known:
                assert isinstance(outcome, Answer)
                assert outcome[:4] == (200, b"/x", 2, None)
            else:
                assert isinstance(outcome, PassingError)
                assert outcome.kind == "refused"
                assert "certificate" in outcome.detail


def cut(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"x" * 500)
    handler.close_connection = True


def hang_up(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def sleep(handler: http.server.BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)
    hang_up(handler)


@pytest.mark.parametrize(("answering", "kind"), [(cut, "cut"), (hang_up, "reset"), (sleep, "timeout")])
def test_each_way_that_a_connection_fails_has_its_kind(pool: CurlPool, answering: Answering, kind: str) -> None:
    with Server(answering) as server:
        (outcome,) = pool.get([Get(f"{server.url}/x", 1000)])
    assert isinstance(outcome, PassingError)
    assert outcome.kind == kind


def test_a_server_that_takes_no_connection_is_named(pool: CurlPool) -> None:
    (outcome,) = pool.get([Get("http://127.0.0.1:1/x", 1)])
    assert isinstance(outcome, PassingError)
    assert (outcome.kind, outcome.detail) == ("refused", "127.0.0.1:1 takes no connection")


def test_an_object_that_has_become_far_larger_is_not_read_to_its_end(pool: CurlPool) -> None:
    def endlessly(handler: http.server.BaseHTTPRequestHandler) -> None:
        say(handler, 200, b"x" * 1000, Content_Length=str(10**12))
        handler.close_connection = True

    with Server(endlessly) as server:
        (outcome,) = pool.get([Get(f"{server.url}/x", 10)])
    assert isinstance(outcome, Answer)
    assert outcome.object_bytes == 10**12


def test_after_a_refusal_the_rest_of_its_batch_is_not_sent() -> None:
    pool = CurlPool(1, connect_timeout_s=5, read_timeout_s=5, user_agent="test")
    with Server(lambda handler: say(handler, 403, b"no")) as server:
        outcomes = pool.get([Get(f"{server.url}/{number}", 1) for number in range(20)])
        assert server.requests == 1
    pool.close()
    refused, *rest = outcomes
    assert isinstance(refused, Answer)
    assert refused[:4] == (403, b"no", 2, None)
    assert rest == [None] * 19


def test_a_closed_pool_ends_what_is_under_way_and_takes_no_more(pool: CurlPool) -> None:
    with Server(sleep) as server, concurrent.futures.ThreadPoolExecutor(1) as threads:
        asked = threads.submit(pool.get, [Get(f"{server.url}/x", 1)])
        while not server.busy:
            time.sleep(0.01)
        pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            asked.result()
        with pytest.raises(RuntimeError, match="closed"):
            pool.get([Get(f"{server.url}/x", 1)])


def test_a_wait_that_the_server_asks_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy_at_first(handler: http.server.BaseHTTPRequestHandler) -> None:
        if server.requests == 1:
            say(handler, 429, b"slow down", Retry_After="1")
        else:
            say(handler, 200, b"abc")

    with Server(busy_at_first) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        store = open_store("gs://b", StoreConfig(transport="direct", retry_first_s=0.001, retry_longest_s=0.001))
        started = time.monotonic()
        assert store.fetch([ObjectMeta("a", 3)]) == [b"abc"]
        assert time.monotonic() - started >= 1


def test_what_a_server_says_when_it_refuses_is_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    said = b"<?xml version='1.0'?><Error><Code>AuthenticationRequired</Code><Message>Who are\n you?</Message></Error>"
    with Server(lambda handler: say(handler, 401, said)) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        with pytest.raises(CredentialsError, match=r"reading gs://b/a: .*401: Who are you\?"):
            open_store("gs://b", StoreConfig(transport="direct")).fetch([ObjectMeta("a", 3)])


def test_bodies_are_not_held_on_to_once_they_are_handed_over(pool: CurlPool) -> None:
    with Server(lambda handler: say(handler, 200, b"x" * 2_000_000)) as server:
        before = rss_bytes()
        for _ in range(10):
            outcomes = pool.get([Get(f"{server.url}/{number}", 2_000_000) for number in range(20)])
            assert all(isinstance(outcome, Answer) and len(outcome.body) == 2_000_000 for outcome in outcomes)
        del outcomes
        kept = [thing for thing in gc.get_objects() if type(thing) is list and sum(map(size_of_bytes, thing)) > 10**6]
        assert kept == []
        assert rss_bytes() - before < 200e6


def size_of_bytes(thing: object) -> int:
    if isinstance(thing, Answer):
        return len(thing.body)
    return len(thing) if isinstance(thing, bytes) else 0


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_beginning_of_a_longer_body_is_not_taken_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_chunks(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (200_000, b"x" * 200_000))

    with Server(in_chunks) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        config = StoreConfig(transport="direct", retry_first_s=0.001, retry_corrupt_tries=2)
        (found,) = open_store("gs://b", config).fetch_each([ObjectMeta("a", 100_000)])
        assert isinstance(found, CorruptObjectError)


def test_another_part_than_was_asked_for_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def the_first(handler: http.server.BaseHTTPRequestHandler) -> None:
        say(handler, 206, b"x" * 100, Content_Range="bytes 0-99/1000")

    with Server(the_first) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        store = open_store("gs://b", StoreConfig(retry_first_s=0.001, retry_corrupt_tries=2))
        (wrong,) = store.fetch_ranges([RangeRequest(ObjectMeta("a", 1000), 500, 600)])
        assert isinstance(wrong, CorruptObjectError)
        assert store.fetch_ranges([RangeRequest(ObjectMeta("a", 1000), 0, 100)]) == [b"x" * 100]


def test_a_request_that_cannot_be_made_is_an_error_and_no_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "josé.pem"))
    pool = CurlPool(2, connect_timeout_s=5, read_timeout_s=5, user_agent="a\0b")  # libcurl takes no such string
    with pytest.raises(PoolClosedError):
        pool.get([Get("http://127.0.0.1:1/x", 1)])
    assert pool.closed
    pool.close()


def test_a_file_of_authorities_below_a_folder_with_any_name_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.cert_pem.write_to_path(tmp_path / "josé.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "josé.pem"))
    pool = CurlPool(2, connect_timeout_s=5, read_timeout_s=5, user_agent="test")
    with Server(say_path, tls) as server:
        (outcome,) = pool.get([Get(f"{server.url}/é", 3)])
    pool.close()
    assert isinstance(outcome, Answer)
    assert outcome.status == 200


def test_a_token_that_ran_out_while_a_request_waited_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def once_too_late(handler: http.server.BaseHTTPRequestHandler) -> None:
        say(handler, 401, b"expired") if server.requests == 1 else say(handler, 200, b"abc")

    with Server(once_too_late) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        assert open_store("gs://b", StoreConfig(transport="direct")).fetch([ObjectMeta("a", 3)]) == [b"abc"]


def test_after_a_pool_has_failed_the_next_read_makes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(lambda handler: say(handler, 200, b"abc")) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        config = StoreConfig(transport="direct", max_in_flight=3)
        curl_pool(config, 3).close()
        assert open_store("gs://b", config).fetch([ObjectMeta("a", 3)]) == [b"abc"]
