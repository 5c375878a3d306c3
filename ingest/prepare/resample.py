"""Resampling of whole volumes onto another grid, with the conventions of the KiTS19 reference.

The reference resamples with ``torch.nn.functional.interpolate``. ingest imports no torch, so the two modes it
uses are written here after torch's documented definitions, index arithmetic in float32 included, since at
some sizes float32 and float64 pick different voxels. The tests hold both against torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import DecodeError

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]
_Scalar = TypeVar("_Scalar", bound=np.generic)


def resampled_shape(shape_DHW: Sequence[int], spacing_mm: Spacing, target_mm: Spacing) -> Shape:
    """The shape a volume has at another spacing: ``int(spacing / target * shape)``, cut and not rounded.

    Args:
        shape_DHW: voxels along each axis.
        spacing_mm: distance of neighbouring voxels along D, H and W.
        target_mm: the same of the new grid.

    Raises:
        DecodeError: an axis would have no voxel left.
    """
    ratio = np.asarray(spacing_mm, np.float64) / np.asarray(target_mm, np.float64)
    depth, height, width = (ratio * np.asarray(shape_DHW)).astype(np.int64).tolist()
    if min(depth, height, width) < 1:
        raise DecodeError(
            f"expected at least one voxel an axis after resampling, found {(depth, height, width)} from "
            f"shape {tuple(shape_DHW)} at {spacing_mm} mm; choose a --spacing below {target_mm} mm",
            "too-small",
        )
    return depth, height, width


def resample_linear(volume_DHW: npt.NDArray[np.float32], shape_DHW: Shape) -> npt.NDArray[np.float32]:
    """Trilinear, as torch's ``mode="trilinear", align_corners=True``: corner voxels stay where they are.

    Output voxel i of an axis lies at ``i * (in - 1) / (out - 1)``. The three axes are done one after the
    other, W and H slab by slab, so that beside input and output only one slab is held.

    Args:
        volume_DHW: (D, H, W) float32.
        shape_DHW: the shape wanted.

    Returns:
        An array of `shape_DHW`, float32. It is `volume_DHW` itself where the shape is already right.
    """
    if volume_DHW.shape == shape_DHW:
        return volume_DHW
    depth, height, width = shape_DHW
    flat = np.empty((volume_DHW.shape[0], height, width), np.float32)
    for slab_HW, out_HW in zip(volume_DHW, flat, strict=True):
        out_HW[...] = _linear_along(_linear_along(slab_HW, 1, width), 0, height)
    if volume_DHW.shape[0] == depth:
        return flat
    below, above, weight = _linear_taps(volume_DHW.shape[0], depth)
    result = np.empty(shape_DHW, np.float32)
    for d in range(depth):
        np.multiply(flat[below[d]], np.float32(1) - weight[d], out=result[d])
        result[d] += flat[above[d]] * weight[d]
    return result


def resample_nearest(volume_DHW: npt.NDArray[_Scalar], shape_DHW: Shape) -> npt.NDArray[_Scalar]:
    """As torch's ``mode="nearest"``: output voxel i of an axis takes voxel ``floor(i * (in / out))``.

    Args:
        volume_DHW: (D, H, W), any dtype.
        shape_DHW: the shape wanted.

    Returns:
        A new array of `shape_DHW` and the dtype given.
    """
    taps = [_nearest_taps(size, wanted) for size, wanted in zip(volume_DHW.shape, shape_DHW, strict=True)]
    return np.ascontiguousarray(volume_DHW[np.ix_(*taps)])


def pad_edge(volume_DHW: npt.NDArray[_Scalar], minimum_DHW: Shape) -> npt.NDArray[_Scalar]:
    """Repeat the outermost voxels until every axis has its minimum; an odd remainder goes behind.

    Args:
        volume_DHW: (D, H, W), any dtype.
        minimum_DHW: voxels each axis must have at least. Longer axes stay as they are.
    """
    lacking = [max(0, least - size) for size, least in zip(volume_DHW.shape, minimum_DHW, strict=True)]
    return np.pad(volume_DHW, [(lack // 2, lack - lack // 2) for lack in lacking], mode="edge")


def _linear_taps(size: int, wanted: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.float32]]:
    """For each output voxel: the two input voxels it lies between, and the weight of the second."""
    step = np.float32(size - 1) / np.float32(wanted - 1) if wanted > 1 else np.float32(0)
    place = np.arange(wanted, dtype=np.float32) * step
    below = np.minimum(place.astype(np.int64), size - 1)
    return below, np.minimum(below + 1, size - 1), np.clip(place - below.astype(np.float32), 0, 1)


def _linear_along(plane: npt.NDArray[np.float32], axis: int, wanted: int) -> npt.NDArray[np.float32]:
    """Resample one axis of a 2-D plane."""
    size = plane.shape[axis]
    if size == wanted:
        return plane
    below, above, weight = _linear_taps(size, wanted)
    if axis == 0:
        weight = weight[:, None]
    result = plane.take(below, axis) * (np.float32(1) - weight)
    result += plane.take(above, axis) * weight
    return result


def _nearest_taps(size: int, wanted: int) -> npt.NDArray[Any]:
    """The input voxel of each output voxel."""
    if size == wanted:
        return np.arange(size)
    step = np.float32(size) / np.float32(wanted)
    places = np.floor(np.arange(wanted, dtype=np.float32) * step).astype(np.int64)
    taps: npt.NDArray[Any] = np.minimum(places, size - 1)
    return taps
