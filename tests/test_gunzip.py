"""Volumes that are stored as gzip are read; bombs, damage and objects that cannot be read are refused."""

from __future__ import annotations

import gzip
import io
import logging
import shlex
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ingest.__main__ import main
from ingest.commands import IndexConfig, InspectConfig, index, inspect
from ingest.decode import read_array
from ingest.emulator import EmbeddedServer
from ingest.errors import BadCasesError, DecodeError, ObjectError, ObjectNotFoundError, PairingError
from ingest.gunzip import gunzip, gunzip_head
from ingest.images import list_images
from ingest.manifest import Manifest
from ingest.pairing import pair_cases
from ingest.stores import StoreConfig, Transport, open_store
from ingest.stores.base import ObjectMeta

from .gcs_place import GCSPlace
from .needs import COMPOSE

VOLUME = np.arange(4096, dtype=np.float32).reshape(1, 16, 16, 16)


def npy(array: np.ndarray) -> bytes:  # type: ignore[type-arg]
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("transport", ["direct", COMPOSE])
def test_objects_with_the_content_encoding_gzip_are_read_as_stored_and_decoded(
    gcs_server: EmbeddedServer, bucket: str, transport: Transport
) -> None:
    place = GCSPlace(open_store(f"gs://{bucket}", StoreConfig(transport=transport)), gcs_server.url)
    for number in range(3):
        place.write(f"{number}.npy", gzip.compress(npy(VOLUME)), content_encoding="gzip")
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


def header_of(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 16, 16, 16), "more than 16,512 bytes, with a header that calls for 16,512"),
        ((1, 2048, 2048, 2048), "expected at most 4,294,967,296 bytes .* calls for 34,359,738,496"),
        ((1, 10**9, 10**9), "expected 4 axes"),
    ],
)
def test_a_bomb_is_stopped_at_the_length_that_its_own_header_calls_for(shape: tuple[int, ...], message: str) -> None:
    bomb = gzip.compress(header_of(shape) + bytes(2**26))
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match=message):
            read_array(bomb, "x", np.dtype(np.float32))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**21


@pytest.mark.parametrize("most_bytes", [0, 1, 5, 130_000, 200_000, 10**6])
def test_the_head_of_a_gzip_file_is_that_of_its_content_whatever_its_members(most_bytes: int) -> None:
    content = np.random.default_rng(1).bytes(200_000)
    cuts = [content[:3], content[3:70_000], b"", content[70_000:]]
    for file in (gzip.compress(content), b"".join(map(gzip.compress, cuts)), gzip.compress(content, 0)):
        assert gunzip_head(file, most_bytes) == content[:most_bytes]
        assert gunzip_head(memoryview(file), most_bytes) == content[:most_bytes]
    with pytest.raises(ValueError, match="damaged"):
        gunzip_head(b"\x1f\x8bno gzip at all", 9)


def test_volumes_of_several_members_are_read_as_one() -> None:
    whole = npy(VOLUME)
    members = b"".join(gzip.compress(part) for part in (whole[:70], whole[70:300], whole[300:]))
    assert np.array_equal(read_array(members, "x", np.dtype(np.float32)), VOLUME)
    assert np.array_equal(read_array(memoryview(members), "x", np.dtype(np.float32)), VOLUME)


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
    with pytest.raises(BadCasesError, match="a_y"):
        index(config, Console())
    assert not output.exists()


