"""What workers of `predict` refuse, without a Ray."""

import numpy as np
import pytest

from ingest.errors import DecodeError
from train.workers import check_image


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
