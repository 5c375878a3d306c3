"""Sliding-window inference and Dice beside MONAI's, on the same weights and volumes: agreement to 1e-4.

Where the conventions agree: windows start alike, the last one flush with the border; an axis shorter than the window is
padded half before and half behind. Our importance window, MLPerf's cube root of three Gaussians, is MONAI's Gaussian of
sqrt(3) times the deviation. MONAI lifts weights below 1e-3 to 1e-3, which MLPerf's window of 128 voxels reaches in its
corners; where that would count, our window is handed to MONAI.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from train.evaluate import SlidingWindowConfig, importance_window, score_case, sliding_window_logits
from train.loss import dice_by_class
from train.unet3d import UNet3D, UNet3DConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MONAI's own, from third parties it imports
    from monai.inferers import sliding_window_inference
    from monai.metrics import DiceMetric

VOLUMES = [(24, 20, 28), (8, 8, 8), (17, 29, 11), (5, 19, 7), (6, 7, 3)]


def a_model(norm: str = "instancenorm") -> UNet3D:
    torch.manual_seed(1)
    return UNet3D(UNet3DConfig(filters=(4, 8), bottleneck=8, norm=norm)).eval()  # type: ignore[arg-type]


def a_case(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(sum(shape))
    image = torch.from_numpy(rng.normal(0, 1, (1, *shape)).astype(np.float32))
    return image, torch.from_numpy(rng.integers(0, 3, (1, *shape)).astype(np.uint8))


def monai_logits(model: UNet3D, image: torch.Tensor, config: SlidingWindowConfig, **weights) -> torch.Tensor:
    with torch.inference_mode():
        logits = sliding_window_inference(
            image[None],
            config.roi,
            config.window_batch,
            model,
            overlap=config.overlap,
            padding_mode="constant",
            cval=float(image.min()),
            **weights,
        )
    assert isinstance(logits, torch.Tensor)
    return logits[0]


def monai_dice(prediction: torch.Tensor, label: torch.Tensor) -> list[float]:
    metric = DiceMetric(include_background=False, reduction="none", ignore_empty=False, num_classes=3)
    scores = metric(prediction[None], label[None].long())
    assert isinstance(scores, torch.Tensor)
    return scores[0].tolist()


@pytest.mark.parametrize("norm", ["instancenorm", "batchnorm"])
@pytest.mark.parametrize("overlap", [0.25, 0.5])
@pytest.mark.parametrize("shape", VOLUMES)
def test_logits_and_dice_are_monais(shape: tuple[int, int, int], overlap: float, norm: str) -> None:
    model = a_model(norm)
    image, label = a_case(shape)
    config = SlidingWindowConfig(roi=(8, 8, 8), overlap=overlap)
    expected = monai_logits(model, image, config, mode="gaussian", sigma_scale=math.sqrt(3) * config.sigma_scale)
    torch.testing.assert_close(sliding_window_logits(model, image, config), expected, rtol=0, atol=1e-4)
    dice = score_case(model, image, label, config).tolist()
    assert dice == pytest.approx(monai_dice(expected.argmax(dim=0, keepdim=True), label), abs=1e-4)


def test_windows_of_unequal_sides_and_low_weights_are_monais_too() -> None:
    model, (image, _) = a_model(), a_case((41, 25, 40))
    config = SlidingWindowConfig(roi=(32, 16, 24))
    weight = importance_window(config.roi, config.sigma_scale)
    assert weight.min() < 1e-3
    expected = monai_logits(model, image, config, roi_weight_map=weight)
    torch.testing.assert_close(sliding_window_logits(model, image, config), expected, rtol=0, atol=1e-4)


def test_classes_that_are_missing_score_as_in_monai() -> None:
    prediction, label = a_case((6, 6, 6))[1], a_case((6, 7, 5))[1][:, :, :6].repeat(1, 1, 1, 2)[:, :, :, :6]
    for gone_predicted, gone_true in [((), ()), ((1,), ()), ((), (2,)), ((1, 2), (1,)), ((1, 2), (1, 2))]:
        one, other = prediction.clone(), label.clone()
        for value in gone_predicted:
            one[one == value] = 0
        for value in gone_true:
            other[other == value] = 0
        found = dice_by_class(one[None], other[None], 3)[0].tolist()
        assert found == pytest.approx(monai_dice(one, other), abs=1e-4)