def test_inspect_goes_on_after_an_object_that_cannot_be_read(
    unreadable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(unreadable)
    config = InspectConfig(images=place, labels=place, picture=str(unreadable / "picture.png"))
    assert inspect(config, Console(width=400)) == 1
    assert "of 2 cases read, 1 are good and 1 bad" in capsys.readouterr().out


IMAGE, LABEL = npy(VOLUME), npy(VOLUME.astype(np.uint8) % 3)


def options_in(message: str) -> list[str]:
    """The options with patterns that a message advises, as a shell would hand them on."""
    words = shlex.split(message[message.index("--") :].partition(", ")[0].partition("; ")[0])
    assert [word for word in words if word.startswith("--")] == words[::2]
    return words


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (("a_x.npy.gz", "b_x.npy.gz"), ("a_y.npy.gz", "b_y.npy.gz")),
        (("a_x.npy", "b_x.npy.gz"), ("a_y.npy.gz", "b_y.npy")),
        (("a.npy.gz", "b.npy.gz"), ("a.npy", "b.npy.gz")),
        (("s/a_x.NPY", "b_x.Npy.GZ"), ("s/a_y.npy", "b_y.npy.gz")),
    ],
)
@pytest.mark.parametrize("on_orphan", ["fail", "quarantine"])
def test_the_patterns_that_pairing_advises_for_names_such_as_npy_gz_pair_and_read_them(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    images: tuple[str, ...],
    labels: tuple[str, ...],
    on_orphan: str,
) -> None:
    for role, names, body in (("images", images, IMAGE), ("labels", labels, LABEL)):
        for name in names:
            file = tmp_path / role / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(gzip.compress(body) if name.lower().endswith(".gz") else body)
    roots = ["--images", f"{tmp_path}/images", "--labels", f"{tmp_path}/labels"]
    output = ["--output", f"{tmp_path}/m.parquet", "--boxes"]
    assert main(["index", *roots, *output, "--pairing.on-orphan", on_orphan]) == 1
    advised = options_in(capsys.readouterr().err)
    assert main(["index", *roots, *output, *advised]) == 0
    keys = Manifest.load(f"{tmp_path}/m.parquet").table["case_id"].to_pylist()
    assert {Path(key).name for key in keys} == {"a", "b"}
    assert main(["inspect", *roots, "--picture", f"{tmp_path}/p.png", *advised]) == 0
    assert "of 2 cases read, 2 are good and 0 bad" in capsys.readouterr().out


def test_images_and_labels_of_one_place_named_npy_gz_pair_by_the_patterns_that_are_advised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_x.npy.gz").write_bytes(gzip.compress(IMAGE))
    (tmp_path / "a_y.npy.gz").write_bytes(gzip.compress(LABEL))
    index_it = ["index", "--images", f"{tmp_path}", "--labels", f"{tmp_path}", "--output", f"{tmp_path}/m.parquet"]
    assert main(index_it) == 1
    assert main([*index_it, *options_in(capsys.readouterr().err)]) == 0
    assert "1 cases, 0 objects in none" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("a_x.npy.zst", "a_y.npy.bz2"), ("a.nii.gz", "b.nii.gz")])
def test_of_names_that_no_pattern_helps_it_is_said_which_formats_are_read(names: tuple[str, str]) -> None:
    images, labels = ([ObjectMeta(name, 1)] for name in names)
    with pytest.raises(PairingError, match=r"as \.npy or \.npy\.gz"):
        pair_cases(images, labels)


def test_images_to_predict_that_are_named_npy_gz_are_found_by_the_pattern_that_is_advised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a_x.npy.gz", "b_x.npy.gz", "a_y.npy"):
        (tmp_path / name).write_bytes(gzip.compress(IMAGE))
    (tmp_path / "a_y.npy").unlink()
    with pytest.raises(PairingError) as caught:
        list_images(str(tmp_path))
    _, pattern = options_in(str(caught.value).replace("--pattern, e.g.", "--pattern"))
    assert [image.case_id for image in list_images(str(tmp_path), pattern=pattern)] == ["a", "b"]
    (tmp_path / "c_x.npy").write_bytes(IMAGE)
    (tmp_path / "c_y.npy").write_bytes(LABEL)
    with caplog.at_level(logging.WARNING):
        assert [image.case_id for image in list_images(str(tmp_path))] == ["c"]
    (record,) = caplog.records
    assert "2 of 4 objects are .npy by their name and are left out" in record.message
    _, pattern = options_in(record.message.replace("--pattern, e.g.", "--pattern"))
    assert [image.case_id for image in list_images(str(tmp_path), pattern=pattern)] == ["a", "b", "c"]


def test_the_hint_about_a_type_looks_at_the_values_of_a_compressed_array_too() -> None:
    label = npy((VOLUME % 3).astype(np.int64))
    messages = []
    for stored in (label, gzip.compress(label)):
        with pytest.raises(DecodeError, match="found int64 with values from 0 to 2") as caught:
            read_array(stored, "x", np.dtype(np.uint8))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    with pytest.raises(DecodeError, match="found int64; "):
        read_array(gzip.compress(label)[:-9], "x", np.dtype(np.uint8))
