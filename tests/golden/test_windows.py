"""MLPerf's whole-volume inference, its cuts and its padding included, and our choices that differ from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ingest.errors import ConfigError
from train.evaluate import SlidingWindowConfig, score_case, scored_region, sliding_window_logits
from train.unet3d import UNet3D, UNet3DConfig

ROI = (16, 8, 12)
MLPERF = SlidingWindowConfig(roi=ROI, coverage="mlperf", padding="mlperf")


def reference(model: nn.Module, image: torch.Tensor) -> tuple[np.ndarray, tuple[slice, ...]]:
    """FACTS section 4, Inference, an axis and a window at a time: logits of what is scored, and where that lies."""
    kept, cut, pads = [], [], []
    for size, roi in zip(image.shape[1:], ROI, strict=True):
        step = roi // 2
        rest = size % step
        cut.append(rest if rest < step // 2 else 0)
        kept.append(slice(cut[-1] // 2, size - (cut[-1] - cut[-1] // 2)))
        left = size - cut[-1]
        lack = -left % step
        if left + lack < roi:
            lack += step
        pads.append((lack // 2, lack - lack // 2))
    x = np.pad(image.numpy()[(slice(None), *kept)], [(0, 0), *pads], constant_values=-2.2)
    gaussians = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (0.125 * n)) ** 2) for n in ROI]
    weight = np.cbrt(np.einsum("d,h,w->dhw", *gaussians))
    weight /= weight.max()
    total, norm = np.zeros((3, *x.shape[1:])), np.zeros(x.shape[1:])
    starts = [range(0, size - roi + 1, roi // 2) for size, roi in zip(x.shape[1:], ROI, strict=True)]
    for d in starts[0]:
        for h in starts[1]:
            for w in starts[2]:
                window = (slice(d, d + ROI[0]), slice(h, h + ROI[1]), slice(w, w + ROI[2]))
                with torch.inference_mode():
                    logits = model.eval()(torch.from_numpy(x[(slice(None), *window)])[None])[0].numpy()
                total[(slice(None), *window)] += weight * logits
                norm[window] += weight
    assert norm.min() > 0
    inside = tuple(slice(a, size - b) for (a, b), size in zip(pads, x.shape[1:], strict=True))
    return (total / norm)[(slice(None), *inside)], tuple(kept)


def a_model() -> UNet3D:
    torch.manual_seed(0)
    return UNet3D(UNet3DConfig(filters=(4, 6), bottleneck=8))


# Remainders by the steps of 8, 4 and 6 voxels: none, cut, padded; and axes shorter than the window.
@pytest.mark.parametrize("shape", [(24, 12, 18), (27, 13, 20), (30, 15, 22), (19, 11, 23), (9, 7, 7), (33, 6, 31)])
def test_mlperf_coverage_and_padding_are_the_references(shape: tuple[int, int, int]) -> None:
    model, image = a_model(), torch.randn(1, *shape)
    expected, kept = reference(model, image)
    assert scored_region(shape, MLPERF) == kept
    found = sliding_window_logits(model, image, MLPERF)
    assert found.shape == (3, *shape)
    np.testing.assert_allclose(found[(slice(None), *kept)], expected, atol=1e-5)
    outside = torch.ones(shape, dtype=torch.bool)
    outside[kept] = False
    assert not found[:, outside].any()
    assert not found.argmax(dim=0)[outside].any()


def test_at_the_published_window_up_to_31_voxels_an_axis_go_unscored_and_by_default_none() -> None:
    mlperf = SlidingWindowConfig(coverage="mlperf")
    for length in range(128, 260):
        rest = length % 64
        (d, _, _) = scored_region((length, 128, 128), mlperf)
        assert d.stop - d.start == (length - rest if rest < 32 else length)
        assert scored_region((length, 130, 159), SlidingWindowConfig()) == (
            slice(0, length),
            slice(0, 130),
            slice(0, 159),
        )


def test_only_scored_voxels_count_in_a_cases_dice() -> None:
    class Half(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.cat((-image, image), dim=1)

    config = SlidingWindowConfig(roi=(8, 8, 8), coverage="mlperf")
    image = torch.full((1, 9, 8, 8), -1.0)
    label = torch.zeros(1, 9, 8, 8, dtype=torch.uint8)
    image[0, 2] = 1.0
    label[0, 2] = 1
    label[0, 8] = 1  # the remainder of one voxel by the step of 4, behind: missed, and not scored
    assert score_case(Half(), image, label, config).tolist() == [1.0]
    whole = score_case(Half(), image, label, SlidingWindowConfig(roi=(8, 8, 8)))
    assert whole == pytest.approx([2 / 3])


def test_each_choice_can_be_taken_alone() -> None:
    model, image = a_model(), torch.randn(1, 9, 8, 12) - 5
    ours = sliding_window_logits(model, image, SlidingWindowConfig(roi=ROI))
    padded = sliding_window_logits(model, image, SlidingWindowConfig(roi=ROI, padding="mlperf"))
    assert (ours - padded).abs().max() > 1e-3
    image = torch.randn(1, 20, 10, 15)
    ours = sliding_window_logits(model, image, SlidingWindowConfig(roi=ROI))
    covered = sliding_window_logits(model, image, SlidingWindowConfig(roi=ROI, coverage="mlperf"))
    assert (ours - covered).abs().max() > 1e-3


@pytest.mark.parametrize(("field", "value"), [("coverage", "whole"), ("padding", 0)])
def test_other_choices_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        SlidingWindowConfig(**{field: value})  # type: ignore[arg-type]
