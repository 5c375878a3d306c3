"""Where a prepared voxel lies is where the scan's own voxel lies."""

import gzip
import json

import nibabel
import numpy as np
import pytest

from ingest.errors import ConfigError
from ingest.geometry import from_json, geometry_uri, list_geometry, nifti_bytes, to_json
from ingest.prepare import PrepareConfig, prepare
from tests.prepare.test_kits19 import write_case


def test_a_prepared_scan_keeps_its_corners_where_they_were_though_resampled_and_padded(tmp_path):
    write_case(tmp_path / "in", 0, image=np.zeros((9, 31, 27)), label=np.zeros((9, 31, 27)), spacing=(3.1, 0.95, 0.78))
    affine = np.array([[0, 0, -0.78, 101.0], [0, 0.95, 0, -55], [3.1, 0, 0, 12], [0, 0, 0, 1]])
    for name in ("imaging", "segmentation"):
        path = tmp_path / "in" / "case_00000" / f"{name}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(path).dataobj), affine), path)
    settings = {"spacing": (1.6, 1.2, 1.2), "shape": (20, 20, 20), "workers": 0, "resample": "mlperf"}
    prepare(PrepareConfig(source="kits19", input=str(tmp_path / "in"), output=str(tmp_path / "out"), **settings))
    found = list_geometry(f"{tmp_path}/out/geometry/")
    assert list(found) == ["case_00000"]
    prepared = from_json((tmp_path / "out" / "geometry" / "case_00000.json").read_bytes(), "it")
    # int(3.1/1.6*9) = 17, int(0.95/1.2*31) = 24, int(0.78/1.2*27) = 17; 17 is padded to 20, one voxel before.
    assert np.load(tmp_path / "out" / "images" / "case_00000_x.npy").shape == (1, 20, 24, 20)
    for first, last in (((0, 0, 0), (1, 0, 1)), ((8, 30, 26), (17, 23, 17))):
        np.testing.assert_allclose(prepared @ [*last, 1], affine @ [*first, 1], atol=1e-4)


def test_mni152_cases_lie_upright_around_the_middle(tmp_path):
    settings = {"shape": (16, 18, 20), "cases": 1, "workers": 0}
    prepare(PrepareConfig(source="mni152", output=str(tmp_path), **settings))
    affine = from_json((tmp_path / "geometry" / "case_00000.json").read_bytes(), "it")
    np.testing.assert_allclose(affine @ [7.5, 8.5, 9.5, 1], [0, 0, 0, 1], atol=1e-9)
    assert nibabel.aff2axcodes(affine) == ("S", "A", "R")


def test_a_label_map_comes_back_from_nifti_with_its_affine():
    label = np.arange(24, dtype=np.uint8).reshape(2, 3, 4) % 3
    affine = np.diag([1.6, 1.2, 1.2, 1.0])
    data = nifti_bytes(label, affine)
    assert data == nifti_bytes(label, affine)
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(data))
    np.testing.assert_array_equal(np.asarray(image.dataobj), label)
    np.testing.assert_allclose(image.affine, affine, rtol=1e-6)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", json.dumps({"affine": [[1.0]]}).encode(), json.dumps({"affine": [[np.nan] * 4] * 4}).encode()],
)
def test_a_sidecar_that_is_none_is_refused_by_name(content):
    with pytest.raises(ConfigError, match=r"case_1\.json: expected a JSON object with `affine`"):
        from_json(content, "case_1.json")


@pytest.mark.parametrize(
    ("images", "geometry"),
    [
        ("gs://bucket/set/images/", "gs://bucket/set/geometry/"),
        ("/data/images", "/data/geometry/"),
        ("gs://bucket/scans", None),
    ],
)
def test_affines_are_looked_for_beside_images(images, geometry):
    assert geometry_uri(images) == geometry


def test_a_place_without_affines_has_none(tmp_path):
    assert list_geometry(f"{tmp_path}/geometry/") == {}


def test_an_affine_that_is_not_finite_is_never_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(np.full((4, 4), np.nan))
