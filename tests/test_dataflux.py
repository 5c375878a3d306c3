"""Reads and listings with and without Google's Dataflux, which has no release for Python 3.13."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest

from ingest.emulator import EmbeddedServer
from ingest.errors import MissingDependencyError
from ingest.index import index_cases
from ingest.listing import list_objects
from ingest.stores import StoreConfig, dataflux, open_store
from ingest.transport import choose_transport

from .gcs_place import GCSPlace
from .needs import needs_dataflux


@pytest.fixture
def no_dataflux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dataflux_core", None)  # Python's own mark of a module that cannot be imported


@needs_dataflux
def test_the_prefix_of_composites_is_datafluxs_own() -> None:
    from dataflux_core.download import COMPOSED_PREFIX

    assert dataflux.missing() is None
    assert dataflux.COMPOSED_PREFIX == COMPOSED_PREFIX


def test_compose_without_dataflux_is_refused_with_the_reason(no_dataflux: None) -> None:
    with pytest.raises(MissingDependencyError, match=r"no release for Python 3\.13.*--data\.store\.transport auto"):
        open_store("gs://bucket/images", StoreConfig(transport="compose"))


def test_local_files_are_read_whatever_the_transport(no_dataflux: None, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    store = open_store(str(tmp_path), StoreConfig(transport="compose"))
    assert store.fetch(list_objects(store)) == [b"1"]


def test_without_dataflux_auto_reads_directly_and_says_why(
    no_dataflux: None, gcs_server: EmbeddedServer, bucket: str
) -> None:
    place = GCSPlace(open_store(f"gs://{bucket}"), gcs_server.url)
    for name in ("images/a_x.npy", "images/b_x.npy", "labels/a_y.npy", "labels/b_y.npy"):
        place.write(name, np.zeros(3).tobytes())
    manifest = index_cases(f"gs://{bucket}/images", f"gs://{bucket}/labels").manifest
    choice = choose_transport(manifest, StoreConfig())
    assert choice.transport == "direct"
    assert "gcs-torch-dataflux is not installed" in choice.reason


def test_without_dataflux_a_large_listing_is_complete(
    no_dataflux: None, gcs_server: EmbeddedServer, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = GCSPlace(open_store(f"gs://{bucket}"), gcs_server.url)
    for number in range(30):
        place.write(f"{number:02d}", b"x")
    store = open_store(f"gs://{bucket}", StoreConfig(fast_listing_above=10, list_page_size=7))
    with caplog.at_level(logging.INFO):
        listed = list_objects(store)
    assert any("probing finds the split points" in record.message for record in caplog.records)
    assert [meta.name for meta in listed] == [f"{number:02d}" for number in range(30)]
    assert all(meta.generation is not None and meta.crc32c is not None for meta in listed)
