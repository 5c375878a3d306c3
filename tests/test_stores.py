"""Every store against the one contract, and what is particular to each."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingest.emulator import EmbeddedServer
from ingest.errors import (
    ConfigError,
    ObjectNotFoundError,
    PreconditionError,
    StoreError,
    UnknownSchemeError,
    UnreachableError,
)
from ingest.fault_proxy import Fault, FaultKind, FaultProxy
from ingest.store_contract import FlatNamesContract, Place, StoreContract
from ingest.stores import ObjectMeta, Store, StoreConfig, open_store
from ingest.stores.local import LocalStore, locked
from ingest.testing import LatencyStore, MemoryStore

from .gcs_place import GCSPlace
from .needs import COMPOSE

FAST = {"retry_first_s": 0.01, "retry_longest_s": 0.1}
NOBODY = 65534


class MemoryPlace:
    """A place in memory."""

    def __init__(self, store: MemoryStore, shown: Store | None = None) -> None:
        self.store: Store = shown or store
        self.write = store.put
        self.read = lambda name: store.fetch([meta for meta in store.list() if meta.name == name])[0]
        self.delete = store.delete


class TestMemoryStore(StoreContract, FlatNamesContract):
    """The store in memory, by the contract."""

    @pytest.fixture
    def place(self, request: pytest.FixtureRequest) -> Place:
        return MemoryPlace(MemoryStore(f"memory://{request.node.name}").create())

    @pytest.fixture
    def missing_store(self) -> Store:
        return MemoryStore("memory://never-created")

    @pytest.fixture
    def denied_store(self) -> tuple[Store, ObjectMeta]:
        return MemoryStore("memory://denied").create().deny(), ObjectMeta("a", 1)


class TestLatencyStore(TestMemoryStore):
    """A store made slow, by the contract."""

    @pytest.fixture
    def place(self, request: pytest.FixtureRequest) -> Place:
        store = MemoryStore(f"memory://slow-{request.node.name}").create()
        return MemoryPlace(store, LatencyStore(store, 0.001))


class FolderPlace:
    """A folder."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.store = store
        self._folder = folder

    def write(self, name: str, data: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        # The clock that stamps files may stand still between two writes; here it must not.
        now_ns = path.stat().st_mtime_ns
        os.utime(path, ns=(now_ns, now_ns + 1_000_000 * (1 + len(data))))

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def delete(self, name: str) -> None:
        (self._folder / name).unlink()


class TestLocalStore(StoreContract):
    """Local folders, by the contract."""

    @pytest.fixture(params=["path", "file-uri"])
    def place(self, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
        folder = tmp_path / "with space %41 and #"
        folder.mkdir()
        uri = str(folder) if request.param == "path" else folder.as_uri()
        return FolderPlace(folder, open_store(uri))

    @pytest.fixture
    def missing_store(self, tmp_path: Path) -> Store:
        return open_store(str(tmp_path / "none"))

    @pytest.fixture
    def denied_store(self, tmp_path: Path) -> Iterator[tuple[Store, ObjectMeta]]:
        folder = tmp_path / "denied"
        folder.mkdir()
        (folder / "a").write_bytes(b"x")
        folder.chmod(0)
        store = open_store(str(folder))
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(NOBODY)  # root may read everything
        try:
            yield store, ObjectMeta("a", 1)
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o755)


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "a//b", ".", "a\0b"])
def test_local_store_refuses_names_that_lead_out(tmp_path: Path, name: str) -> None:
    store = open_store(str(tmp_path / "in"))
    with pytest.raises(ConfigError, match="name"):
        store.put(name, b"x")
    with pytest.raises(ConfigError, match="name"):
        store.fetch([ObjectMeta(name, 1)])
    assert not list(tmp_path.iterdir())


def test_local_store_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1").write_bytes(b"x")
    (tmp_path / "real" / "back").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "1")
    (tmp_path / "folder-link").symlink_to(tmp_path / "real")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    store = open_store(str(tmp_path))
    listed = list(store.list())
    assert [meta.name for meta in listed] == ["folder-link/1", "link", "real/1"]
    assert store.fetch(listed) == [b"x"] * 3


def test_local_store_leaves_nothing_of_a_failed_put_and_lists_no_unfinished_file(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    for name in ("a/b", "folder/inside"):
        with pytest.raises(StoreError, match=r"expected .* found"):
            store.put(name, b"x")
    (tmp_path / ".voxflux-tmp-abc").write_bytes(b"half")
    assert [meta.name for meta in store.list()] == ["a"]


@pytest.mark.parametrize("act", ["put", "delete"])
def test_a_local_write_without_a_condition_waits_for_one_that_is_between_its_check_and_its_write(
    tmp_path: Path, act: str
) -> None:
    store = LocalStore(str(tmp_path))
    store.put("a", b"first")
    acts = {"put": lambda: store.put("a", b"without"), "delete": lambda: store.delete("a")}
    thread = threading.Thread(target=acts[act])
    with locked(str(tmp_path / "a")):
        thread.start()
        thread.join(0.3)
        assert (tmp_path / "a").read_bytes() == b"first"
    thread.join()
    assert (tmp_path / "a").exists() == (act == "put")


def test_a_local_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    name = "n" * 255
    store.delete(name, store.put(name, b"x", store.put(name, b"x")))
    assert list(tmp_path.iterdir()) == []


def test_a_local_file_in_place_of_the_folder_is_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StoreError, match="expected a folder"):
        list(open_store(str(tmp_path / "file")).list())


