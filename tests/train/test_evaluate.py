"""Sliding-window inference: coverage, weights, padding, and what must not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ingest.errors import ConfigError
from train.evaluate import (
    SlidingWindowConfig,
    importance_window,
    score_case,
    sliding_window_logits,
    window_starts,
)
from train.unet3d import UNet3D, UNet3DConfig

Shape = tuple[int, int, int]
ROI = SlidingWindowConfig(roi=(8, 8, 8))


class Constant(nn.Module):
    """Two classes whose logits are 2 and -4 everywhere."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.tensor([2.0, -4.0]).reshape(1, 2, 1, 1, 1).expand(len(image), 2, *image.shape[2:])


class Echo(nn.Module):
    """Logits are the image and its negative; remembers the windows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen.append(image.clone())
        return torch.cat((image, -image), dim=1)


def test_the_importance_window_is_the_published_one() -> None:
    actual = importance_window((6, 8, 10), 0.125).numpy()
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (0.125 * n)) ** 2) for n in (6, 8, 10)]
    expected = np.cbrt(np.einsum("i,j,k->ijk", *axes))
    np.testing.assert_allclose(actual, expected / expected.max(), rtol=1e-6)
    assert actual.max() == 1


def test_a_narrow_importance_window_never_weighs_nothing() -> None:
    assert importance_window((32, 32, 32), 0.001).min() > 0


def test_windows_step_by_half_and_end_flush_with_the_border() -> None:
    assert window_starts(256, 128, 0.5) == [0, 64, 128]
    assert window_starts(250, 128, 0.5) == [0, 64, 122]
    assert window_starts(128, 128, 0.5) == [0]
    assert window_starts(129, 128, 0.5) == [0, 1]
    assert window_starts(5, 4, 0.99) == [0, 1]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_every_voxel_is_in_a_window_whatever_the_length(overlap: float) -> None:
    for length in range(7, 40):
        starts = window_starts(length, 7, overlap)
        covered = {voxel for start in starts for voxel in range(start, start + 7)}
        assert covered == set(range(length))
        assert starts == sorted(set(starts))


@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 17, 23), (5, 8, 30), (3, 2, 1), (31, 8, 11)])
def test_a_constant_model_gives_its_constant_everywhere(shape: Shape) -> None:
    logits = sliding_window_logits(Constant(), torch.randn(1, *shape), ROI)
    assert logits.shape == (2, *shape)
    assert logits.unique().tolist() == [-4.0, 2.0]


@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 17, 23), (5, 8, 30), (3, 2, 1), (31, 8, 11)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
def test_a_model_that_echoes_gives_back_the_image(shape: Shape, overlap: float) -> None:
    image = torch.randn(1, *shape)
    logits = sliding_window_logits(Echo(), image, SlidingWindowConfig(roi=(8, 8, 8), overlap=overlap))
    torch.testing.assert_close(logits, torch.cat((image, -image)), rtol=1e-5, atol=1e-6)


def test_overlapping_windows_are_averaged_by_their_weights() -> None:
    class Numbered(nn.Module):
        """The n-th window's logits are n everywhere."""

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            numbers = torch.arange(float(len(image))).reshape(-1, 1, 1, 1, 1)
            return numbers.expand(-1, 2, *image.shape[2:])

    config = SlidingWindowConfig(roi=(4, 4, 4), overlap=0.5, window_batch=99)
    logits = sliding_window_logits(Numbered(), torch.zeros(1, 4, 4, 6), config)
    weight = importance_window((4, 4, 4), 0.125)[0, 0]
    row = logits[0, 0, 0]
    assert row[:2].tolist() == [0, 0]
    assert row[4:].tolist() == [1, 1]
    expected = weight[:2] / (weight[:2] + weight[2:])
    torch.testing.assert_close(row[2:4], expected)


def test_the_result_does_not_depend_on_how_many_windows_go_at_once() -> None:
    torch.manual_seed(0)
    model = UNet3D(UNet3DConfig(filters=(4, 6), bottleneck=8, norm="batchnorm"))
    image = torch.randn(1, 13, 19, 10)
    results = [
        sliding_window_logits(model, image, SlidingWindowConfig(roi=(8, 8, 8), window_batch=batch))
        for batch in (1, 3, 64)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_short_axes_are_padded_with_each_channels_own_minimum() -> None:
    model = Echo()
    image = torch.stack((torch.full((4, 8, 8), 3.0), torch.full((4, 8, 8), -7.0)))
    image[0, 0, 0, 0] = 1.5
    logits = sliding_window_logits(model, image, ROI)
    (window,) = model.seen
    assert window.shape == (1, 2, 8, 8, 8)
    for outside in (window[:, :, :2], window[:, :, 6:]):
        assert outside[:, 0].unique().tolist() == [1.5]
        assert outside[:, 1].unique().tolist() == [-7.0]
    torch.testing.assert_close(logits[:2], image)


def test_the_model_is_in_evaluation_mode_inside_and_as_before_afterwards() -> None:
    class Modal(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return torch.cat((image, image), dim=1)

    for training in (True, False):
        model = Modal().train(training)
        sliding_window_logits(model, torch.zeros(1, 8, 8, 8), ROI)
        assert model.training is training


def test_a_case_is_scored_by_class_on_the_arg_max() -> None:
    label = torch.zeros(1, 10, 9, 12, dtype=torch.uint8)
    label[0, 2:6, 1:7, 3:9] = 1
    image = torch.where(label == 1, -1.0, 1.0)
    image[0, 2, 1:7, 3:9] = 1.0  # a quarter of the object is missed: Dice = 2 * 3/4 / (3/4 + 1)
    assert score_case(Echo(), image, label, ROI) == pytest.approx([1.5 / 1.75])
    assert score_case(Constant(), image, torch.zeros_like(label), ROI).tolist() == [1.0]


def test_a_case_whose_label_has_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        score_case(Constant(), torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 8, 9), ROI)


def test_an_image_without_a_channel_axis_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"C, D, H, W.*\(8, 8, 8\)"):
        sliding_window_logits(Constant(), torch.zeros(8, 8, 8), ROI)


@pytest.mark.parametrize(
    ("field", "value"),
    [("roi", (8, 0, 8)), ("roi", (8, 8)), ("overlap", 1.0), ("overlap", -0.1), ("sigma_scale", 0), ("window_batch", 0)],
)
def test_windows_that_cannot_work_are_refused_at_construction(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        SlidingWindowConfig(**{field: value})  # type: ignore[arg-type]
