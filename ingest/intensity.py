"""Measures intensities by channel, and recognises channels that do not look normalised.

The rule: a channel looks unnormalised if more than 0.5 % of its voxels lie above 15 or more than 0.5 % below -15, or if
its standard deviation is below 0.01. By Cantelli's inequality, in any image of mean 0 and standard deviation 1 at most
0.5 % of the voxels lie above 14.2, and at most 0.5 % below -14.2. So a z-scored image is never taken for a raw one. An
image that is scaled to 0 to 1 is not, either. Raw CT (Hounsfield units from -1,000) and raw MR (hundreds to thousands)
are far beyond.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)
FARTHEST = 15.0
"""Largest magnitude among 99 % of a normalised channel's voxels."""
LEAST_STD = 0.01
"""Smallest standard deviation of a normalised channel."""

VOXELS_AN_IMAGE = 65_536
"""Voxels of one channel of one image that go into the sample for percentiles."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelStats:
    """One channel of all images that were added.

    Attributes:
        images: number of images.
        voxels: number of finite voxels.
        not_finite: number of voxels that are NaN or infinite. The other figures leave them out.
        low: the smallest value.
        high: the largest value.
        mean: over all finite voxels.
        std: standard deviation over all finite voxels.
        percentiles: of a sample of voxels, for each of `PERCENTILES`.
    """

    images: int
    voxels: int
    not_finite: int
    low: float
    high: float
    mean: float
    std: float
    percentiles: tuple[float, ...]

    def complaint(self) -> str | None:
        """Return why the channel looks unnormalised, and like which kind of image; None if it looks normalised."""
        first, last = self.percentiles[0], self.percentiles[-1]
        if max(-first, last) > FARTHEST:
            if first <= -500:
                kind = "CT in Hounsfield units"
            elif self.low >= 0:
                kind = "raw MR, or another raw image of 8 to 16 bits"
            else:
                kind = "a raw image"
            return (
                f"expected 99 % of the voxels of a normalised image within {-FARTHEST:g} to {FARTHEST:g}, found "
                f"{first:,.4g} to {last:,.4g}: this looks like {kind}"
            )
        if self.std < LEAST_STD:
            return (
                f"expected a normalised image with a standard deviation of {LEAST_STD:g} or more, found "
                f"{self.std:.3g}: the network sees hardly more than one value"
            )
        return None


class _Channel:
    """Sums over one channel of the images so far."""

    def __init__(self) -> None:
        self.images = self.voxels = self.not_finite = 0
        self.low, self.high = math.inf, -math.inf
        self.mean = self.deviations = 0.0
        self.sample: list[npt.NDArray[np.float64]] = []

    def add(self, voxels: npt.NDArray[Any], rng: np.random.Generator) -> None:
        """Add one image's voxels, (n,) numbers. An image without voxels is not counted."""
        if not len(voxels):
            return
        self.images += 1
        for start in range(0, len(voxels), 2**20):  # a whole volume in float64 would need twice the memory of float32
            part = voxels[start : start + 2**20].astype(np.float64)
            finite = part[np.isfinite(part)]
            self.not_finite += len(part) - len(finite)
            if not len(finite):
                continue
            # Variance of two parts from the variance of each: https://en.wikipedia.org/wiki/Algorithms_for_calculating_variance
            mean, count = float(finite.mean()), self.voxels + len(finite)
            apart = mean - self.mean
            with np.errstate(over="ignore"):  # float64 voxels may overflow: the deviation is then infinite
                self.deviations += float(np.square(finite - mean).sum()) + apart**2 * self.voxels * len(finite) / count
            self.mean += apart * len(finite) / count
            self.voxels = count
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
        # Drawn at random, because every n-th voxel could lie in one column of the image.
        chosen = voxels[rng.integers(0, len(voxels), min(len(voxels), VOXELS_AN_IMAGE))].astype(np.float64)
        self.sample.append(chosen[np.isfinite(chosen)])

    def stats(self) -> ChannelStats | None:
        """Return the figures; None if no voxel was finite."""
        sample = np.concatenate(self.sample or [np.zeros(0)])
        if not len(sample):
            return None
        return ChannelStats(
            images=self.images,
            voxels=self.voxels,
            not_finite=self.not_finite,
            low=self.low,
            high=self.high,
            mean=self.mean,
            std=math.sqrt(self.deviations / self.voxels),
            percentiles=tuple(np.percentile(sample, PERCENTILES).tolist()),
        )


class Intensities:
    """Collects the intensities of images, one image at a time. Keeps only a sample of their voxels."""

    def __init__(self, seed: int = 0) -> None:
        """Start without images.

        Args:
            seed: of the random draw of the sample.
        """
        self._rng = np.random.default_rng(seed)
        self._channels: dict[int, _Channel] = {}

    def add(self, image_CDHW: npt.NDArray[Any]) -> None:
        """Add one image.

        Args:
            image_CDHW: (C, D, H, W), or any shape whose first axis is the channels; of any real type.
        """
        for number, channel in enumerate(image_CDHW):
            self._channels.setdefault(number, _Channel()).add(channel.ravel(order="K"), self._rng)

    def channels(self) -> dict[int, ChannelStats]:
        """Return the figures of each channel, by channel number. A channel without a finite voxel is left out."""
        stats = {number: channel.stats() for number, channel in sorted(self._channels.items())}
        return {number: each for number, each in stats.items() if each is not None}
