"""Resampling of whole volumes onto another grid, in two ways.

``grid`` puts image and label on one grid: output voxel i of an axis lies at the same place of the source for both
(`grid_places`). The image is interpolated there (`linear_at`); the label takes the class that has most of the same
interpolation's weight (`label_at`). Neighbouring voxels are exactly as far apart as asked for, and the middle of the
volume stays where it is.

``mlperf`` is what MLPerf's U-Net3D reference does (``preprocess_dataset.py`` of mlcommons/training,
retired_benchmarks/unet3d/pytorch), and what its published result was trained and scored on. The image keeps its
corner voxels: output voxel i lies at ``i * (in - 1) / (out - 1)`` (`resample_linear`). The label takes voxel
``floor(i * in / out)`` (`resample_nearest`), which lies about half a source voxel before it. The reference calls
``torch.nn.functional.interpolate``. ingest imports no torch, so both modes are written here after torch's documented
definitions, index arithmetic in float32 included, since at some sizes float32 and float64 pick different voxels. The
tests hold both against torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import DecodeError

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]
Resample = Literal["grid", "mlperf"]
Places = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""For each axis, the places of the output voxels in the source, in source voxels."""

SLACK = 1e-3
"""Tolerance in voxels, because headers hold spacings as float32 and 0.8 mm is read as 0.80000001 mm. A place of the
output that is this near to a source voxel, or to the middle between two, is moved there. A size that is this near to a
whole number is that number. Two classes whose shares of a voxel differ by no more than this count as equal."""

_Scalar = TypeVar("_Scalar", bound=np.generic)


def resampled_shape(
    shape_DHW: Sequence[int], spacing_mm: Spacing, target_mm: Spacing, resample: Resample = "mlperf"
) -> Shape:
    """Return the shape of a volume at another spacing: ``spacing / target * shape``, cut and not rounded.

    Spacings come from a header's float32, so 16 voxels of 0.9 mm are 11.9999997 voxels of 1.2 mm. MLPerf's formula
    cuts them to 11. `grid` takes a size within `SLACK` of a whole number for that number, here 12.

    Args:
        shape_DHW: voxels along each axis.
        spacing_mm: distance of neighbouring voxels along D, H and W.
        target_mm: the same of the new grid.
        resample: the mode, whose rule applies.

    Raises:
        DecodeError: an axis would have no voxel left.
    """
    ratio = np.asarray(spacing_mm, np.float64) / np.asarray(target_mm, np.float64)
    slack = SLACK if resample == "grid" else 0.0
    depth, height, width = (ratio * np.asarray(shape_DHW) + slack).astype(np.int64).tolist()
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
    taps = [
        None if size == wanted else _linear_taps(size, wanted)
        for size, wanted in zip(volume_DHW.shape, shape_DHW, strict=True)
    ]
    return _interpolate(volume_DHW, taps, shape_DHW)


def grid_places(shape_DHW: Sequence[int], wanted_DHW: Shape, step_DHW: Sequence[float]) -> Places:
    """Return the places of the output grid's voxels in the source. Image and label share these places.

    Output voxel i of an axis lies at ``(in - 1) / 2 + (i - (out - 1) / 2) * step``: the grid is centred on the source.
    Places within `SLACK` of a multiple of half a voxel are moved onto it, so voxels are copied unchanged if the spacing
    does not change.

    Args:
        shape_DHW: the source's voxels along each axis.
        wanted_DHW: the output's.
        step_DHW: distance of neighbouring output voxels, in source voxels.
    """
    depth, height, width = (
        snapped((size - 1) / 2 + (np.arange(wanted) - (wanted - 1) / 2) * step)
        for size, wanted, step in zip(shape_DHW, wanted_DHW, step_DHW, strict=True)
    )
    return depth, height, width


