"""Intensities of images by channel, and whether they look normalised.

The rule: a channel looks unnormalised if more than 1 % of its voxels lie beyond ±15, or if its standard deviation is
below 0.01. By Cantelli's inequality at most 0.5 % of the voxels on either side lie beyond ±14.2 in any image of mean 0
and standard deviation 1, however skewed. So a z-scored image is never taken for a raw one, nor is one that is scaled to
0 to 1. Raw CT (Hounsfield units from -1,000) and raw MR (hundreds to thousands) are far beyond.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)
FARTHEST = 15.0
"""Magnitude that 99 % of a normalised channel's voxels do not exceed."""
LEAST_STD = 0.01
"""Standard deviation of a normalised channel at least."""

VOXELS_AN_IMAGE = 65_536
"""Voxels of one channel of one image that go into the sample for percentiles."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelStats:
    """One channel of all images that were added.

    Attributes:
        images: how many.
        voxels: finite ones.
        not_finite: voxels that are NaN or infinite; they are in no other figure.
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
        """Say why the channel looks unnormalised, and what it looks like; None where it looks normalised."""
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
        """Add one image's voxels, (n,) numbers; an image without any counts for nothing."""
        if not len(voxels):
            return
        self.images += 1
        for start in range(0, len(voxels), 2**20):  # a volume as float64 would take twice its bytes again
            part = voxels[start : start + 2**20].astype(np.float64)
            finite = part[np.isfinite(part)]
            self.not_finite += len(part) - len(finite)
            if not len(finite):
                continue
            # The sums of two parts as one: https://en.wikipedia.org/wiki/Algorithms_for_calculating_variance
            mean, count = float(finite.mean()), self.voxels + len(finite)
            apart = mean - self.mean
            with np.errstate(over="ignore"):  # of float64 voxels: the deviation is then infinite, and shown so
                self.deviations += float(np.square(finite - mean).sum()) + apart**2 * self.voxels * len(finite) / count
            self.mean += apart * len(finite) / count
            self.voxels = count
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
        # Drawn, since every n-th voxel could be of one column.
        chosen = voxels[rng.integers(0, len(voxels), min(len(voxels), VOXELS_AN_IMAGE))].astype(np.float64)
        self.sample.append(chosen[np.isfinite(chosen)])

    def stats(self) -> ChannelStats | None:
        """None where no voxel was finite."""
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
    """Adds up images one at a time; holds a sample of their voxels only."""

    def __init__(self, seed: int = 0) -> None:
        """Begin with no image.

        Args:
            seed: of the sample of voxels.
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
        """What was added, by the number of the channel; a channel without a finite voxel is left out."""
        stats = {number: channel.stats() for number, channel in sorted(self._channels.items())}
        return {number: each for number, each in stats.items() if each is not None}
