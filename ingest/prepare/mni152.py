"""Brains that differ as subjects do, out of one real one: the MNI ICBM152 T1 template that nilearn carries.

The template (1 mm, brain-extracted, so that "head" below means brain, with the stem cut where the template
ends) comes with probability maps of grey and white matter. Its label is 1 (grey) or 2 (white), by the larger
of the two maps where that is above one half, and 0 elsewhere. A case is that volume and its label pulled
through one smooth random map, at the resolution asked for, with a bias field, another contrast and noise.

Anti-aliasing: a case of 48 voxels an axis has voxels of about 4.5 mm. Image and label classes are therefore
averaged over a voxel first (Gaussian whose full width at half maximum, with the template's own voxel, is the
new voxel), and a voxel's label is the class that fills most of it. Applying the one-half rule to averaged
maps instead would call the seam of grey and white matter background.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DecodeError, MissingDependencyError
from ..geometry import Affine
from .case import Pair
from .kits19 import import_nibabel
from .resample import Shape

Vector = npt.NDArray[np.float64]

# Ranges of the random draws: of the spread between adult brains and how they lie in a scanner, rounded.
ROTATION_DEG = 10.0
SCALE = 0.08
SCALE_AN_AXIS = 0.05
SHEAR = 0.04
TRANSLATION_MM = 8.0
ELASTIC_POINTS = 8
ELASTIC_MM = 6.0
"""Standard deviation of the control points; the spline between them has about a third of it, 2 mm."""
BIAS_POINTS = 5
BIAS = 0.25
"""Standard deviation of the control points of the bias field's logarithm; the field itself has about 0.08."""
GAMMA = 0.2
NOISE = 0.02
"""The largest standard deviation of noise, as a share of the template's brightest voxel."""

MARGIN_MM = 12.0
"""Room for rotation and warp that the field of view has beside the largest head's extent."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """The averaged template, cut to the head, for one voxel size. Holds about 50 MB.

    Attributes:
        channels: image in [0, 1], share of grey matter, share of white matter: (D, H, W) float32 each, 1 mm;
            D from inferior to superior, H from posterior to anterior, W from left to right.
        outline_mm: (N, 3) float64, points whose convex hull is the head, from the middle of `channels`.
        voxel_mm: the edge of a case's voxel, alike along all axes.
    """

    channels: tuple[npt.NDArray[np.float32], ...]
    outline_mm: Vector
    voxel_mm: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mni152Source:
    """Makes cases out of the template. Case N depends on `seed`, `shape` and N alone. Pickles; thread-safe.

    Attributes:
        template: what `load_template` gave for the same shape.
        shape: the shape of every case.
        seed: which family of cases.
    """

    template: Template
    shape: Shape
    seed: int

    def make(self, case: int) -> Pair:
        """Draw subject number `case`.

        Returns:
            image (1, D, H, W) float32 of mean 0 and standard deviation 1; label (1, D, H, W) uint8.
        """
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, case], np.uint64)))
        return warp_template(self.template, self.shape, draw_subject(rng), rng)

    def affine(self, case: int) -> Affine:  # noqa: ARG002  all cases are drawn on one grid
        """The grid's, its middle at 0 mm: D upwards (z), H to the front (y), W to the right (x)."""
        matrix = np.zeros((4, 4))
        for axis, (row, size) in enumerate(zip((2, 1, 0), self.shape, strict=True)):
            matrix[row, axis] = self.template.voxel_mm
            matrix[row, 3] = -(size - 1) / 2 * self.template.voxel_mm
        matrix[3, 3] = 1
        return matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """How one subject differs from the template; independent of the resolution.

    Attributes:
        linear: (3, 3) from template mm to subject mm, both relative to their middles, axes D, H, W.
        place: (3,) in [-1, 1], where in the free room of the field of view the head lies.
        elastic_mm: (3, K, K, K) control points of the displacement along D, H and W.
        log_bias: (B, B, B) control points of the logarithm of the bias field.
        gamma: exponent of the intensities.
        noise: standard deviation of noise, template intensities being in [0, 1].
    """

    linear: Vector
    place: Vector
    elastic_mm: Vector
    log_bias: Vector
    gamma: float
    noise: float


