"""Where a patch is cut: MLPerf's foreground oversampling, exactly.

Source of the law: mlcommons/training, retired_benchmarks/unet3d/pytorch, `RandBalancedCrop` (FACTS section 4).
One deviation, on by default: a random crop may also start at the last place that fits, which the reference never
picks; `random_starts="mlperf"` gives the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from .errors import ConfigError

Shape = tuple[int, int, int]
# (classes' boxes): for each present class one or two boxes, each ((start, stop) for D, H, W).
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Boxes = tuple[tuple[Box, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CropConfig:
    """The patch and how it is placed."""

    patch: Shape = (128, 128, 128)
    """Patch shape (D, H, W) in voxels."""

    foreground_probability: float = 0.4
    """Share of crops that are placed around a foreground component (MLPerf `oversampling`)."""

    random_starts: Literal["all", "mlperf"] = "all"
    """Where a random crop may start: `all` places that fit, or, as `mlperf` has it by a slip, all but the last of each
    axis."""

    def __post_init__(self) -> None:
        if len(self.patch) != 3 or any(length < 1 for length in self.patch):
            raise ConfigError(f"patch must be three lengths of 1 or more (D, H, W); got {self.patch}")
        if not 0 <= self.foreground_probability <= 1:
            raise ConfigError(f"foreground_probability must be from 0 to 1; got {self.foreground_probability}")
        if self.random_starts not in ("all", "mlperf"):
            raise ConfigError(f"random_starts must be all or mlperf; got {self.random_starts!r}")


def foreground_boxes(label_1DHW: npt.NDArray[np.uint8]) -> Boxes:
    """Bounding boxes of the two largest components (by box volume) of each class that is present.

    Components are connected by faces, as `scipy.ndimage.label` does by default.

    Args:
        label_1DHW: (1, D, H, W) uint8.

    Returns:
        For each present class above 0, in ascending order, its one or two boxes, smaller first; empty when
        there is no foreground. A few hundred bytes a case, whatever the volume.
    """
    # Where there is any foreground, then each class in there, then its components: each pass is dearer than the last.
    import scipy.ndimage  # of all processes of a run, only those that read cases load it

    if not label_1DHW.any():
        return ()
    occupied = [np.flatnonzero(label_1DHW[0].max(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    starts = [int(along[0]) for along in occupied]
    label_DHW = label_1DHW[0][tuple(slice(along[0], along[-1] + 1) for along in occupied)]
    boxes: list[tuple[Box, ...]] = []
    for value, extent in enumerate(scipy.ndimage.find_objects(label_DHW), start=1):
        if extent is None:
            continue  # type: ignore[unreachable]  # the stubs do not know that absent values give None
        components, _ = scipy.ndimage.label(label_DHW[extent] == value)
        d0, h0, w0 = (start + axis.start for start, axis in zip(starts, extent, strict=True))
        found: list[Box] = [
            ((d0 + d.start, d0 + d.stop), (h0 + h.start, h0 + h.stop), (w0 + w.start, w0 + w.stop))
            for d, h, w in scipy.ndimage.find_objects(components)
        ]
        found.sort(key=_volume)  # stable: of equal boxes the later ones count as larger
        boxes.append(tuple(found[-2:]))
    return tuple(boxes)


def _volume(box: Box) -> int:
    (d0, d1), (h0, h1), (w0, w1) = box
    return (d1 - d0) * (h1 - h0) * (w1 - w0)


# Uniform numbers that `draw_start` takes: one to choose the kind, then class, component and three offsets.
DRAWS = 6


def draw_start(
    shape: Shape, boxes: Callable[[], Boxes], config: CropConfig, uniforms: npt.NDArray[np.float64]
) -> Shape:
    """Where the patch starts in a volume of this shape.

    Args:
        shape: (D, H, W) of the volume, at least the patch on every axis.
        boxes: gives `foreground_boxes` of the case; called only when this crop is a foreground one.
        config: the patch and how it is placed.
        uniforms: (6,) float64 in [0, 1): all the randomness there is.

    Returns:
        (D, H, W), each from 0 to shape - patch.
    """
    if shape == config.patch:
        return 0, 0, 0  # wherever the foreground lies: finding it is most of what such a sample costs
    if uniforms[0] < config.foreground_probability:
        found = boxes()
        if found:
            candidates = found[_below(len(found), uniforms[1])]
            box = candidates[_below(len(candidates), uniforms[2])]
            d, h, w = (_around(box[axis], config.patch[axis], shape[axis], uniforms[3 + axis]) for axis in range(3))
            return d, h, w
    extra = 1 if config.random_starts == "all" else 0
    d, h, w = (_below(max(1, shape[axis] - config.patch[axis] + extra), uniforms[3 + axis]) for axis in range(3))
    return d, h, w


def _below(n: int, uniform: float) -> int:
    """A whole number from 0 to n - 1, even but for 2**-53 n."""
    return min(int(uniform * n), n - 1)


def _around(extent: tuple[int, int], patch: int, length: int, uniform: float) -> int:
    """Start of `patch` voxels around (or within) a component's extent, along one axis of `length` voxels."""
    start, stop = extent
    difference = abs(patch - (stop - start))
    before = _below(difference, uniform) if difference else 0
    after = difference - before
    if stop - start <= patch:
        low, high = max(0, start - before), min(length, stop + after)
    else:
        low, high = start + before, stop - after
    short = patch - (high - low)
    return low if low == 0 or short <= 0 else low - short
