"""Reads under injected faults: retried, checked, and never a composite left behind."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ingest.emulator import EmbeddedServer
from ingest.errors import CorruptObjectError, PermissionDeniedError, StaleManifestError, UnreachableError
from ingest.fault_proxy import Fault, FaultProxy, classify
from ingest.stores import ObjectMeta, StoreConfig, Transport, open_store
from ingest.stores.gcs_compose import compose_refusal, leftovers, sweep_leftovers
from ingest.stores.retry import RETRIES

from .gcs_place import GCSPlace
from .needs import COMPOSE, needs_dataflux

COUNT = 80
BODIES = [b"\x93NUMPY" + bytes([number]) * (500 + number) for number in range(COUNT)]
Open = Callable[..., GCSPlace]


@pytest.fixture
def proxy(gcs_server: EmbeddedServer) -> Iterator[FaultProxy]:
    with FaultProxy(gcs_server.url, seed=3) as proxy:
        yield proxy


@pytest.fixture
def opened(proxy: FaultProxy, gcs_server: EmbeddedServer, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Open:
    """A bucket of 80 objects, opened through the proxy with one transport."""

    def open_through(transport: Transport, **settings: float) -> GCSPlace:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        config = {"retry_first_s": 0.01, "retry_longest_s": 0.05, "retry_deadline_s": 60.0, "read_timeout_s": 30.0}
        store = open_store(f"gs://{bucket}", StoreConfig(transport=transport, **(config | settings)))
        place = GCSPlace(store, gcs_server.url)
        for number, body in enumerate(BODIES):
            place.write(f"{number:03d}.npy", body)
        return place

    return open_through


def no_composite_is_left(place: GCSPlace, proxy: FaultProxy) -> bool:
    return not proxy.composites_alive and len(place.keys()) == COUNT


@pytest.mark.parametrize("transport", [COMPOSE, "direct"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(kind="status", status=503, probability=0.2),
        Fault(kind="status", status=429, probability=0.2),
        Fault(kind="status", status=408, probability=0.2),
        Fault(kind="status", status=503, probability=0.2, after_server=True),
        Fault(kind="reset", probability=0.2),
        Fault(kind="reset", probability=0.2, after_server=True),
        Fault(kind="truncate", probability=0.2, request="read"),
        Fault(kind="flip", probability=0.2, request="read"),
        Fault(kind="stall", probability=0.05, seconds=1.0),
        Fault(kind="latency", probability=0.2, seconds=0.02),
    ],
    ids=lambda fault: f"{fault.kind}{fault.status if fault.kind == 'status' else ''}{'-after' * fault.after_server}",
)
def test_passing_faults_change_no_byte_and_leave_no_composite(
    opened: Open, proxy: FaultProxy, transport: Transport, fault: Fault
) -> None:
    # Only a stall is to end a request by its silence: a busy machine is silent for half a second too.
    place = opened(transport, read_timeout_s=0.5) if fault.kind == "stall" else opened(transport)
    listed = list(place.store.list())
    proxy.faults = [fault]
    assert place.store.fetch(listed) == BODIES
    for _ in range(5):
        place.store.fetch(listed[:64])
    assert sum(proxy.injected.values()) > 0
    proxy.faults = []
    sweep_leftovers()
    assert no_composite_is_left(place, proxy)


@needs_dataflux
def test_composing_takes_far_fewer_requests(opened: Open, proxy: FaultProxy) -> None:
    place = opened("compose")
    assert place.store.fetch(list(place.store.list())) == BODIES
    assert proxy.requests == {"list": 1, "compose": 3, "read": 3, "delete": 3}


def test_a_direct_read_is_one_request_an_object(opened: Open, proxy: FaultProxy) -> None:
    place = opened("direct")
    assert place.store.fetch(list(place.store.list())) == BODIES
    assert proxy.requests == {"list": 1, "read": COUNT}


@needs_dataflux
def test_a_403_on_compose_switches_to_direct_once_and_names_the_permission(
    opened: Open, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    place = opened("compose")
    proxy.faults = [Fault(kind="status", status=403, request="compose")]
    listed = list(place.store.list())
    with caplog.at_level(logging.WARNING):
        assert place.store.fetch(listed) == BODIES
        composes = proxy.requests["compose"]
        assert place.store.fetch(listed) == BODIES
    assert proxy.requests["compose"] == composes
    assert sum("storage.objects.create" in record.message for record in caplog.records) == 1
    assert no_composite_is_left(place, proxy)


@needs_dataflux
def test_a_403_on_deleting_composites_is_not_repeated_and_leftovers_are_swept(opened: Open, proxy: FaultProxy) -> None:
    place = opened("compose", compose_in_flight=1)
    proxy.faults = [Fault(kind="status", status=403, request="delete")]
    listed = list(place.store.list())
    assert place.store.fetch(listed) == BODIES
    assert proxy.requests["compose"] == 1
    assert len(leftovers()) == 1
    assert compose_refusal(place.store.uri.split("/")[2]) is not None
    proxy.faults = []
    sweep_leftovers()
    assert leftovers() == []
    assert no_composite_is_left(place, proxy)


@needs_dataflux
def test_a_composed_read_without_checksums_is_checked_by_its_magic(opened: Open, proxy: FaultProxy) -> None:
    place = opened("compose")
    listed = [ObjectMeta(meta.name, meta.size_bytes) for meta in place.store.list()]
    assert place.store.fetch(listed) == BODIES
    # Two objects swap their sizes: cut by the old ones, the second no longer begins as an .npy file.
    place.write("000.npy", BODIES[1])
    place.write("001.npy", BODIES[0])
    bodies = place.store.fetch_each(listed)
    assert [type(body) for body in bodies[:2]] == [StaleManifestError, StaleManifestError]
    assert bodies[2:] == BODIES[2:]


@pytest.mark.parametrize("transport", [COMPOSE, "direct"])
def test_an_object_that_stays_corrupt_is_its_own_error(opened: Open, proxy: FaultProxy, transport: Transport) -> None:
    place = opened(transport, retry_corrupt_tries=3)
    listed = list(place.store.list())
    listed[7] = listed[7]._replace(crc32c=1)
    bodies = place.store.fetch_each(listed)
    assert isinstance(bodies[7], CorruptObjectError)
    assert "007.npy" in str(bodies[7])
    assert bodies[:7] + bodies[8:] == BODIES[:7] + BODIES[8:]
    assert no_composite_is_left(place, proxy)


@pytest.mark.parametrize("transport", [COMPOSE, "direct"])
def test_a_server_that_stays_down_ends_in_unreachable(opened: Open, proxy: FaultProxy, transport: Transport) -> None:
    place = opened(transport, retry_deadline_s=0.3)
    listed = list(place.store.list())
    proxy.faults = [Fault(kind="status", status=503)]
    before = RETRIES.snapshot().get("status-503", 0)
    with pytest.raises(UnreachableError, match="503"):
        place.store.fetch(listed)
    assert RETRIES.snapshot()["status-503"] > before


def test_a_403_on_reading_is_not_retried(opened: Open, proxy: FaultProxy) -> None:
    place = opened("direct", max_in_flight=1)
    listed = list(place.store.list())
    proxy.faults = [Fault(kind="status", status=403, request="read")]
    with pytest.raises(PermissionDeniedError, match=r"storage\.objects\.get"):
        place.store.fetch(listed)
    assert proxy.requests["read"] == 1


def test_retry_after_is_honoured_where_it_can_be_known(opened: Open, proxy: FaultProxy) -> None:
    place = opened("direct")
    proxy.faults = [Fault(kind="status", status=429, retry_after_s=30, request="list", times=1)]
    place = GCSPlace(open_store(place.store.uri, StoreConfig(retry_first_s=0.01, retry_deadline_s=5)), proxy.url)
    with pytest.raises(UnreachableError):  # it would have to wait longer than its deadline
        list(place.store.list())
    assert proxy.requests["list"] == 1


def test_put_survives_a_lost_answer(opened: Open, proxy: FaultProxy) -> None:
    place = opened("direct")
    proxy.faults = [Fault(kind="reset", request="upload", after_server=True, times=1)]
    place.store.put("new", b"data")
    assert place.read("new") == b"data"


@pytest.mark.parametrize(
    ("make", "fault", "transport", "reason"),
    [
        pytest.param(
            [900] * 40,
            # Slow composing, so that a loaded machine's slow GETs are quicker still.
            Fault(kind="latency", seconds=3.0, request="compose"),
            "direct",
            "objects/s directly with",
            marks=needs_dataflux,
        ),
        pytest.param(
            [900] * 40,
            Fault(kind="latency", seconds=0.2, object_pattern=r"^\d+$"),
            "compose",
            "with 128 in flight",
            marks=needs_dataflux,
        ),
        ([1_500_000] * 2, None, "direct", "1.5 MB"),
        ([900], None, "direct", "fewer than two"),
        pytest.param(
            [900, 900],
            Fault(kind="status", status=403, request="compose"),
            "direct",
            "storage.objects.create",
            marks=needs_dataflux,
        ),
    ],
    ids=["near", "far", "large", "single", "compose-forbidden"],
)
def test_auto_settles_the_transport_and_says_why(
    gcs_server: EmbeddedServer,
    proxy: FaultProxy,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    make: list[int],
    fault: Fault | None,
    transport: str,
    reason: str,
) -> None:
    from ingest.stores.gcs import GCSStore

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    store = GCSStore(f"gs://{bucket}", StoreConfig(retry_first_s=0.01))
    place = GCSPlace(store, gcs_server.url)
    for number, size in enumerate(make):
        place.write(f"{number}", b"x" * size)
    listed = list(store.list())
    proxy.faults = [fault] if fault else []
    found, why, _ = store.settle(listed)
    assert (found, reason in why) == (transport, True), why
    assert not proxy.composites_alive
    assert len(place.keys()) == len(make)


@needs_dataflux
def test_auto_reads_directly_where_versioning_would_keep_composites(gcs_server: EmbeddedServer) -> None:
    from ingest.stores.gcs import GCSStore

    gcs_server.create_bucket("versioned-bucket", versioning=True)
    store = GCSStore("gs://versioned-bucket")
    transport, reason, _ = store.settle([ObjectMeta("a", 1), ObjectMeta("b", 1)])
    assert transport == "direct"
    assert "versioning" in reason
    assert store.bucket_facts().versioning is True


def test_no_credentials_is_an_error_of_its_own(tmp_path: Path) -> None:
    code = (
        "from ingest.stores import open_store\nfrom ingest.errors import CredentialsError\n"
        "try: list(open_store('gs://some-bucket').list())\nexcept CredentialsError as error: print(error)"
    )
    environment = {"HOME": str(tmp_path), "NO_GCE_CHECK": "true", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=240,
        check=True,
    )
    assert "gcloud auth application-default login" in done.stdout


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("GET", "/storage/v1/b/bk/o?prefix=a", ("list", "")),
        ("GET", "/storage/v1/b/bk", ("bucket", "")),
        ("GET", "/bk/a%2Fb.npy?generation=1", ("read", "a/b.npy")),
        ("GET", "/download/storage/v1/b/bk/o/a%2Fb?alt=media", ("read", "a/b")),
        ("GET", "/storage/v1/b/bk/o/a?projection=noAcl", ("meta", "a")),
        (
            "POST",
            "/storage/v1/b/bk/o/dataflux-composed-objects%2F1/compose",
            ("compose", "dataflux-composed-objects/1"),
        ),
        ("DELETE", "/storage/v1/b/bk/o/a", ("delete", "a")),
        ("POST", "/upload/storage/v1/b/bk/o?uploadType=media&name=a%20b", ("upload", "a b")),
    ],
)
def test_the_proxy_knows_requests_by_kind(method: str, target: str, expected: tuple[str, str]) -> None:
    assert classify(method, target) == expected
