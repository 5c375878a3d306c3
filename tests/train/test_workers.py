"""What workers of `predict` refuse and write, without a Ray."""

import numpy as np
import pyarrow as pa
import pytest

from ingest.errors import DecodeError
from ingest.geometry import Affine
from ingest.images import IMAGE_SCHEMA
from ingest.stores import open_store
from ingest.testing import npy_bytes
from train.workers import Predictor, check_image


def test_an_image_to_predict_with_its_channels_last_is_called_so_and_taken_once_they_are_moved():
    image = np.zeros((40, 16, 24, 1), np.float32)
    with pytest.raises(
        DecodeError, match=r"a_x.npy: expected 1 image channels.*found 40 channels.*stand last"
    ) as caught:
        check_image(image, 1, "a_x.npy")
    assert "save np.moveaxis(image, -1, 0), which is (1, 40, 16, 24); if not, give other images" in str(caught.value)
    check_image(np.moveaxis(image, -1, 0), 1, "a_x.npy")


def test_an_image_to_predict_of_more_channels_is_for_another_network():
    with pytest.raises(DecodeError, match=r"found 2 channels in shape \(2, 8, 8, 8\); give other images or another"):
        check_image(np.zeros((2, 8, 8, 8), np.float32), 1, "a_x.npy")


def test_voxels_that_are_not_finite_are_to_be_understood_before_they_are_replaced():
    image = np.full((1, 8, 8, 8), np.nan, np.float32)
    with pytest.raises(DecodeError, match="find out where they come from before you replace them"):
        check_image(image, 1, "a_x.npy")


class Background(Predictor):
    """Predicts background, with no network."""

    def __init__(self, place: str, affines: dict[str, Affine]) -> None:
        self.output, self.names, self.affines = open_store(place), "{}_y.npy", affines

    def predict(self, body, name):
        return np.zeros((1, 2, 3, 4), np.uint8)


def test_names_with_blanks_are_told_one_by_one(tmp_path):
    body = npy_bytes(np.zeros((1, 2, 3, 4), np.float32))
    columns = {"case_id": ["a b", "c"], "image_name": ["a b_x.npy", "c_x.npy"], "image_npy": [body, body]}
    (told,) = Background(f"{tmp_path}/", {"a b": np.eye(4)})(pa.table(columns, schema=IMAGE_SCHEMA))
    assert told.to_pylist() == [
        {"case_id": "a b", "written": ["a b_y.npy", "a b.nii.gz"]},
        {"case_id": "c", "written": ["c_y.npy"]},
    ]
    assert {file.name for file in tmp_path.iterdir()} == {"a b_y.npy", "a b.nii.gz", "c_y.npy"}
