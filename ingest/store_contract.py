# ruff: noqa: D102  a test's name is its sentence
"""The one test-suite that every store passes.

A subclass in a test module gives the fixtures; pytest collects the rest. It lives here, so that a store written
elsewhere can be held to it.
"""

from __future__ import annotations

import concurrent.futures
import pickle
from collections.abc import Sequence
from typing import Protocol

import pytest

from .errors import (
    ConfigError,
    EmptyListingError,
    ObjectError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PlaceNotFoundError,
    PreconditionError,
    StaleManifestError,
)
from .listing import list_objects
from .stores.base import ObjectMeta, RangeRequest, Store

NAMES = (
    "a b",
    "a#b",
    "a%20b",
    "a+b",
    "a?b",
    "case_00000_x.npy",
    "deep/er/still/x",
    "e\u0301",  # e and a combining accent: must not be turned into the one character that looks the same
    "\u00e9",
    "日本/語",
)


class Place(Protocol):
    """A place under test, and a way to it that is not the store's."""

    store: Store

    def write(self, name: str, data: bytes) -> None:
        """Write one object, bypassing the store."""

    def read(self, name: str) -> bytes:
        """Read one object, bypassing the store."""

    def delete(self, name: str) -> None:
        """Delete one object, bypassing the store."""


class StoreContract:
    """What every store must do. Subclasses give the fixtures `place`, `missing_store` and `denied_store`."""

    @pytest.fixture
    def place(self) -> Place:
        """A fresh, empty place."""
        raise NotImplementedError

    @pytest.fixture
    def missing_store(self) -> Store:
        """A store whose bucket or folder does not exist."""
        raise NotImplementedError

    @pytest.fixture
    def denied_store(self) -> tuple[Store, ObjectMeta]:
        """A store that may not be read, and an object that is there."""
        raise NotImplementedError

    def test_listing_is_in_byte_order_of_names_and_tells_sizes(self, place: Place) -> None:
        for size, name in enumerate(reversed(NAMES)):
            place.write(name, b"x" * size)
        listed = list(place.store.list())
        assert [meta.name for meta in listed] == sorted(NAMES, key=lambda name: name.encode())
        assert {meta.name: meta.size_bytes for meta in listed} == {
            name: size for size, name in enumerate(reversed(NAMES))
        }

    def test_listing_order_counts_a_folders_slash(self, place: Place) -> None:
        names = ["p-q", "p.npy", "p/q", "p0"]
        for name in reversed(names):
            place.write(name, b"")
        assert [meta.name for meta in place.store.list()] == names

    def test_listing_keeps_to_its_prefix(self, place: Place) -> None:
        for name in ("images/1", "images/2", "images2/1", "labels/1"):
            place.write(name, b"x")
        assert [meta.name for meta in place.store.list("images/")] == ["images/1", "images/2"]
        assert [meta.name for meta in place.store.list("images")] == ["images/1", "images/2", "images2/1"]
        assert list(place.store.list("none")) == []

    def test_fetch_gives_every_name_its_own_bytes_in_the_order_asked(self, place: Place) -> None:
        for name in NAMES:
            place.write(name, name.encode() * 7)
        asked = list(place.store.list())[::-1]
        assert place.store.fetch(asked) == [meta.name.encode() * 7 for meta in asked]
        assert place.store.fetch([*asked, asked[0]])[-1] == asked[0].name.encode() * 7

    def test_fetch_returns_bytes_of_the_listed_length(self, place: Place) -> None:
        for number in range(70):
            place.write(f"{number:03d}", bytes([number]) * (number * 37 % 1000))
        listed = list(place.store.list())
        bodies = place.store.fetch(listed)
        assert all(type(body) is bytes for body in bodies)
        assert [len(body) for body in bodies] == [meta.size_bytes for meta in listed]
        assert bodies == [bytes([number]) * (number * 37 % 1000) for number in range(70)]

    def test_fetch_of_nothing_is_nothing(self, place: Place) -> None:
        assert place.store.fetch([]) == []

    def test_an_object_of_zero_bytes_is_listed_and_fetched(self, place: Place) -> None:
        place.write("empty", b"")
        place.write("full", b"x")
        assert place.store.fetch(list(place.store.list())) == [b"", b"x"]

    def test_put_writes_what_a_stranger_reads(self, place: Place) -> None:
        for name in NAMES:
            place.store.put(name, name.encode())
        assert [place.read(name) for name in NAMES] == [name.encode() for name in NAMES]
        place.store.put(NAMES[0], b"anew")
        assert place.read(NAMES[0]) == b"anew"
        assert len(list(place.store.list())) == len(NAMES)

    def test_put_of_a_large_object_comes_back_whole(self, place: Place) -> None:
        data = bytes(range(256)) * 40_000  # above 8 MiB, where GCS uploads in parts
        place.store.put("large", data)
        assert place.store.fetch(list(place.store.list())) == [data]

    def test_put_refuses_an_empty_name(self, place: Place) -> None:
        with pytest.raises(ConfigError, match="name"):
            place.store.put("", b"x")

    def test_a_put_without_overwriting_is_refused_where_the_object_is(self, place: Place) -> None:
        name = NAMES[1]
        generation = place.store.put(name, b"first", if_generation=0)
        with pytest.raises(PreconditionError, match=r"expected no object .* found"):
            place.store.put(name, b"second", if_generation=0)
        assert place.read(name) == b"first"
        assert [(meta.name, meta.generation) for meta in place.store.list()] == [(name, generation)]

    def test_a_put_replaces_the_generation_that_it_names_and_no_other(self, place: Place) -> None:
        first = place.store.put("a", b"1")
        second = place.store.put("a", b"2", if_generation=first)
        assert second != first
        with pytest.raises(PreconditionError, match=str(first)):
            place.store.put("a", b"3", if_generation=first)
        with pytest.raises(PreconditionError):
            place.store.put("none", b"3", if_generation=first)
        assert place.read("a") == b"2"
        assert [(meta.name, meta.generation) for meta in place.store.list()] == [("a", second)]

    def test_of_many_writers_that_create_one_object_one_succeeds(self, place: Place) -> None:
        def create(number: int) -> bool:
            try:
                place.store.put("a", b"%d" % number, if_generation=0)
            except PreconditionError:
                return False
            return True

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            created = list(pool.map(create, range(16)))
        assert created.count(True) == 1
        assert place.read("a") == b"%d" % created.index(True)
        assert [meta.name for meta in place.store.list()] == ["a"]

    def test_delete_takes_out_one_object(self, place: Place) -> None:
        for name in NAMES:
            place.store.put(name, b"x")
        place.store.delete(NAMES[1])
        assert names_of(list(place.store.list())) == sorted({*NAMES} - {NAMES[1]}, key=lambda name: name.encode())
        with pytest.raises(ObjectNotFoundError, match=r"expected .* found none"):
            place.store.delete(NAMES[1])
        with pytest.raises(ConfigError, match="name"):
            place.store.delete("")

    def test_delete_spares_another_generation(self, place: Place) -> None:
        first = place.store.put("a", b"1")
        second = place.store.put("a", b"2", if_generation=first)
        with pytest.raises(PreconditionError, match=str(first)):
            place.store.delete("a", if_generation=first)
        assert place.read("a") == b"2"
        place.store.delete("a", if_generation=second)
        assert list(place.store.list()) == []

    def test_a_missing_object_is_told_apart_from_its_neighbours(self, place: Place) -> None:
        for name in ("a", "b", "c"):
            place.write(name, name.encode())
        listed = list(place.store.list())
        place.delete("b")
        bodies = place.store.fetch_each(listed)
        assert (bodies[0], bodies[2]) == (b"a", b"c")
        assert isinstance(bodies[1], ObjectNotFoundError)
        assert "b" in str(bodies[1])
        with pytest.raises(ObjectNotFoundError):
            place.store.fetch(listed)

    @pytest.mark.parametrize("data", [b"longer than before", b"B"], ids=["another-size", "the-same-size"])
    def test_an_overwritten_object_is_stale(self, place: Place, data: bytes) -> None:
        for name in ("a", "b", "c"):
            place.write(name, name.encode())
        listed = list(place.store.list())
        place.write("b", data)
        bodies = place.store.fetch_each(listed)
        assert (bodies[0], bodies[2]) == (b"a", b"c")
        assert isinstance(bodies[1], StaleManifestError)
        assert str(listed[1].generation) in str(bodies[1])
        assert place.store.fetch(list(place.store.list())) == [b"a", data, b"c"]

    def test_objects_that_swapped_their_sizes_are_stale(self, place: Place) -> None:
        for name, data in (("a", b"1"), ("b", b"22"), ("c", b"333"), ("d", b"4444")):
            place.write(name, data)
        listed = list(place.store.list())
        place.write("b", b"BBB")
        place.write("c", b"CC")
        bodies = place.store.fetch_each(listed)
        assert (bodies[0], bodies[3]) == (b"1", b"4444")
        assert [type(body) for body in bodies[1:3]] == [StaleManifestError, StaleManifestError]

    def test_ranges_are_the_same_bytes_of_the_whole_in_the_order_asked(self, place: Place) -> None:
        bodies = {name: (bytes(range(256)) * 17)[number:] for number, name in enumerate(NAMES)}
        for name, body in bodies.items():
            place.write(name, body)
        spans = [(5, 6), (0, 10), (10, 20), (20, 300), (4000, 4300), (4001, 4002), (0, 4300), (7, 9)]
        asked = [RangeRequest(meta, *span) for meta in place.store.list() for span in spans]
        wanted = [bodies[request.meta.name][request.start : request.stop] for request in asked]
        assert [bytes(piece) for piece in pieces_of(place.store, asked)] == wanted
        assert [bytes(piece) for piece in pieces_of(place.store, asked[::-1])] == wanted[::-1]
        assert place.store.fetch_ranges([]) == []

    def test_ranges_far_apart_in_a_large_object_are_the_bytes_of_the_whole(self, place: Place) -> None:
        body = bytes(range(256)) * 40_000
        place.write("large", body)
        (meta,) = place.store.list()
        asked = [RangeRequest(meta, at, at + 1000) for at in (10_239_000, 0, 70_000, 3_000_000)]
        assert [bytes(piece) for piece in pieces_of(place.store, asked)] == [body[r.start : r.stop] for r in asked]

    def test_ranges_of_missing_and_overwritten_objects_are_told_apart_from_their_neighbours(self, place: Place) -> None:
        for name in ("a", "b", "c", "d"):
            place.write(name, name.encode() * 100)
        listed = list(place.store.list())
        place.delete("b")
        place.write("c", b"C" * 100)
        place.write("d", b"D")
        asked = [RangeRequest(meta, *span) for meta in listed for span in ((0, 50), (99, 100))]
        pieces = place.store.fetch_ranges(asked)
        assert [bytes(piece) for piece in pieces[:2] if not isinstance(piece, ObjectError)] == [b"a" * 50, b"a"]
        assert [type(piece) for piece in pieces[2:4]] == [ObjectNotFoundError] * 2
        assert [type(piece) for piece in pieces[4:]] == [StaleManifestError] * 4

    def test_a_range_that_leaves_its_object_is_refused(self, place: Place) -> None:
        place.write("a", b"123")
        (meta,) = place.store.list()
        for start, stop in ((-1, 2), (1, 1), (2, 1), (1, 4)):
            with pytest.raises(ConfigError, match="expected a range"):
                place.store.fetch_ranges([RangeRequest(meta, start, stop)])

    def test_a_missing_place_is_said_to_be_missing(self, missing_store: Store) -> None:
        with pytest.raises(PlaceNotFoundError, match=r"expected .* found"):
            list(missing_store.list())
        with pytest.raises(PlaceNotFoundError):
            missing_store.fetch([ObjectMeta("a", 1)])
        with pytest.raises(PlaceNotFoundError):
            missing_store.fetch_ranges([RangeRequest(ObjectMeta("a", 1), 0, 1)])

    def test_an_empty_place_is_told_apart_from_a_missing_one(self, place: Place) -> None:
        place.write("gone", b"")
        place.delete("gone")
        assert list(place.store.list()) == []
        with pytest.raises(EmptyListingError, match="holds none"):
            list_objects(place.store)

    def test_a_forbidden_place_is_said_to_be_forbidden(self, denied_store: tuple[Store, ObjectMeta]) -> None:
        store, meta = denied_store
        with pytest.raises(PermissionDeniedError, match=r"expected .* found"):
            list(store.list())
        with pytest.raises(PermissionDeniedError):
            store.fetch([meta])
        with pytest.raises(PermissionDeniedError):
            store.fetch_ranges([RangeRequest(meta, 0, 1)])

    def test_a_pickled_store_does_the_same(self, place: Place) -> None:
        place.write("a", b"x")
        listed = list(place.store.list())  # clients exist by now
        again: Store = pickle.loads(pickle.dumps(place.store))  # noqa: S301  our own, just made
        assert (again.uri, again.uri_of("a")) == (place.store.uri, place.store.uri_of("a"))
        assert list(again.list()) == listed
        assert again.fetch(listed) == [b"x"]
        assert len(pickle.dumps(place.store)) < 2000

    def test_a_uri_ends_in_a_slash_and_names_objects(self, place: Place) -> None:
        assert place.store.uri.endswith("/")
        assert place.store.uri_of("a/b").endswith("/a/b")


class FlatNamesContract:
    """What stores with flat names do besides; a file system cannot hold these names."""

    def test_an_object_may_stand_beside_a_folder_of_its_name(self, place: Place) -> None:
        place.write("p", b"1")
        place.write("p/q", b"2")
        assert place.store.fetch(list(place.store.list())) == [b"1", b"2"]

    def test_names_with_empty_and_dot_parts_are_kept_as_they_are(self, place: Place) -> None:
        names = ["a/../b", "a/./b", "a//b"]
        for name in names:
            place.write(name, name.encode())
        listed = list(place.store.list())
        assert [meta.name for meta in listed] == names
        assert place.store.fetch(listed) == [name.encode() for name in names]


def pieces_of(store: Store, asked: Sequence[RangeRequest]) -> list[bytes | memoryview]:
    """What ranges hold; the first error is raised."""
    pieces: list[bytes | memoryview] = []
    for piece in store.fetch_ranges(asked):
        if isinstance(piece, ObjectError):
            raise piece
        pieces.append(piece)
    return pieces


def names_of(objects: Sequence[ObjectMeta]) -> list[str]:
    """The objects' names."""
    return [meta.name for meta in objects]