def draw_subject(rng: np.random.Generator) -> Subject:
    """Draw one subject; all numbers come from `rng`, in a fixed order."""
    nod, roll, turn = np.deg2rad(rng.uniform(-ROTATION_DEG, ROTATION_DEG, 3))
    scales = np.exp(rng.uniform(-SCALE, SCALE)) * np.exp(rng.uniform(-SCALE_AN_AXIS, SCALE_AN_AXIS, 3))
    shear = np.eye(3)
    shear[np.triu_indices(3, 1)] = rng.uniform(-SHEAR, SHEAR, 3)
    rotation = _rotation(0, 1, nod) @ _rotation(0, 2, roll) @ _rotation(1, 2, turn)
    return Subject(
        linear=rotation @ shear @ np.diag(scales),
        place=rng.uniform(-1, 1, 3),
        elastic_mm=np.clip(rng.normal(0, ELASTIC_MM, (3, *[ELASTIC_POINTS] * 3)), -3 * ELASTIC_MM, 3 * ELASTIC_MM),
        log_bias=rng.normal(0, BIAS, [BIAS_POINTS] * 3),
        gamma=float(np.exp(rng.uniform(-GAMMA, GAMMA))),
        noise=float(rng.uniform(0, NOISE)),
    )


def warp_template(template: Template, shape_DHW: Shape, subject: Subject, rng: np.random.Generator) -> Pair:
    """Pull the template through the subject's map onto a grid of `shape_DHW`.

    A voxel at u mm from the grid's middle shows the template at ``linear^-1 (u - shift + elastic(u))``. No
    step goes through BLAS, whose sums depend on the number of threads: the same case has the same bytes in a Ray
    worker and in the driver.

    Args:
        template: for this shape.
        shape_DHW: of the case.
        subject: what to do.
        rng: for the voxels' noise only.

    Returns:
        As `Mni152Source.make`.
    """
    from scipy.ndimage import map_coordinates

    elastic_mm = [_spline(points, shape_DHW) for points in subject.elastic_mm]
    linear, shift_mm = _fit(template, shape_DHW, subject, reach_mm=[np.abs(field).max() for field in elastic_mm])
    back = np.linalg.inv(linear)
    grid_mm = np.ogrid[tuple(slice(0, size) for size in shape_DHW)]
    places_mm = [
        (axis - (size - 1) / 2) * template.voxel_mm - shift + field
        for axis, size, shift, field in zip(grid_mm, shape_DHW, shift_mm, elastic_mm, strict=True)
    ]
    middle = [(size - 1) / 2 for size in template.channels[0].shape]
    coordinates = np.stack(
        [sum((back[i, j] * places_mm[j] for j in range(3)), start=np.array(middle[i])) for i in range(3)]
    )
    image_DHW, grey_DHW, white_DHW = (
        map_coordinates(channel, coordinates, output=np.float32, order=1, mode="constant", cval=0.0)
        for channel in template.channels
    )
    label_DHW = np.argmax(np.stack([1 - grey_DHW - white_DHW, grey_DHW, white_DHW]), axis=0).astype(np.uint8)

    image_DHW = np.maximum(image_DHW, 0) ** np.float32(subject.gamma)
    image_DHW *= np.exp(_spline(subject.log_bias, shape_DHW)).astype(np.float32)
    image_DHW += np.float32(subject.noise) * rng.standard_normal(shape_DHW, dtype=np.float32)
    image_DHW -= image_DHW.mean(dtype=np.float64).astype(np.float32)
    image_DHW /= image_DHW.std(dtype=np.float64).astype(np.float32)
    return Pair(image_DHW[None], label_DHW[None])


@functools.lru_cache(maxsize=1)
def load_template(shape_DHW: Shape) -> Template:
    """Read the template and average it for cases of `shape_DHW`. Takes about 1 s; the last one is kept.

    The voxel is a cube, as large as the axis that has fewest voxels for the head's extent needs.

    Raises:
        MissingDependencyError: nilearn or nibabel is not installed, or nilearn carries no template.
        DecodeError: its files are not what they must be.
    """
    from scipy.ndimage import gaussian_filter

    t1, grey, white = (_read_map(name) for name in ("t1", "gm", "wm"))
    head = t1 > 0
    rows = [np.flatnonzero(head.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)]
    extent_mm = np.array([row[-1] - row[0] + 1 for row in rows])
    largest = np.exp(SCALE + SCALE_AN_AXIS)
    voxel_mm = float(((extent_mm * largest + MARGIN_MM) / np.asarray(shape_DHW)).max())
    sigma = np.sqrt(max(voxel_mm**2 - 1, 0.0) / (8 * np.log(2)))

    # Cut to the head with a rim on all sides into which the averaging may spread, and no further.
    rim = int(np.ceil(4 * sigma)) + 1
    cut = tuple(slice(row[0], row[-1] + 1) for row in rows)
    larger = np.maximum(grey, white)
    channels = (t1, (grey >= white) & (larger > 0.5), (white > grey) & (larger > 0.5))
    averaged = tuple(
        gaussian_filter(np.pad(channel[cut].astype(np.float32), rim), sigma, mode="constant", truncate=4.0)
        for channel in channels
    )
    for channel in averaged:
        channel.flags.writeable = False
    return Template(channels=averaged, outline_mm=_outline(head[cut]), voxel_mm=voxel_mm)


