"""`index --boxes` looks at every case: what it cannot read it names all at once, and saves by the data's policy."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from ingest import slab
from ingest.__main__ import main
from ingest.errors import DecodeError, ObjectError
from ingest.index import index_cases, look_up_cases, look_up_each
from ingest.manifest import Manifest
from ingest.testing import npy_bytes

from .ruined import AFTER_LISTING, BEFORE_LISTING, files_of, make_set, ruin


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_set(tmp_path, 12)
    slab.forget()
    return tmp_path


def index_boxes(root: Path, *options: str) -> int:
    roots = ["--images", f"{root}/images", "--labels", f"{root}/labels"]
    return main(["index", *roots, "--output", f"{root}/m.parquet", "--boxes", *options])


SPOILT = {1: "truncated", 3: "not-npy", 4: "wrong-dtype", 7: "shape-mismatch", 8: "pickled"}


def spoil(root: Path) -> list[str]:
    """Seven bad cases; the names of the objects at fault."""
    names = [ruin(root, number, kind).name for number, kind in SPOILT.items()]
    for number, body in ((9, b"no label"), (10, gzip.compress(files_of(root, 10)[1].read_bytes())[:-20])):
        label = files_of(root, number)[1]
        label.write_bytes(body)
        names.append(label.name)
    return names


def test_all_objects_that_cannot_be_read_are_named_and_nothing_is_saved(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = spoil(root)
    assert index_boxes(root) == 1
    error = capsys.readouterr().err
    assert "expected to read all 12 cases, found 7 that cannot be read; no manifest was saved" in error
    assert [name in error for name in names] == [True] * 5 + [False] * 2
    assert "and 2 more" in error
    assert not (root / "m.parquet").exists()


def test_with_a_quarantine_bad_cases_stay_in_the_manifest_without_boxes_as_its_advice_says(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(root)
    assert index_boxes(root) == 1
    advised = re.search(r"(--on-bad) (quarantine)", capsys.readouterr().err)
    assert advised is not None
    assert index_boxes(root, *advised.groups()) == 1
    error = capsys.readouterr().err
    assert "expected at most 1 bad cases, found 7" in error
    assert error.rstrip().endswith("or raise --budget-cases")  # `index` has nothing that could be resumed
    assert not (root / "m.parquet").exists()
    assert index_boxes(root, *advised.groups(), "--budget-cases", "7") == 0
    assert "7 cases cannot be read; they stay in the manifest" in capsys.readouterr().out
    saved = Manifest.load(f"{root}/m.parquet")
    assert len(saved) == 12
    unknown = np.flatnonzero(saved.table["boxes"].is_null().to_numpy()).tolist()
    assert unknown == [*SPOILT, 9, 10]


@pytest.mark.parametrize("kind", ["gone", "label-gone", "overwritten", *BEFORE_LISTING])
def test_each_kind_of_bad_case_is_found_by_looking_up_and_no_other_case_is(root: Path, kind: str) -> None:
    if kind not in AFTER_LISTING:
        ruin(root, 5, kind)
    manifest = index_cases(f"{root}/images", f"{root}/labels").manifest
    if kind in AFTER_LISTING:
        ruin(root, 5, kind)
    found = look_up_each(manifest)
    # Label values are of no class here, a slab is looked at when it is read, and there is no patch.
    assert [entry.index for entry in found.bad] == ([] if kind in ("label-seven", "nan", "too-small") else [5])
    for entry in found.bad:
        assert isinstance(entry.error, ObjectError if kind in AFTER_LISTING else DecodeError)
        assert str(entry.uri) in str(entry.error)
        assert entry.uri.endswith("case_00005_y.npy" if kind == "label-gone" else "case_00005_x.npy")
    if kind in AFTER_LISTING:
        with pytest.raises(ObjectError, match="case_00005"):
            look_up_cases(manifest)


def test_volumes_that_are_compressed_or_in_fortran_order_are_good_and_read_whole(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, _ = files_of(root, 2)
    # Runs judge the number of channels and the classes, and not `index`.
    two_channels = np.concatenate([np.load(image)] * 2)
    image.write_bytes(gzip.compress(npy_bytes(two_channels)))
    _, label = files_of(root, 6)
    label.write_bytes(npy_bytes(np.asfortranarray(np.load(label) + np.uint8(200))))
    assert index_boxes(root) == 0
    assert "2 are compressed or in Fortran order, and are always read whole" in capsys.readouterr().out
