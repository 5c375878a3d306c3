"""Shapes and foreground boxes in a manifest: kept, taken along, and never believed when damaged."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest import layout
from ingest.errors import ManifestError
from ingest.layout import Known, Layout, known_of
from ingest.manifest import SEAL, Manifest, cases_of, seal
from ingest.pairing import Case
from ingest.stores import ObjectMeta

from .test_fuzz import damaged

boxes_of_axis = st.tuples(st.integers(0, 5), st.integers(1, 4)).map(lambda box: (box[0], sum(box)))
some_boxes = st.lists(
    st.lists(st.tuples(boxes_of_axis, boxes_of_axis, boxes_of_axis), min_size=1, max_size=2).map(tuple), max_size=4
).map(tuple)


def manifest_with(*known: Known | None) -> Manifest:
    cases = [
        Case(f"{n:03d}", ObjectMeta(f"{n:03d}_x.npy", 128 + 4 * 990, 1), ObjectMeta(f"{n:03d}_y.npy", 128 + 990, 1))
        for n in range(len(known))
    ]
    return Manifest.from_cases(cases, images_uri="gs://b/i/", labels_uri="gs://b/l/").with_known(known)


SHAPE = (9, 10, 11)
BOX = ((0, 9), (1, 2), (0, 11))


@given(st.lists(st.none() | some_boxes.map(lambda boxes: Known(Layout(128, 128, SHAPE), boxes)), min_size=1))
def test_a_manifest_keeps_shapes_and_boxes_and_takes_them_along(known):
    saved = manifest_with(*known)
    loaded = Manifest.from_bytes(saved.to_bytes())
    assert loaded.table.equals(saved.table)
    assert known_of(loaded.table) == known
    assert known_of(loaded.take(np.arange(len(known))[::-1])) == known[::-1]
    assert cases_of(loaded.table) == cases_of(saved.table)


def test_a_manifest_without_boxes_says_nothing_of_them():
    table = manifest_with(None, None).table.drop_columns(layout.NAMES)
    assert known_of(table) == [None, None]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("depth", [9, None], "both or neither"),
        ("depth", [9, 8], "fill their objects"),
        ("depth", [9, -9], "fill their objects"),
        ("image_offset_bytes", [128, 127], "fill their objects"),
        ("label_offset_bytes", [128, 0], "fill their objects"),
        ("boxes", [[], [0, 0, 9, 1, 2, 0, 12]], "inside the volume"),
        ("boxes", [[], [0, -1, 9, 1, 2, 0, 11]], "inside the volume"),
        ("boxes", [[], [0, 4, 4, 1, 2, 0, 11]], "inside the volume"),
        ("boxes", [[], [0, 0, 9, 1, 2, 0]], "inside the volume"),
        ("boxes", [[], [0, 0, 9, 1, 2, 0, None]], "inside the volume"),
        ("boxes", [[], [1, 0, 9, 1, 2, 0, 11]], "inside the volume"),
        ("boxes", [[], [0, 0, 9, 1, 2, 0, 11] * 3], "inside the volume"),
        ("boxes", [[], [0, 0, 9, 1, 2, 0, 11, 2, 0, 9, 1, 2, 0, 11]], "inside the volume"),
    ],
)
def test_a_damaged_row_of_shapes_or_boxes_is_refused(name, values, message):
    good = manifest_with(Known(Layout(128, 128, SHAPE), ()), Known(Layout(128, 128, SHAPE), ((BOX, BOX), (BOX,))))
    assert Manifest.from_bytes(good.to_bytes()).table.equals(good.table)
    at = good.table.schema.get_field_index(name)
    field = good.table.schema.field(name)
    damaged = Manifest(good.table.set_column(at, field, pa.array(values, field.type)), "gs://b/i/", "gs://b/l/")
    with pytest.raises(ManifestError, match=message):
        Manifest.from_bytes(damaged.to_bytes())


def test_a_manifest_with_some_of_the_columns_is_refused():
    good = manifest_with(Known(Layout(128, 128, SHAPE), ()))
    damaged = Manifest(good.table.drop_columns(["width"]), "gs://b/i/", "gs://b/l/")
    with pytest.raises(ManifestError, match="expected the columns"):
        Manifest.from_bytes(damaged.to_bytes())


def test_rows_with_boxes_are_small():
    box = ((10, 200), (20, 300), (30, 250))
    known = Known(Layout(128, 128, SHAPE), ((box, box), (box, box)))
    with_boxes, without = manifest_with(*[known] * 384), manifest_with(*[None] * 384)
    few = np.arange(384)
    assert len(pickle.dumps(with_boxes.take(few))) - len(pickle.dumps(without.take(few))) < 384 * 160


def test_a_damaged_manifest_with_boxes_is_refused_with_a_reason_or_holds_what_it_promises():
    box = ((0, 9), (1, 2), (0, 11))
    whole = manifest_with(*[Known(Layout(128, 128, SHAPE), ((box, box), (box,))), None] * 20).to_bytes()
    at = whole.index(SEAL)
    unsealed = whole[:at] + whole[at + len(SEAL) + 4 :]
    for place in range(0, len(unsealed), 5):
        for value in (b"\xff\xff\xff\x7f", b"\x00"):
            data = seal(damaged(unsealed, [("set", place / len(unsealed), value)]))
            try:
                rows = Manifest.from_bytes(data).table
            except ManifestError:
                continue
            for known in known_of(rows):
                for of_class in () if known is None else known.boxes:
                    assert all(0 <= a < b <= n for each in of_class for (a, b), n in zip(each, SHAPE, strict=True))
