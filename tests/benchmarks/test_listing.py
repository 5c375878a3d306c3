"""The synthetic bucket pages as GCS does, and what is said of the crossover follows from the rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from benchmarks.listing import ABOVE, ListingConfig, measure_once, verdicts_of
from benchmarks.listing_server import BUCKET, FOLDER, listing_server, object_crc32c, object_name, object_size
from ingest.errors import ConfigError

OBJECTS = 12_345


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with listing_server(OBJECTS) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[storage.Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        made = storage.Client(
            project="voxflux", credentials=AnonymousCredentials(), client_options={"api_endpoint": url}
        )
    yield made
    made.close()


def names_of(client: storage.Client, **asked: object) -> list[str]:
    return [blob.name for blob in client.list_blobs(BUCKET, **asked)]


def test_small_pages_give_every_object_once_in_byte_order(client: storage.Client) -> None:
    names = names_of(client, page_size=250)
    assert names == [object_name(number) for number in range(OBJECTS)]
    assert names == sorted(names, key=str.encode)


def test_a_page_holds_no_more_than_is_asked_for_and_than_gcs_gives(client: storage.Client) -> None:
    assert [len(list(page)) for page in client.list_blobs(BUCKET, page_size=4000).pages] == [4000, 4000, 4000, 345]
    assert [len(list(page)) for page in client.list_blobs(BUCKET, page_size=9000).pages] == [5000, 5000, 2345]
    assert len(names_of(client, max_results=777)) == 777


def test_offsets_begin_with_the_first_and_end_before_the_last(client: storage.Client) -> None:
    names = names_of(client, start_offset=object_name(100), end_offset=object_name(103))
    assert names == [object_name(number) for number in (100, 101, 102)]
    assert names_of(client, start_offset=object_name(12_344) + "0") == []
    assert names_of(client, end_offset=FOLDER) == []


def test_prefixes_choose_by_the_beginning_of_names(client: storage.Client) -> None:
    assert names_of(client, prefix=f"{FOLDER}case_000123") == [object_name(number) for number in range(12_300, 12_345)]
    assert len(names_of(client, prefix=f"{FOLDER}case_0000", page_size=100)) == 10_000
    assert names_of(client, prefix="elsewhere/") == []
    begun = names_of(client, prefix=f"{FOLDER}case_000123", start_offset=object_name(12_343))
    assert begun == [object_name(12_343), object_name(12_344)]


def test_objects_carry_what_verifies_them(client: storage.Client) -> None:
    blob = next(iter(client.list_blobs(BUCKET, start_offset=object_name(7), max_results=1)))
    assert (blob.name, blob.size, blob.storage_class) == (object_name(7), object_size(7), "STANDARD")
    assert blob.generation
    assert blob.crc32c is not None
    assert len(blob.crc32c) == 8
    assert object_crc32c(7) != object_crc32c(8)


def test_only_the_fields_that_are_asked_for_are_given(client: storage.Client) -> None:
    blob = next(iter(client.list_blobs(BUCKET, max_results=1, fields="items(name,size),nextPageToken")))
    assert blob.size == object_size(0)
    assert blob.generation is None
    assert blob.crc32c is None


def test_the_bucket_is_there_and_no_other(client: storage.Client) -> None:
    assert client.get_bucket(BUCKET).name == BUCKET
    assert client.lookup_bucket("another") is None


def test_our_own_listing_of_it_is_complete(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    found = measure_once(uri=f"gs://{BUCKET}/{FOLDER}", above=ABOVE["plain"], processes=2, objects=OBJECTS)
    assert found["complete"]
    assert found["found"] == OBJECTS
    assert not measure_once(uri=f"gs://{BUCKET}/{FOLDER}", above=ABOVE["plain"], processes=2, objects=OBJECTS + 1)[
        "complete"
    ]


def test_the_crossover_is_where_fast_first_wins() -> None:
    rows = [
        {"objects": objects, "latency_ms": 50.0, "method": method, "seconds": seconds}
        for objects, each in ((1000, (0.1, 3.0, 0.1)), (10**6, (30.0, 9.0, 12.0)))
        for method, seconds in zip(("plain", "fast", "auto"), each, strict=True)
    ]
    lines = verdicts_of(rows)
    assert "quicker from 1,000,000 objects on" in lines[0]
    assert all(line.endswith("right") for line in lines[1:])


def test_nothing_to_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="objects"):
        ListingConfig(objects=(0,))
