"""Objects stored with a Content-Encoding: gzip is read wherever an object is read, others are refused by name."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import numpy as np
import pytest

from ingest.augment import AugmentConfig, PatchSampler
from ingest.crop import CropConfig
from ingest.decode import DecodeConfig
from ingest.emulator import EmbeddedServer
from ingest.errors import ConfigError, EncodingError, ManifestError
from ingest.fetch import FetchConfig, ShardSpec, read_shard
from ingest.geometry import from_json, to_json
from ingest.holdout import read_case_list
from ingest.index import index_cases
from ingest.manifest import Manifest, cases_of
from ingest.quarantine import BadCaseConfig, QuarantineBook, QuarantineEntry, load_entries, to_parquet
from ingest.slab import Patch, Slabs, forget
from ingest.stores import ObjectMeta, StoreConfig, Transport, open_store
from ingest.stores.base import RangeRequest, is_unread
from ingest.testing import npy_bytes

from .gcs_place import GCSPlace
from .needs import COMPOSE

SHAPE = (24, 10, 9)


def volume(seed: int) -> tuple[bytes, bytes]:
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((1, *SHAPE)).astype(np.float32)
    return npy_bytes(image), npy_bytes(rng.integers(0, 3, (1, *SHAPE), dtype=np.uint8))


class Bucket:
    """Images and labels in one bucket."""

    def __init__(self, server: EmbeddedServer, bucket: str, transport: Transport = "direct") -> None:
        self.config = StoreConfig(transport=transport)
        self.uris = tuple(f"gs://{bucket}/{role}" for role in ("images", "labels"))
        self.images, self.labels = (GCSPlace(open_store(uri, self.config), server.url) for uri in self.uris)

    def write_case(self, key: str, seed: int, encoding: str | None = None, label_encoding: str | None = None) -> None:
        for place, name, body, stored in (
            (self.images, f"{key}_x.npy", volume(seed)[0], encoding),
            (self.labels, f"{key}_y.npy", volume(seed)[1], label_encoding),
        ):
            # A body called br or zstd here is gzip reversed: no code under test decompresses it.
            place.write(
                name, body if stored is None else gzip.compress(body)[:: 1 if stored == "gzip" else -1], None, stored
            )

    def manifest(self) -> Manifest:
        return index_cases(*self.uris, self.config).manifest


def shard(bucket: Bucket, manifest: Manifest, **settings: object) -> ShardSpec:
    return ShardSpec(
        images_uri=manifest.images_uri,
        labels_uri=manifest.labels_uri,
        store=bucket.config,
        fetch=FetchConfig(),
        epochs=np.zeros(len(manifest), dtype=np.int64),
        block=len(manifest),
        rows=manifest.table,
        indices=np.arange(len(manifest), dtype=np.int64),
        **settings,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("transport", ["direct", COMPOSE])
@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd"])
def test_an_object_with_another_encoding_is_refused_by_name_and_encoding(
    gcs_server: EmbeddedServer, bucket: str, transport: Transport, encoding: str
) -> None:
    there = Bucket(gcs_server, bucket, transport)
    there.write_case("a", 1)
    there.write_case("b", 2, encoding)
    store = there.images.store
    listed = list(store.list())
    unlisted = [meta._replace(content_encoding=None) for meta in listed]  # as of a manifest
    unchecked = [meta._replace(crc32c=None) for meta in unlisted]
    for objects in (listed, unlisted, unchecked):
        good, bad = store.fetch_each(objects)
        assert good == volume(1)[0]
        assert isinstance(bad, EncodingError)
        for part in (f"gs://{bucket}/images/b_x.npy", f"Content-Encoding {encoding}", "upload it anew"):
            assert part in str(bad)
        (part_of_it,) = store.fetch_ranges([RangeRequest(objects[1], 3, 9)])
        assert isinstance(part_of_it, EncodingError)


def test_an_encoding_that_is_no_compression_does_not_matter() -> None:
    assert not any(map(is_unread, (None, "", "gzip", "identity", "utf-8", "aws-chunked")))
    assert all(map(is_unread, ("br", "BR", "gzip, br", "zstd", "deflate")))


def test_a_listing_warns_of_encodings_that_are_not_read(
    gcs_server: EmbeddedServer, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    there = Bucket(gcs_server, bucket)
    for number, encoding in enumerate((None, "gzip", "br", "zstd", "br")):
        there.write_case(f"{number}", number, encoding)
    with caplog.at_level(logging.WARNING):
        there.manifest()
    (record,) = caplog.records
    assert "3 of 5 objects are stored with a Content-Encoding that is not read" in record.message
    assert "(2 br, 1 zstd; first: 2_x.npy)" in record.message


def test_a_case_with_another_encoding_goes_into_the_quarantine_with_that_reason(
    gcs_server: EmbeddedServer, bucket: str
) -> None:
    there = Bucket(gcs_server, bucket)
    there.write_case("a", 1)
    there.write_case("b", 2, None, "br")
    manifest = there.manifest()
    with pytest.raises(EncodingError, match=r"b_y\.npy to be stored .* as gzip.* --data\.on-bad quarantine"):
        list(read_shard(shard(there, manifest)))
    book = QuarantineBook(None, 1)
    bad = BadCaseConfig(on_bad="quarantine")
    (table,) = read_shard(shard(there, manifest, bad=bad, quarantine=book))
    assert table["left_out"].to_pylist() == [False, True]
    (entry,) = book.entries()
    assert (entry.reason, entry.uri) == ("encoding", f"gs://{bucket}/labels/b_y.npy")


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("encodings", [("gzip", None), (None, "gzip"), ("gzip", "gzip")])
def test_a_patch_of_a_volume_stored_as_gzip_is_that_of_the_plain_volume(
    gcs_server: EmbeddedServer, bucket: str, encodings: tuple[str | None, str | None], listed: bool
) -> None:
    there = Bucket(gcs_server, bucket)
    there.write_case("a", 1)
    there.write_case("b", 1, *encodings)
    cutter = Slabs(
        sampler=PatchSampler(
            crop=CropConfig(patch=(4, 4, 4), foreground_probability=0.5), augment=AugmentConfig(), seed=3
        ),
        decode=DecodeConfig(),
        least_bytes=1,
    )
    cases = cases_of(there.manifest().table)
    if listed:  # a manifest does not tell encodings; a listing does
        images, labels = list(there.images.store.list()), list(there.labels.store.list())
        cases = [case._replace(image=i, label=j) for case, i, j in zip(cases, images, labels, strict=True)]
    assert all(map(cutter.takes, cases))
    forget()
    for index in range(6):
        plain, stored = (
            cutter.cut(there.images.store, there.labels.store, case, None, epoch=0, index=index) for case in cases
        )
        assert isinstance(plain, Patch)
        assert isinstance(stored, Patch)
        assert [bytes(part) for part in stored] == [bytes(part) for part in plain]


def test_ranges_of_an_object_stored_as_gzip_are_of_its_stored_bytes(gcs_server: EmbeddedServer, bucket: str) -> None:
    there = Bucket(gcs_server, bucket)
    there.write_case("a", 1, "gzip")
    (meta,) = there.images.store.list()
    (whole,) = there.images.store.fetch([meta])
    spans = [(0, 10), (20, 25), (meta.size_bytes - 7, meta.size_bytes)]
    pieces = there.images.store.fetch_ranges([RangeRequest(meta, *span) for span in spans])
    assert [bytes(piece) for piece in pieces] == [whole[start:stop] for start, stop in spans]  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["bucket", "folder"])
def test_a_manifest_a_list_of_cases_and_a_quarantine_may_be_stored_as_gzip(
    gcs_server: EmbeddedServer, bucket: str, tmp_path: Path, place: str
) -> None:
    there = Bucket(gcs_server, bucket)
    there.write_case("a", 1)
    manifest = there.manifest()
    entry = QuarantineEntry(0, "a", "a_x.npy", "missing", "gone", 0)
    root = f"gs://{bucket}/run" if place == "bucket" else str(tmp_path)
    for name, body in (
        ("m.parquet", manifest.to_bytes()),
        ("cases.txt", b"a\nb # small\n"),
        ("quarantine.parquet", to_parquet([entry])),
    ):
        if place == "bucket":
            GCSPlace(open_store(root), gcs_server.url).write(name, gzip.compress(body), None, "gzip")
        else:
            (tmp_path / name).write_bytes(gzip.compress(body))
    assert Manifest.load(f"{root}/m.parquet").table.equals(manifest.table)
    assert read_case_list(f"{root}/cases.txt") == ["a", "b"]
    assert load_entries(root) == [entry]


def test_an_affine_may_be_stored_as_gzip() -> None:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    np.testing.assert_array_equal(from_json(gzip.compress(to_json(affine)), "it"), affine)


def test_a_manifest_or_a_list_that_is_damaged_gzip_or_of_another_encoding_is_named(
    gcs_server: EmbeddedServer, bucket: str, tmp_path: Path
) -> None:
    for name in ("m.parquet", "cases.txt"):
        (tmp_path / name).write_bytes(gzip.compress(b"some content that is cut")[:-9])
    with pytest.raises(ManifestError, match=r"m\.parquet: .*ends too early"):
        Manifest.load(f"{tmp_path}/m.parquet")
    with pytest.raises(ConfigError, match=r"cases\.txt: .*ends too early"):
        read_case_list(f"{tmp_path}/cases.txt")
    place = GCSPlace(open_store(f"gs://{bucket}"), gcs_server.url)
    for name in ("m.parquet", "cases.txt"):
        place.write(name, b"\x0b\x02\x80", None, "br")
    with pytest.raises(ManifestError, match=r"cannot be read: .*m\.parquet .*Content-Encoding br"):
        Manifest.load(f"gs://{bucket}/m.parquet")
    with pytest.raises(EncodingError, match=r"cases\.txt .*Content-Encoding br.*upload it anew$"):
        read_case_list(f"gs://{bucket}/cases.txt")


def test_an_object_whose_name_only_googles_client_can_ask_for_is_refused_as_any_other(
    gcs_server: EmbeddedServer, bucket: str
) -> None:
    place = GCSPlace(open_store(f"gs://{bucket}"), gcs_server.url)
    place.write("a//b_x.npy", b"\x0b\x02\x80", None, "br")
    (meta,) = place.store.list()
    assert meta == ObjectMeta("a//b_x.npy", 3, meta.generation, meta.crc32c, meta.storage_class, "br")
    for known in (meta, meta._replace(content_encoding=None)):
        (found,) = place.store.fetch_each([known])
        assert isinstance(found, EncodingError)
