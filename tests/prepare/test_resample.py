"""The two resamplings against torch, and against their definition written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ingest.errors import DecodeError
from ingest.prepare.resample import pad_edge, resample_linear, resample_nearest, resampled_shape

SIZES = [((5, 7, 9), (8, 5, 9)), ((4, 4, 4), (1, 9, 4)), ((1, 6, 3), (5, 3, 7)), ((11, 13, 6), (11, 29, 17))]


@pytest.mark.parametrize(("size", "wanted"), SIZES)
def test_linear_is_torchs_trilinear_with_aligned_corners(size, wanted) -> None:
    volume = np.random.default_rng(1).normal(0, 500, size).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(volume)[None, None], size=wanted, mode="trilinear", align_corners=True
    )
    np.testing.assert_allclose(resample_linear(volume, wanted), expected[0, 0].numpy(), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(("size", "wanted"), SIZES)
def test_nearest_is_torchs_nearest(size, wanted) -> None:
    volume = np.random.default_rng(2).integers(0, 255, size).astype(np.uint8)
    expected = torch.nn.functional.interpolate(torch.from_numpy(volume)[None, None], size=wanted, mode="nearest")
    np.testing.assert_array_equal(resample_nearest(volume, wanted), expected[0, 0].numpy())


def test_nearest_takes_torchs_voxel_at_every_pair_of_sizes() -> None:
    # Float32 arithmetic decides which voxel is taken where i * in / out is a whole number or nearly one.
    for size in range(1, 131, 3):
        line = np.arange(size, dtype=np.uint8)[None, None, :]
        for wanted in range(1, 260, 2):
            expected = torch.nn.functional.interpolate(torch.from_numpy(line), size=wanted, mode="nearest")
            found = resample_nearest(line, (1, 1, wanted))
            np.testing.assert_array_equal(found, expected.numpy(), err_msg=f"{size} to {wanted}")


def test_linear_follows_its_definition() -> None:
    line = np.array([0, 10, 40], np.float32).reshape(1, 1, 3)
    # Output voxel i lies at i * (3 - 1) / (5 - 1).
    np.testing.assert_allclose(resample_linear(line, (1, 1, 5)).ravel(), [0, 5, 10, 25, 40])


def test_linear_leaves_a_volume_of_the_right_shape_alone() -> None:
    volume = np.ones((2, 3, 4), np.float32)
    assert resample_linear(volume, (2, 3, 4)) is volume


def test_new_shape_is_cut_and_not_rounded() -> None:
    # 10 * 3.1 / 1.6 = 19.375; 10 * 0.95 / 1.2 = 7.917; 10 * 1.2 / 1.2 = 10.
    assert resampled_shape((10, 10, 10), (3.1, 0.95, 1.2), (1.6, 1.2, 1.2)) == (19, 7, 10)


def test_a_volume_that_would_vanish_is_refused_with_its_shape() -> None:
    with pytest.raises(DecodeError, match=r"at least one voxel .* found \(0, 4, 4\)"):
        resampled_shape((2, 4, 4), (1.0, 1.0, 1.0), (3.0, 1.0, 1.0))


def test_padding_repeats_edges_and_puts_the_odd_voxel_behind() -> None:
    volume = np.arange(3, dtype=np.float32).reshape(3, 1, 1)
    padded = pad_edge(volume, (6, 1, 2))
    np.testing.assert_array_equal(padded[:, 0, 0], [0, 0, 1, 2, 2, 2])
    assert padded.shape == (6, 1, 2)


def test_padding_leaves_longer_axes_alone() -> None:
    assert pad_edge(np.zeros((5, 2, 9), np.uint8), (4, 4, 4)).shape == (5, 4, 9)