def _read_map(name: str) -> npt.NDArray[np.float32]:
    """One of nilearn's three files as (D, H, W) float32 in [0, 1]; nilearn itself is found, not imported."""
    spec = importlib.util.find_spec("nilearn")
    folders = list(spec.submodule_search_locations or []) if spec else []
    file = f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    paths = [path for folder in folders if (path := Path(folder) / "datasets" / "data" / file).is_file()]
    if not paths:
        found = f"nilearn in {folders[0]} without it" if folders else "nilearn not installed"
        raise MissingDependencyError(
            f"expected {file}, which nilearn carries, found {found}; pip install 'voxflux[demo]'"
        )
    nibabel = import_nibabel()
    try:
        # Stored (W, H, D), 1 mm, along RAS: transposed it is (D, H, W).
        volume: npt.NDArray[Any] = np.asarray(nibabel.load(paths[0]).dataobj).T
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise DecodeError(
            f"{paths[0]}: expected nilearn's template, found a file that cannot be read "
            f"({type(error).__name__}: {error}); reinstall nilearn",
            "not-nifti",
        ) from error
    return np.ascontiguousarray(volume, np.float32) / np.float32(volume.max())


def _outline(head_DHW: npt.NDArray[np.bool_]) -> Vector:
    """Both ends of every other row of the head along W, in mm from the middle: their hull is the head's."""
    depths, heights = np.nonzero(head_DHW.any(axis=2))
    depths, heights = depths[::2], heights[::2]
    rows = head_DHW[depths, heights]
    first, last = rows.argmax(axis=1), rows.shape[1] - 1 - rows[:, ::-1].argmax(axis=1)
    ends = np.concatenate([np.stack([depths, heights, column], axis=1) for column in (first, last)])
    return ends - (np.array(head_DHW.shape) - 1) / 2


def _fit(template: Template, shape_DHW: Shape, subject: Subject, *, reach_mm: list[float]) -> tuple[Vector, Vector]:
    """Where the head lies: wholly inside, a voxel from the border, however it was warped.

    Returns:
        The subject's linear map, made smaller where the head would not fit (1 in 10 at 48 voxels); and
        the head's shift in mm along D, H and W.
    """
    room_mm = (np.array(shape_DHW) - 2) * template.voxel_mm - 2 * np.array(reach_mm)
    moved_mm = np.einsum("ij,nj->ni", subject.linear, template.outline_mm)
    low_mm, high_mm = moved_mm.min(axis=0), moved_mm.max(axis=0)
    shrink = min(1.0, float((room_mm / (high_mm - low_mm)).min()))
    low_mm, high_mm = low_mm * shrink, high_mm * shrink
    free_mm = np.minimum((room_mm - (high_mm - low_mm)) / 2, TRANSLATION_MM)
    return subject.linear * shrink, subject.place * free_mm - (low_mm + high_mm) / 2


def _spline(points: Vector, shape_DHW: Shape) -> Vector:
    """The uniform cubic B-spline of (K, K, K) control points, at the voxels of a grid: (D, H, W) float64."""
    values = points
    for size in shape_DHW:  # each turn expands the leading axis and puts it last: D, H, W again after three
        values = np.einsum("ik,kab->abi", _spline_weights(points.shape[0], size), values)
    return values


def _spline_weights(points: int, size: int) -> Vector:
    """The weight of each control point at each voxel of one axis: (size, points) float64, rows sum to 1."""
    place = (np.arange(size) + 0.5) / size * (points - 3)
    first = np.minimum(place.astype(np.int64), points - 4)
    t = place - first
    four = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    weights = np.zeros((size, points))
    np.put_along_axis(weights, first[:, None] + np.arange(4), four, axis=1)
    return weights


def _rotation(first: int, second: int, angle: float) -> Vector:
    """The (3, 3) rotation by `angle` radians in the plane of two axes."""
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix
