"""Dataflux's parallel listing: the same set as the plain one, and no process of it outlives us."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ingest.emulator import EmbeddedServer
from ingest.errors import ListingError
from ingest.fault_proxy import Fault, FaultProxy
from ingest.listing import list_objects
from ingest.stores import StoreConfig, open_store
from ingest.stores.fast_listing import fast_list_objects

from .gcs_place import GCSPlace
from .needs import needs_dataflux

COUNT = 12_000


@pytest.fixture(scope="module")
def many() -> Iterator[str]:
    """The URL of a server that holds 12,000 objects in gs://many/data, and one beside that folder."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # 12,000 files take 27 s on a disk, and 2 s here
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        data = Path(folder) / "many" / "data"
        data.mkdir(parents=True)
        for number in range(COUNT):
            (data / f"case_{number:05d}_x.npy").write_bytes(b"x" * (number % 5))
        (Path(folder) / "many" / "data2.npy").touch()
        with EmbeddedServer(data=folder, backend="filesystem", scratch=memory) as server:
            yield server.url


def group_of(leader: int) -> list[int]:
    """The processes of a group that are not zombies."""
    alive = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(") ")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            alive.append(int(status.parent.name))
    return alive


def wait_until(condition: Callable[[], object], timeout_s: float = 240.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_12_000_objects_are_listed_completely_both_ways(many: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", many)
    plain = list_objects(open_store("gs://many/data"))
    assert len(plain) == COUNT
    config = StoreConfig(fast_listing_above=1000, fast_listing_processes=3, list_page_size=900)
    fast = list_objects(open_store("gs://many/data", config))
    assert fast == plain  # with generations and checksums
    assert all(meta.generation is not None and meta.crc32c is not None for meta in fast)


@needs_dataflux
def test_all_storage_classes_are_listed_and_counted(gcs_server: EmbeddedServer, bucket: str) -> None:
    place = GCSPlace(open_store(f"gs://{bucket}"), gcs_server.url)
    for number in range(30):
        place.write(f"p/{number:02d}", b"x", "COLDLINE" if number % 3 == 0 else None)
    for name in ("p/folder/", "dataflux-composed-objects/1", "q"):
        place.write(name, b"x")
    found = fast_list_objects(bucket=bucket, prefix="p/", project=None, processes=1, timeout_s=60)
    assert sorted(found.sizes) == [f"p/{number:02d}" for number in range(30)]
    assert found.classes == {"COLDLINE": 10}


@needs_dataflux
def test_where_dataflux_fails_split_points_are_found_by_probing(
    gcs_server: EmbeddedServer, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = GCSPlace(open_store(f"gs://{bucket}"), gcs_server.url)
    for number in range(30):
        place.write(f"{number:02d}", b"x")
    with FaultProxy(gcs_server.url) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        store = open_store(
            f"gs://{bucket}", StoreConfig(fast_listing_above=10, fast_listing_processes=1, list_page_size=7)
        )
        plain = list(store.list())
        # Ours ask for their fields; only Dataflux's requests do not.
        proxy.faults = [Fault(kind="status", status=403, target_pattern=r"^(?!.*fields=).*$")]
        with caplog.at_level(logging.WARNING):
            listed = list_objects(store)
    assert listed == plain
    assert sum("takes over" in record.message for record in caplog.records) == 1


@needs_dataflux
def test_a_listing_over_its_time_is_ended(
    gcs_server: EmbeddedServer, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(gcs_server.url, [Fault(kind="stall", seconds=60)]) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        with pytest.raises(ListingError, match="within 3 s"):
            fast_list_objects(bucket=bucket, prefix="", project=None, processes=2, timeout_s=3)


@needs_dataflux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_survives_its_parent(
    gcs_server: EmbeddedServer, bucket: str, tmp_path: Path, number: signal.Signals
) -> None:
    with FaultProxy(gcs_server.url, [Fault(kind="stall", seconds=60)]) as proxy:
        code = (
            "from ingest.stores.fast_listing import fast_list_objects\n"
            f"fast_list_objects(bucket={bucket!r}, prefix='', project=None, processes=3, timeout_s=60)"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "STORAGE_EMULATOR_HOST": proxy.url, "TMPDIR": str(tmp_path)},
        )

        def child() -> int | None:
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            return int(children[0]) if children else None

        assert wait_until(child)
        leader = child()
        assert leader is not None
        assert wait_until(lambda: len(group_of(leader)) == 4)  # the controller and three workers
        parent.send_signal(number)
        parent.wait(10)
        assert wait_until(lambda: not group_of(leader)), group_of(leader)


@needs_dataflux
def test_no_process_survives_a_killed_controller(gcs_server: EmbeddedServer, bucket: str, tmp_path: Path) -> None:
    with FaultProxy(gcs_server.url, [Fault(kind="stall", seconds=60)]) as proxy:
        request = {"bucket": bucket, "prefix": "", "project": None, "processes": 2, "parent": os.getpid()}
        request["answer"] = str(tmp_path / "answer.json")
        child = subprocess.Popen(
            [sys.executable, "-m", "ingest.stores.fast_listing", json.dumps(request)],
            env={**os.environ, "STORAGE_EMULATOR_HOST": proxy.url},
            start_new_session=True,
        )
        assert wait_until(lambda: len(group_of(child.pid)) == 3)
        child.kill()
        child.wait(10)
        assert wait_until(lambda: not group_of(child.pid))
