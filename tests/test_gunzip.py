"""Volumes that are stored as gzip are read; bombs, damage and objects that cannot be read are refused."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ingest.commands import IndexConfig, InspectConfig, index, inspect
from ingest.decode import read_array
from ingest.emulator import EmbeddedServer
from ingest.errors import DecodeError, ObjectError, ObjectNotFoundError
from ingest.gunzip import gunzip
from ingest.pairing import PairingConfig
from ingest.stores import StoreConfig, Transport, open_store
from ingest.stores.base import ObjectMeta

from .gcs_place import GCSPlace

VOLUME = np.arange(4096, dtype=np.float32).reshape(1, 16, 16, 16)


def npy(array: np.ndarray) -> bytes:  # type: ignore[type-arg]
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("transport", ["direct", "compose"])
def test_objects_with_the_content_encoding_gzip_are_read_as_stored_and_decoded(
    gcs_server: EmbeddedServer, bucket: str, transport: Transport
) -> None:
    place = GCSPlace(open_store(f"gs://{bucket}", StoreConfig(transport=transport)), gcs_server.url)
    for number in range(3):
        about = json.dumps({"name": f"{number}.npy", "contentEncoding": "gzip"}).encode()
        body = b"--x\r\nContent-Type: application/json\r\n\r\n" + about
        body += b"\r\n--x\r\nContent-Type: application/octet-stream\r\n\r\n" + gzip.compress(npy(VOLUME)) + b"\r\n--x--"
        path = f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart"
        place._send("POST", path, body, "multipart/related; boundary=x")
    listed = list(place.store.list())
    assert [meta.content_encoding for meta in listed] == ["gzip"] * 3
    bodies = place.store.fetch(listed)
    assert [len(body) for body in bodies] == [meta.size_bytes for meta in listed]
    assert all(np.array_equal(read_array(body, "x", np.dtype(np.float32)), VOLUME) for body in bodies)


def test_gzip_of_several_members_is_one_and_bombs_and_damage_are_refused() -> None:
    assert gunzip(gzip.compress(b"ab") + gzip.compress(b"cd")) == b"abcd"
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        gunzip(gzip.compress(bytes(10**6)), 1000)
    with pytest.raises(DecodeError, match="ends too early"):
        read_array(gzip.compress(npy(VOLUME))[:-9], "x", np.dtype(np.float32))


@pytest.fixture
def unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two cases, the first label of which is gone when it is to be read."""
    for name in ("a", "b"):
        (tmp_path / f"{name}_x.npy").write_bytes(npy(VOLUME))
        (tmp_path / f"{name}_y.npy").write_bytes(npy(VOLUME.astype(np.uint8) % 3))
    from ingest.stores.local import LocalStore

    fetch_each = LocalStore.fetch_each

    def without(store: LocalStore, objects: list[ObjectMeta]) -> list[bytes | ObjectError]:
        bodies = fetch_each(store, objects)
        return [
            ObjectNotFoundError(f"{meta.name}: gone") if meta.name == "a_y.npy" else body
            for meta, body in zip(objects, bodies, strict=True)
        ]

    monkeypatch.setattr(LocalStore, "fetch_each", without)
    return tmp_path


def test_index_with_boxes_saves_no_manifest_where_an_object_cannot_be_read(unreadable: Path) -> None:
    output = unreadable / "out" / "m.parquet"
    config = IndexConfig(images=str(unreadable), labels=str(unreadable), output=str(output), boxes=True)
    with pytest.raises(ObjectNotFoundError, match="a_y"):
        index(config, Console())
    assert not output.exists()


def test_inspect_goes_on_after_an_object_that_cannot_be_read(
    unreadable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(unreadable)
    config = InspectConfig(images=place, labels=place, picture=str(unreadable / "picture.png"))
    assert inspect(config, Console(width=400)) == 1
    assert "of 2 cases read, 1 are good and 1 bad" in capsys.readouterr().out


def test_volumes_named_npy_gz_are_read_with_the_patterns_that_pairing_advises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_x.npy.gz").write_bytes(gzip.compress(npy(VOLUME)))
    (tmp_path / "a_y.npy.gz").write_bytes(gzip.compress(npy(VOLUME.astype(np.uint8) % 3)))
    patterns = PairingConfig(image_pattern=r"(.*)_x\.npy\.gz", label_pattern=r"(.*)_y\.npy\.gz")
    place = str(tmp_path)
    config = InspectConfig(images=place, labels=place, picture=str(tmp_path / "picture.png"), pairing=patterns)
    assert inspect(config, Console(width=400)) == 0
    assert "1 are good and 0 bad" in capsys.readouterr().out
