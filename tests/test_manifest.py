"""The paired table: what is saved is what is loaded, and a damaged one is never believed."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.errors import ManifestError
from ingest.manifest import FORMAT, SCHEMA, Manifest, cases_of, seal
from ingest.pairing import Case
from ingest.stores.base import ObjectMeta


def case(key: str, *, generation: int | None = 7, crc32c: int | None = 2**32 - 1) -> Case:
    return Case(
        key,
        ObjectMeta(f"{key}_x.npy", 131_200, generation, crc32c),
        ObjectMeta(f"{key}_y.npy", 32_896, generation, crc32c),
    )


def manifest(*keys: str) -> Manifest:
    return Manifest.from_cases([case(k) for k in keys], images_uri="gs://b/i/", labels_uri="gs://b/l/")


keys = st.lists(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20),
    min_size=1,
    max_size=30,
    unique=True,
)


@given(keys, st.booleans())
def test_a_manifest_is_loaded_as_it_was_saved(names, known):
    cases = [case(n, generation=5 if known else None, crc32c=9 if known else None) for n in names]
    saved = Manifest.from_cases(cases, images_uri="gs://b/i/", labels_uri="file:///l/")
    loaded = Manifest.from_bytes(saved.to_bytes())
    assert loaded.table.equals(saved.table)
    assert (loaded.images_uri, loaded.labels_uri) == ("gs://b/i/", "file:///l/")
    assert cases_of(loaded.table) == sorted(cases, key=lambda c: c.case_id)


def test_a_case_keeps_its_index_whatever_the_order_of_the_listing():
    assert manifest("b", "a", "c").table.equals(manifest("c", "b", "a").table)


def test_rows_are_taken_in_the_order_asked():
    rows = manifest("a", "b", "c").take(np.array([2, 0]))
    assert [c.case_id for c in cases_of(rows)] == ["c", "a"]


def test_copies_of_a_case_are_one_subject():
    names = ["case_00000", "case_00000_copy_00001", "case_00001", "case_00001_copy_00001", "case_00001_copy_00002", "x"]
    assert manifest(*names).subjects().numbers.tolist() == [0, 0, 1, 1, 1, 2]


def parquet(table: pa.Table, about: object = None) -> bytes:
    about = about or {"format": FORMAT, "version": 1, "images_uri": "gs://b/i/", "labels_uri": "gs://b/l/"}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({FORMAT: json.dumps(about)}), sink)
    return seal(sink.getvalue())


GOOD = manifest("a", "b").table


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a Parquet file that voxflux saved"),
        (b"PAR1 but not really", "expected a Parquet file that voxflux saved"),
        (manifest("a").to_bytes()[:-20], "expected a Parquet file that voxflux saved"),
        (
            parquet(GOOD, {"version": 99, "images_uri": "a", "labels_uri": "b"}),
            "expected manifest version 1, found 99",
        ),
        (parquet(GOOD, {"version": 1, "images_uri": 1, "labels_uri": "b"}), "expected two URIs"),
        (parquet(GOOD.drop_columns(["label"])), "expected the columns"),
        (parquet(GOOD.slice(0, 0)), "expected at least one case"),
        (parquet(pa.concat_tables([GOOD, GOOD])), "expected case ids in order, each once"),
        (parquet(GOOD.take([1, 0])), "expected case ids in order, each once"),
        (
            parquet(GOOD.set_column(5, SCHEMA.field("label"), [["a_y.npy"] * 2])),
            "expected each object in one case only",
        ),
        (parquet(GOOD.set_column(2, SCHEMA.field("image_bytes"), [[1, -1]])), "expected sizes of 0 or more"),
        (
            parquet(GOOD.set_column(1, pa.field("image", pa.string()), [["a_x.npy", None]])),
            "expected (no value missing|the columns)",
        ),
    ],
)
def test_what_is_no_manifest_is_refused_with_a_reason(data, message):
    with pytest.raises(ManifestError, match=message):
        Manifest.from_bytes(data, name="gs://b/m.parquet")


def test_a_manifest_is_a_parquet_file_that_others_read():
    assert pq.read_table(pa.BufferReader(manifest("a", "b").to_bytes())).num_rows == 2


def test_a_parquet_file_without_our_seal_is_no_manifest():
    sink = io.BytesIO()
    pq.write_table(GOOD, sink)
    with pytest.raises(ManifestError, match="expected a Parquet file that voxflux saved"):
        Manifest.from_bytes(sink.getvalue())


def test_one_flipped_bit_in_a_manifest_is_seen():
    body = bytearray(manifest("a", "b", "c").to_bytes())
    for at in range(0, len(body) - 8, 7):
        body[at] ^= 1
        with pytest.raises(ManifestError, match=r"expected (the checksum|a Parquet file)"):
            Manifest.from_bytes(bytes(body))
        body[at] ^= 1


def test_a_manifest_lies_where_it_was_saved(tmp_path):
    uri = str(tmp_path / "deep" / "train.parquet")
    manifest("a", "b").save(uri)
    assert Manifest.load(uri).table.equals(GOOD)


def test_a_manifest_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ManifestError, match=r"none\.parquet: expected a saved manifest, found no such object"):
        Manifest.load(str(tmp_path / "none.parquet"))


def test_the_uri_of_a_folder_is_no_manifest():
    with pytest.raises(ManifestError, match="expected the URI of a manifest"):
        Manifest.load("gs://bucket/folder/")


def test_a_later_listing_gives_its_generations_to_the_same_cases_and_no_others():
    before = manifest("a", "b")
    cases = [case(k, generation=8) for k in ("a", "b")]
    later = Manifest.from_cases(cases, images_uri="gs://b/i/", labels_uri="gs://b/l/")
    assert before.with_generations(later).table.equals(later.table)
    for other in ([cases[0]], [*cases, case("c")], [cases[0], case("b", crc32c=1)], [cases[0], case("c")]):
        with pytest.raises(ManifestError, match="found other ones"):
            before.with_generations(Manifest.from_cases(other, images_uri="gs://b/i/", labels_uri="gs://b/l/"))