@pytest.mark.parametrize("kind", ["reset", "status"])
def test_a_conditional_write_or_delete_whose_answer_is_lost_counts_once(
    gcs_server: EmbeddedServer, bucket: str, monkeypatch: pytest.MonkeyPatch, kind: FaultKind
) -> None:
    faults = [Fault(kind=kind, request=request, after_server=True, times=1) for request in ("upload", "delete")]
    with FaultProxy(gcs_server.url, faults) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        store = open_store(f"gs://{bucket}", StoreConfig(**FAST))
        generation = store.put("a", b"mine", if_generation=0)
        assert [meta.generation for meta in store.list()] == [generation]
        store.delete("a", if_generation=generation)
        assert list(store.list()) == []
        assert sum(proxy.injected.values()) == 2


@pytest.mark.parametrize("transport", [COMPOSE, "direct", "auto"])
class TestGCSStore(StoreContract, FlatNamesContract):
    """GCS with each transport, by the contract."""

    @pytest.fixture
    def place(
        self, gcs_server: EmbeddedServer, bucket: str, transport: str, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Place]:
        config = StoreConfig(transport=transport, list_page_size=3, **FAST)
        with FaultProxy(gcs_server.url) as proxy:  # it enforces preconditions, as GCS does
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
            yield GCSPlace(open_store(f"gs://{bucket}/in a folder", config), gcs_server.url)

    @pytest.fixture
    def missing_store(self, gcs_server: EmbeddedServer, transport: str) -> Store:
        return open_store("gs://never-created/x", StoreConfig(transport=transport, **FAST))

    @pytest.fixture
    def denied_store(
        self, gcs_server: EmbeddedServer, bucket: str, transport: str, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[tuple[Store, ObjectMeta]]:
        with FaultProxy(gcs_server.url, [Fault(kind="status", status=403)]) as proxy:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
            yield (
                open_store(f"gs://{bucket}", StoreConfig(transport=transport, **FAST)),
                ObjectMeta("a", 1, 1, 1),
            )

    def test_a_large_put_replaces_the_generation_that_it_names_and_no_other(self, place: Place) -> None:
        large = bytes(9 * 2**20)  # above 8 MiB: a resumable upload
        first = place.store.put("a", large, if_generation=0)
        with pytest.raises(PreconditionError):
            place.store.put("a", large, if_generation=0)
        place.store.put("a", b"2", if_generation=first)
        with pytest.raises(PreconditionError):
            place.store.put("a", large, if_generation=first)
        assert place.read("a") == b"2"


def test_gcs_store_leaves_out_folder_objects_and_composites(gcs_server: EmbeddedServer, bucket: str) -> None:
    store = open_store(f"gs://{bucket}")
    place = GCSPlace(store, gcs_server.url)
    for name in ("a", "folder/", "dataflux-composed-objects/1234"):
        place.write(name, b"x")
    assert [meta.name for meta in store.list()] == ["a"]


def test_gcs_listing_carries_generation_and_checksum(gcs_server: EmbeddedServer, bucket: str) -> None:
    store = open_store(f"gs://{bucket}")
    GCSPlace(store, gcs_server.url).write("a", b"123456789")
    (meta,) = store.list()
    assert meta.crc32c == 0xE3069283  # the check value that the CRC catalogue gives for CRC-32C
    assert meta.generation
    assert meta.storage_class == "STANDARD"


def test_a_prefix_is_a_folder_and_not_a_beginning(gcs_server: EmbeddedServer, bucket: str) -> None:
    for name in ("x/1", "xyz"):
        GCSPlace(open_store(f"gs://{bucket}"), gcs_server.url).write(name, b"")
    assert [meta.name for meta in open_store(f"gs://{bucket}/x").list()] == ["1"]


@pytest.mark.parametrize("transport", [COMPOSE, "direct"])
def test_a_closed_port_is_said_within_seconds(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    with FaultProxy("http://127.0.0.1:9") as proxy:
        closed_url = proxy.url
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", closed_url)
    config = StoreConfig(retry_refused_s=0.5, transport=transport, **FAST)
    with pytest.raises(UnreachableError, match=closed_url.removeprefix("http://")):
        open_store("gs://some-bucket", config).fetch([ObjectMeta(f"{n}", 9, 1, 1) for n in range(64)])
    with pytest.raises(UnreachableError, match="check that it runs"):
        list(open_store("gs://some-bucket", config).list())


@pytest.mark.parametrize("uri", ["gs://", "gs:///x", "", "file://host/x", "file:///x?y"])
def test_a_uri_that_names_no_place_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"expected"):
        open_store(uri)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(UnknownSchemeError, match="s3"):
        open_store("s3://bucket/x")


def test_missing_objects_without_a_generation_are_missing(gcs_server: EmbeddedServer, bucket: str) -> None:
    store = open_store(f"gs://{bucket}", StoreConfig(transport="direct", **FAST))
    assert isinstance(store.fetch_each([ObjectMeta("none", 3)])[0], ObjectNotFoundError)


def test_importing_the_stores_loads_no_client() -> None:
    heavy = ("google.cloud.storage", "dataflux_core", "pycurl", "ray", "torch")
    code = f"import sys, ingest.stores; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