def snapped(place: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """Return the places, with those within `SLACK` of a multiple of half a voxel moved onto it."""
    half = np.rint(2 * place) / 2
    return np.where(np.abs(place - half) <= SLACK, half, place)


def linear_at(volume_DHW: npt.NDArray[np.float32], places: Places) -> npt.NDArray[np.float32]:
    """Interpolate trilinearly at `places`. Places beyond the outermost voxels take the values of those voxels.

    Args:
        volume_DHW: (D, H, W) float32.
        places: of the output's voxels.

    Returns:
        A new array (len of each axis of `places`), float32.
    """
    depth, height, width = map(len, places)
    taps = [_taps_at(size, place) for size, place in zip(volume_DHW.shape, places, strict=True)]
    return _interpolate(volume_DHW, taps, (depth, height, width))


def label_at(label_DHW: npt.NDArray[np.uint8], places: Places) -> npt.NDArray[np.uint8]:
    """Return the class with the largest share of the trilinear weights at each of `places`.

    So the edge of a label lies where an image of the same structure crosses one half. The nearest voxel could be half a
    voxel off along each axis. For equal shares see `largest`.

    Args:
        label_DHW: (D, H, W) uint8.
        places: of the output's voxels.

    Returns:
        A new array (len of each axis of `places`), uint8; each of its values occurs in `label_DHW`.
    """
    below, above, weight = _taps_at(label_DHW.shape[0], places[0])
    rows, columns = (_taps_at(size, place) for size, place in zip(label_DHW.shape[1:], places[1:], strict=True))
    shape_HW = len(places[1]), len(places[2])
    flat: list[tuple[int, npt.NDArray[np.float32]]] = []
    for value in labels_in(label_DHW):
        share = np.zeros((label_DHW.shape[0], *shape_HW), np.float32)
        for label_HW, out_HW in zip(label_DHW, share, strict=True):
            voxels_HW = label_HW == value
            if voxels_HW.any():
                out_HW[...] = _linear_along(_linear_along(voxels_HW, 1, columns), 0, rows)
        flat.append((value, share))
    result = np.empty((len(places[0]), *shape_HW), np.uint8)
    for d in range(len(result)):
        shares = [(v, share[below[d]] * (np.float32(1) - weight[d]) + share[above[d]] * weight[d]) for v, share in flat]
        result[d] = largest(shares, shape_HW, odd=d % 2)
    return result


def labels_in(label_DHW: npt.NDArray[np.uint8]) -> list[int]:
    """Return the values above 0 in a label, in ascending order."""
    return [value for value in range(1, int(label_DHW.max(initial=0)) + 1) if (label_DHW == value).any()]


def largest(
    shares: Sequence[tuple[int, npt.NDArray[np.float32]]], shape_HW: tuple[int, int], odd: int
) -> npt.NDArray[np.uint8]:
    """Return the class with the largest share of each voxel of a slice.

    If two classes have equal shares, every second voxel takes the higher one, as on a chessboard. If all voxels took
    the same one, structures would grow or shrink by half a voxel on each side when the spacing doubles. The nearest
    voxel would shift them.

    Args:
        shares: each class above 0, in ascending order, and its share (H, W) of each voxel; the rest is class 0's.
        shape_HW: of the slice.
        odd: 1 to begin the chessboard with its other colour.

    Returns:
        The classes, (H, W) uint8.
    """
    result = np.zeros(shape_HW, np.uint8)
    most = np.float32(1) - sum((share for _, share in shares), start=np.zeros(shape_HW, np.float32))
    second = np.add.outer(np.arange(shape_HW[0]) + odd, np.arange(shape_HW[1])) % 2 == 1
    for value, share in shares:
        lead = share - most
        result[(lead > SLACK) | ((lead >= -SLACK) & second)] = value
        np.maximum(most, share, out=most)
    return result


_Taps = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.float32]]


def _interpolate(
    volume_DHW: npt.NDArray[np.float32], taps: Sequence[_Taps | None], shape_DHW: Shape
) -> npt.NDArray[np.float32]:
    """Interpolate along the three axes. Taps of None leave their axis unchanged."""
    depth, height, width = shape_DHW
    flat = np.empty((volume_DHW.shape[0], height, width), np.float32)
    for slab_HW, out_HW in zip(volume_DHW, flat, strict=True):
        out_HW[...] = _linear_along(_linear_along(slab_HW, 1, taps[2]), 0, taps[1])
    if taps[0] is None:
        return flat
    below, above, weight = taps[0]
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


def _taps_at(size: int, place: npt.NDArray[np.float64]) -> _Taps:
    """Return for each place the two voxels that it lies between, and the weight of the second."""
    inside = np.clip(place, 0, size - 1)
    below = np.floor(inside).astype(np.int64)
    return below, np.minimum(below + 1, size - 1), (inside - below).astype(np.float32)


def _linear_taps(size: int, wanted: int) -> _Taps:
    """For each output voxel: the two input voxels it lies between, and the weight of the second."""
    step = np.float32(size - 1) / np.float32(wanted - 1) if wanted > 1 else np.float32(0)
    place = np.arange(wanted, dtype=np.float32) * step
    below = np.minimum(place.astype(np.int64), size - 1)
    return below, np.minimum(below + 1, size - 1), np.clip(place - below.astype(np.float32), 0, 1)


def _linear_along(
    plane: npt.NDArray[np.float32] | npt.NDArray[np.bool_], axis: int, taps: _Taps | None
) -> npt.NDArray[Any]:
    """Resample one axis of a 2-D plane."""
    if taps is None:
        return plane
    below, above, weight = taps
    if axis == 0:
        weight = weight[:, None]
    result: npt.NDArray[np.float32] = plane.take(below, axis) * (np.float32(1) - weight)
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
