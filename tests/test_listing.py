"""Listing: complete, classes told, three different errors for three different troubles."""

from __future__ import annotations

import bisect
import itertools
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.emulator import EmbeddedServer
from ingest.errors import EmptyListingError, PlaceNotFoundError, UnreachableError
from ingest.listing import list_objects
from ingest.pairing import pair_cases
from ingest.stores import ObjectMeta, StoreConfig, open_store
from ingest.stores.gcs_listing import list_ranges, probe_points
from ingest.testing import MemoryStore, make_cases

from .gcs_place import GCSPlace

LITTER = (
    ".ipynb_checkpoints/case_00000_x.npy",
    "a/.hidden/case_00000_x.npy",
    ".case_00000_x.npy",
    "._case_00000_x.npy",
    "a/.DS_Store",
    "__MACOSX/case_00000_x.npy",
    "a/Thumbs.db",
    "desktop.ini",
)


@pytest.mark.parametrize("kind", ["local", "gcs"])
def test_hidden_folders_and_the_litter_of_desktops_are_skipped_and_counted(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The URI itself lies below a hidden folder: only what is below the URI counts.
    if kind == "local":
        store = open_store(str(tmp_path / ".cache" / "data"))
    else:
        request.getfixturevalue("gcs_server")
        store = open_store(f"gs://{request.getfixturevalue('bucket')}/.cache/data")
    for name in (*LITTER, "case_00000_x.npy", "case_00000_y.npy"):
        store.put(name, b"x")
    with caplog.at_level(logging.WARNING):
        listed = list_objects(store)
    assert [meta.name for meta in listed] == ["case_00000_x.npy", "case_00000_y.npy"]
    (record,) = caplog.records
    assert "skipped 8 objects" in record.message
    for part in ("1 hidden files", "2 in hidden folders", "3 left by macOS", "2 left by Windows"):
        assert part in record.message
    assert [(case.case_id, case.image.name) for case in pair_cases(listed, listed, same_place=True).cases] == [
        ("case_00000", "case_00000_x.npy")
    ]


def test_a_place_that_holds_only_litter_is_empty_and_says_so(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").touch()
    with pytest.raises(EmptyListingError, match=r"holds none but 1 objects that are not data: 1 left by macOS"):
        list_objects(open_store(str(tmp_path)))


MANY = [f"deep/{number % 7}/{number:05d}_x.npy" for number in range(12_000)]


def test_12_000_local_files_are_listed_completely(tmp_path: Path) -> None:
    for folder in range(7):
        (tmp_path / "deep" / str(folder)).mkdir(parents=True)
    for name in MANY:
        (tmp_path / name).touch()
    assert [meta.name for meta in list_objects(open_store(str(tmp_path)))] == sorted(MANY)


def test_12_000_objects_in_memory_are_listed_completely() -> None:
    store = MemoryStore("memory://many").create()
    for name in MANY:
        store.put(name, b"")
    assert [meta.name for meta in list_objects(store)] == sorted(MANY)


def test_pages_of_any_size_give_the_same_listing(gcs_server: EmbeddedServer, bucket: str) -> None:
    store = open_store(f"gs://{bucket}/cases")
    make_cases(store, store, 20, (4, 4, 4), image_folder="images/", label_folder="labels/")
    whole = list_objects(store)
    assert len(whole) == 40
    for size in (1, 7, 39, 40, 41):
        assert list_objects(open_store(f"gs://{bucket}/cases", StoreConfig(list_page_size=size))) == whole


def test_other_storage_classes_are_listed_and_told(
    gcs_server: EmbeddedServer, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = GCSPlace(open_store(f"gs://{bucket}"), gcs_server.url)
    for name, storage_class in (("a", None), ("b", "NEARLINE"), ("c", "NEARLINE"), ("d", "ARCHIVE")):
        place.write(name, b"x", storage_class)
    with caplog.at_level(logging.WARNING):
        listed = list_objects(place.store)
    assert [meta.storage_class for meta in listed] == ["STANDARD", "NEARLINE", "NEARLINE", "ARCHIVE"]
    (record,) = caplog.records
    assert "3 of 4 objects" in record.message
    assert "1 ARCHIVE, 2 NEARLINE" in record.message


def test_an_empty_prefix_and_a_missing_bucket_are_different_errors(gcs_server: EmbeddedServer, bucket: str) -> None:
    with pytest.raises(EmptyListingError, match="holds none"):
        list_objects(open_store(f"gs://{bucket}/nothing-here"))
    with pytest.raises(PlaceNotFoundError, match="does not exist"):
        list_objects(open_store("gs://no-such-bucket"))


names_of_objects = st.sets(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6), min_size=1)


@given(names=names_of_objects, points=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=4)))
def test_ranges_give_every_object_once_whatever_the_split_points(names: set[str], points: list[str]) -> None:
    objects = [ObjectMeta(name, len(name), number, number) for number, name in enumerate(sorted(names, key=str.encode))]

    def between(start: str, end: str | None) -> list[ObjectMeta]:
        return [
            meta
            for meta in objects
            if meta.name.encode() >= start.encode() and (end is None or meta.name.encode() < end.encode())
        ]

    def first_name(start: str, end: str | None) -> str | None:
        return next((meta.name for meta in between(start, end)), None)

    first = objects[0].name
    for chosen in (points, probe_points(first, first_name, wanted=8)):
        assert list_ranges(between, first, chosen, 2, lambda count: None) == objects


def test_probing_splits_names_with_a_long_common_prefix_into_small_ranges() -> None:
    names = [f"images/case_{number:05d}_x.npy" for number in range(3000)]

    def first_name(start: str, end: str | None) -> str | None:
        found = bisect.bisect_left(names, start)
        return names[found] if found < len(names) and (end is None or names[found] < end) else None

    points = probe_points(names[0], first_name, wanted=16)
    cuts = [0, *sorted(bisect.bisect_left(names, point) for point in points), len(names)]
    assert len(points) >= 16
    assert max(after - before for before, after in itertools.pairwise(cuts)) <= 1000


def test_an_error_of_one_range_fails_the_whole_listing() -> None:
    def list_range(start: str, end: str | None) -> list[ObjectMeta]:
        if start == "b":
            raise UnreachableError("expected an answer, found none")
        return [ObjectMeta(start, 1)]

    with pytest.raises(UnreachableError):
        list_ranges(list_range, "a", ["b", "c"], 2, lambda count: None)
