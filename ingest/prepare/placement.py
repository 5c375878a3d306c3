"""Checks by the affines of two headers that a label lies on its image, and resamples it onto the image's grid.

An affine takes voxel indices (d, h, w, 1) to millimetres (x, y, z, 1); see `geometry`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..geometry import Affine
from .resample import SLACK, labels_in, largest, snapped

PLACE_TOLERANCE = 0.1
"""Share of the smallest spacing. Image and label are on one grid if their corners lie nearer to each other than this.
Headers hold affines as float32 or as quaternions, so two tools write the same affine with corners about 1e-4 mm apart,
a hundredth of this. A label that is off by more than a tenth of a voxel was drawn on another grid."""


def corner_distance_mm(first: Affine, second: Affine, shape_DHW: Sequence[int]) -> float:
    """Return the largest distance, in mm, between the places of a volume's corner voxel by two affines."""
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)], np.float64)
    corners[:, :3] *= np.asarray(shape_DHW, np.float64) - 1
    apart_mm = ((first - second) @ corners.T)[:3]
    return float(np.sqrt((apart_mm**2).sum(axis=0)).max())


def count_outside(
    label_DHW: npt.NDArray[np.uint8], label_affine: Affine, image_affine: Affine, shape_DHW: Sequence[int]
) -> int:
    """Return the number of labelled voxels that touch no voxel of an image.

    Args:
        label_DHW: (D, H, W) uint8; voxels above 0 count.
        label_affine: of the label.
        image_affine: of the image; it must be invertible.
        shape_DHW: of the image.
    """
    change = np.linalg.inv(image_affine) @ label_affine
    reach = np.abs(change[:3, :3]).sum(axis=1, keepdims=True) / 2 + 0.5 - SLACK  # half of either voxel's extent
    last = np.reshape(shape_DHW, (3, 1)) - 1.0
    count = 0
    for d, label_HW in enumerate(label_DHW):  # a slice at a time, since indices take 24 bytes a voxel
        h, w = np.nonzero(label_HW)
        at = change[:3, :3] @ np.stack([np.full_like(h, d), h, w]) + change[:3, 3:]
        count += int(((at < -reach) | (at > last + reach)).any(axis=0).sum())
    return count


def onto_grid(
    label_DHW: npt.NDArray[np.uint8], label_affine: Affine, image_affine: Affine, shape_DHW: Sequence[int]
) -> npt.NDArray[np.uint8]:
    """Resample a label onto an image's grid, in world coordinates.

    Each voxel takes the class with the largest share of the label's trilinear weights there (see `largest`), and 0
    outside the label. The result is exact if the two grids differ only by flips and exchanged axes.

    Args:
        label_DHW: (D, H, W) uint8.
        label_affine: of the label; it must be invertible.
        image_affine: of the image.
        shape_DHW: of the image.

    Returns:
        (D, H, W) uint8, of the image's shape.
    """
    from scipy.ndimage import map_coordinates

    change = np.linalg.inv(label_affine) @ image_affine
    depth, height, width = shape_DHW
    classes = [(value, label_DHW == value) for value in labels_in(label_DHW)]
    result = np.empty((depth, height, width), np.uint8)
    hw1 = np.stack(np.broadcast_arrays(np.arange(height)[:, None], np.arange(width)[None, :], 1.0))
    in_plane = np.tensordot(change[:3, 1:], hw1, axes=1)
    for d in range(depth):  # a slice at a time, since coordinates take 24 bytes a voxel
        at = snapped(in_plane + change[:3, 0, None, None] * d)
        shares = [
            (value, map_coordinates(voxels, at, output=np.float32, order=1, mode="grid-constant"))
            for value, voxels in classes
        ]
        result[d] = largest(shares, (height, width), odd=d % 2)
    return result
