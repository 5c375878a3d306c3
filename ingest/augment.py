"""Flip, brightness and noise, by the MLPerf laws: drawn once a sample, then applied to image and label alike.

Source: mlcommons/training, retired_benchmarks/unet3d/pytorch, data_loading (FACTS section 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import crop
from .crop import Boxes, CropConfig, Shape
from .decode import LabelMap, Volume
from .errors import ConfigError
from .plan import TRANSFORM, stream


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Probabilities and ranges; the defaults are MLPerf's."""

    flip_probability: float = 1 / 3
    """For each of D, H, W on its own."""

    brightness_probability: float = 0.1
    """Share of samples whose brightness changes."""

    brightness_range: tuple[float, float] = (0.7, 1.3)
    """f is uniform in this range and the image is multiplied by 1 + f. With MLPerf's 0.7 to 1.3 that is by 1.7 to
    2.3: it reads like a slip of theirs, and is kept for fidelity. For factors around 1 give (-0.3, 0.3)."""

    noise_probability: float = 0.1
    """Share of samples that noise is added to."""

    noise_std_max: float = 0.1
    """The noise's standard deviation is uniform from 0 to this, in units of the normalised image."""

    def __post_init__(self) -> None:
        for field in ("flip_probability", "brightness_probability", "noise_probability"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"{field} must be from 0 to 1; got {getattr(self, field)}")
        low, high = self.brightness_range
        if not -1 < low <= high:
            raise ConfigError(f"brightness_range must be low <= high, both above -1; got {self.brightness_range}")
        if self.noise_std_max < 0:
            raise ConfigError(f"noise_std_max must be 0 or more; got {self.noise_std_max}")


NO_AUGMENTATION = AugmentConfig(flip_probability=0, brightness_probability=0, noise_probability=0)


DRAWS = crop.DRAWS + 7  # uniform numbers that a sample takes


class PatchParams(NamedTuple):
    """Everything that is random about one sample.

    Attributes:
        start: (D, H, W) of the patch in the volume.
        flips: whether each of D, H, W is reversed.
        brightness: factor of the image; 1.0 for none.
        noise_std: standard deviation of the noise; 0.0 for none.
    """

    start: Shape
    flips: tuple[bool, bool, bool]
    brightness: float
    noise_std: float


def draw(
    label_1DHW: LabelMap,
    crop_config: CropConfig,
    augment_config: AugmentConfig,
    rng: np.random.Generator,
    boxes: Callable[[], Boxes] | None = None,
) -> PatchParams:
    """Draw one sample's parameters: the same amount of randomness is taken whatever they come out as.

    Args:
        label_1DHW: (1, D, H, W) uint8, at least the patch on every axis.
        crop_config: the patch and how it is placed.
        augment_config: probabilities and ranges.
        rng: the sample's own generator.
        boxes: gives the label's `foreground_boxes`, where they may be known already; called only when needed.
    """
    u = rng.random(DRAWS)
    d, h, w = label_1DHW.shape[1:]
    start = crop.draw_start((d, h, w), boxes or (lambda: crop.foreground_boxes(label_1DHW)), crop_config, u)
    flip_d, flip_h, flip_w = (u[6:9] < augment_config.flip_probability).tolist()
    low, high = augment_config.brightness_range
    bright = u[9] < augment_config.brightness_probability
    noisy = u[11] < augment_config.noise_probability
    return PatchParams(
        start,
        (flip_d, flip_h, flip_w),
        1.0 + low + float(u[10]) * (high - low) if bright else 1.0,
        float(u[12]) * augment_config.noise_std_max if noisy else 0.0,
    )


def apply(
    image_CDHW: Volume,
    label_1DHW: LabelMap,
    params: PatchParams,
    rng: np.random.Generator,
    out_image: Volume,
    out_label: LabelMap,
) -> None:
    """Cut, flip, brighten and add noise: one strided copy of the patch, then in place.

    Args:
        image_CDHW: (C, D, H, W) float32; not written to.
        label_1DHW: (1, D, H, W) uint8; not written to.
        params: from `draw`.
        rng: the same sample's generator, after `draw`; gives the noise.
        out_image: (C, *patch) float32, contiguous, written whole.
        out_label: (1, *patch) uint8, contiguous, written whole.
    """
    cut = (slice(None), *map(_cut, params.start, out_label.shape[1:], params.flips))
    np.copyto(out_image, image_CDHW[cut])
    np.copyto(out_label, label_1DHW[cut])
    if params.brightness != 1.0:
        out_image *= np.float32(params.brightness)
    if params.noise_std > 0.0:
        noise = rng.standard_normal(out_image.shape, dtype=np.float32)
        noise *= np.float32(params.noise_std)
        out_image += noise


def _cut(start: int, length: int, flipped: bool) -> slice:
    if not flipped:
        return slice(start, start + length)
    return slice(start + length - 1, start - 1 if start else None, -1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PatchSampler:
    """Cuts and augments one patch a case, as a function of (seed, epoch, case) alone."""

    crop: CropConfig
    augment: AugmentConfig
    seed: int

    def __call__(
        self,
        image_CDHW: Volume,
        label_1DHW: LabelMap,
        *,
        epoch: int,
        index: int,
        out_image: npt.NDArray[np.float32],
        out_label: npt.NDArray[np.uint8],
        boxes: Callable[[], Boxes] | None = None,
    ) -> PatchParams:
        """Write the sample of this epoch and case into the two buffers; see `apply` for shapes, `draw` for boxes."""
        rng = stream(self.seed, epoch, index, TRANSFORM)
        params = draw(label_1DHW, self.crop, self.augment, rng, boxes)
        apply(image_CDHW, label_1DHW, params, rng, out_image, out_label)
        return params

    def start(self, shape: Shape, boxes: Callable[[], Boxes], *, epoch: int, index: int) -> Shape:
        """Where in a volume of this shape the same sample's patch starts: what can be told before it is read."""
        uniforms = stream(self.seed, epoch, index, TRANSFORM).random(DRAWS)
        return crop.draw_start(shape, boxes, self.crop, uniforms)
