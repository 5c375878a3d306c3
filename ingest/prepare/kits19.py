"""KiTS19 scans to training cases, by the formulas of MLPerf's U-Net3D benchmark.

Source of the formulas: ``preprocess_dataset.py`` of mlcommons/training (retired_benchmarks/unet3d/pytorch). One of
them is not followed by default: the reference puts the label half a source voxel away from its image, and
``--resample grid`` puts both on one grid. ``--resample mlperf`` follows the reference exactly; see `resample`.

Axes: KiTS19 stores its NIfTI arrays as (D, H, W), D along the body, and the header's ``pixdim[1:4]`` holds
the spacing of the same three axes in that order. Both are taken as they are stored, as the reference does; the
affine is not used to reorient the image. The label must lie on the image's grid by the two affines, or is put there
(`placement`). A NIfTI file written by another tool is usually (W, H, D) and would have to be transposed first.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import mistakes
from ..errors import DecodeError, EmptyListingError, MissingDependencyError, PairingError, PlaceNotFoundError
from ..geometry import Affine, resampled_affine
from .case import Pair, case_id
from .placement import PLACE_TOLERANCE, corner_distance_mm, count_outside, onto_grid
from .resample import (
    Resample,
    Shape,
    Spacing,
    grid_places,
    label_at,
    linear_at,
    pad_edge,
    resample_linear,
    resample_nearest,
    resampled_shape,
)

OnMismatch = Literal["fail", "resample"]

FIRST_UNLABELLED = 210
"""Cases from this one on are the challenge's test cases, published without labels."""

CLIP_HU = (-79.0, 304.0)
MEAN_HU = 101.0
STD_HU = 76.9
CLASSES = 3
SPACING_TOLERANCE = 0.01
"""Relative difference that the two spacings of a header may have, because tools round one of them."""

IMAGE_FILE = "imaging.nii.gz"
LABEL_FILE = "segmentation.nii.gz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kits19Source:
    """Makes cases out of a folder in KiTS19's layout. Deterministic; pickles; safe in threads.

    Attributes:
        folder: holds ``case_00000/imaging.nii.gz`` and ``case_00000/segmentation.nii.gz``; every node that
            makes cases must see it under this path.
        spacing_mm: of the resampled volumes, along D, H and W.
        shape: volumes smaller than this are padded up to it.
        resample: the grid of image and label; see the module `resample`.
        on_mismatch: treatment of a label that does not lie on its image's grid.
    """

    folder: str
    spacing_mm: Spacing
    shape: Shape
    resample: Resample = "grid"
    on_mismatch: OnMismatch = "fail"

    def make(self, case: int) -> Pair:
        """Read, resample, normalise and pad one case. See `preprocess` for the result.

        Raises:
            DecodeError: a file is no NIfTI volume, or the two do not fit together.
        """
        folder = Path(self.folder) / case_id(case)
        image_DHW, label_DHW, spacing_mm = load_pair(folder, self.on_mismatch)
        try:
            return preprocess(image_DHW, label_DHW, spacing_mm, self.spacing_mm, self.shape, self.resample)
        except DecodeError as error:
            raise DecodeError(f"{folder}: {error}", error.reason) from None

    def affine(self, case: int) -> Affine:
        """Return the affine of the prepared image, computed from the header of the scan.

        With ``--resample mlperf`` the prepared label lies about half a source voxel away from it.

        Raises:
            DecodeError: the file is no NIfTI volume.
        """
        volume = _open_volume(Path(self.folder) / case_id(case) / IMAGE_FILE)
        same = volume.pixdim_mm == self.spacing_mm
        resampled = (
            volume.shape if same else resampled_shape(volume.shape, volume.pixdim_mm, self.spacing_mm, self.resample)
        )
        padded = [max(size, least) for size, least in zip(resampled, self.shape, strict=True)]
        step = _steps(volume.pixdim_mm, self.spacing_mm) if self.resample == "grid" else None
        return resampled_affine(volume.affine, volume.shape, resampled, padded, step)


def preprocess(
    image_DHW: npt.NDArray[np.float32],
    label_DHW: npt.NDArray[np.uint8],
    spacing_mm: Spacing,
    target_mm: Spacing,
    minimum_DHW: Shape,
    resample: Resample = "grid",
) -> Pair:
    """Resample, clip, normalise and pad, in this order.

    Args:
        image_DHW: (D, H, W) float32, Hounsfield units. Not changed.
        label_DHW: (D, H, W) uint8.
        spacing_mm: of the two, along D, H and W.
        target_mm: of the result.
        minimum_DHW: the result has at least this shape.
        resample: the grid of image and label.

    Returns:
        image (1, D, H, W) float32 in [-2.34, 2.64]; label (1, D, H, W) uint8.

    Raises:
        DecodeError: the volume vanishes at the target spacing.
    """
    if spacing_mm != target_mm:
        shape_DHW = resampled_shape(image_DHW.shape, spacing_mm, target_mm, resample)
        if resample == "grid":
            places = grid_places(image_DHW.shape, shape_DHW, _steps(spacing_mm, target_mm))
            image_DHW, label_DHW = linear_at(image_DHW, places), label_at(label_DHW, places)
        else:
            image_DHW, label_DHW = resample_linear(image_DHW, shape_DHW), resample_nearest(label_DHW, shape_DHW)
    image_DHW = np.clip(image_DHW, *CLIP_HU)
    image_DHW -= MEAN_HU
    image_DHW /= STD_HU
    return Pair(pad_edge(image_DHW, minimum_DHW)[None], pad_edge(label_DHW, minimum_DHW)[None])


def _steps(spacing_mm: Spacing, target_mm: Spacing) -> list[float]:
    """Return the distance of neighbouring voxels of the prepared grid, in voxels of the scan."""
    return [target / spacing for spacing, target in zip(spacing_mm, target_mm, strict=True)]


def find_cases(folder: str) -> list[int]:
    """The numbers of the labelled cases (below 210) that `folder` holds, in order.

    Raises:
        PlaceNotFoundError: the folder does not exist.
        EmptyListingError: it holds no case.
    """
    root = Path(folder)
    if not root.is_dir():
        raise PlaceNotFoundError(
            f"expected the folder of KiTS19 that holds case_00000, case_00001, ...; found no folder "
            f"{folder!r}; check --input"
        )
    entries = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    numbers = [int(name[5:]) for name in entries if re.fullmatch(r"case_\d{5}", name)]
    labelled = [number for number in numbers if number < FIRST_UNLABELLED]
    if not labelled:
        found = f"{len(entries)} other folders, first {entries[:3]}" if entries else "no folder at all"
        raise EmptyListingError(
            f"{folder}: expected folders case_00000 to case_00209, found {found}; "
            "give --input the `data` folder of a KiTS19 checkout"
        )
    return labelled


def check_files(folder: str, cases: Sequence[int]) -> None:
    """Refuse, before any work, cases that lack one of their two files.

    Raises:
        PairingError: with the count and the first few names.
    """
    wanted = [f"{case_id(case)}/{name}" for case in cases for name in (IMAGE_FILE, LABEL_FILE)]
    missing = [name for name in wanted if not (Path(folder) / name).is_file()]
    if missing:
        raise PairingError(
            f"{folder}: expected {IMAGE_FILE} and {LABEL_FILE} in each of {len(cases)} cases, found "
            f"{len(missing)} files missing, first: {', '.join(missing[:3])}; download them (KiTS19's "
            "`python -m starter_code.get_imaging` brings the images) or move these cases away"
        )


def load_pair(
    folder: Path, on_mismatch: OnMismatch = "fail"
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], Spacing]:
    """Read one case and check it.

    Args:
        folder: of the case.
        on_mismatch: treatment of a label whose shape or affine is not the image's. "fail" refuses the case. "resample"
            puts the label onto the image's grid in world coordinates (`placement.onto_grid`).

    Returns:
        image (D, H, W) float32; label (D, H, W) uint8; the image's spacing in mm along D, H and W.

    Raises:
        DecodeError: unreadable, not 3-D, a voxel that is not finite, a label outside 0 to 2, a spacing that is not
            above 0 or not the affine's, a label that does not lie on its image's grid, or, with "resample", one of
            which a part lies outside the image.
        MissingDependencyError: nibabel is not installed.
    """
    image_path, label_path = folder / IMAGE_FILE, folder / LABEL_FILE
    volume = _open_volume(image_path, data=True)
    image_raw, pixdim = volume.data, volume.pixdim_mm
    label = _open_volume(label_path, data=True)
    label_raw = label.data
    if not all(np.isfinite(size) and size > 0 for size in pixdim):
        raise DecodeError(
            f"{image_path}: expected a spacing above 0 mm along every axis, found {pixdim}; repair the header",
            "spacing",
        )
    for path, found in ((image_path, volume), (label_path, label)):
        _check_affine(path, found)
    moved = not _on_one_grid(folder, volume, label, on_mismatch)
    image_DHW = image_raw.astype(np.float32)
    if not np.isfinite(image_DHW).all():
        bad = int(image_DHW.size - np.isfinite(image_DHW).sum())
        raise DecodeError(
            f"{image_path}: expected finite voxels, found {bad} NaN or infinite ones; fetch the file anew",
            "not-finite",
        )
    if not np.isin(label_raw, range(CLASSES)).all():
        others = np.setdiff1d(label_raw, np.arange(CLASSES))
        raise DecodeError(
            f"{label_path}: expected the labels 0, 1 and 2, found also {others[:5].tolist()}; "
            f"{mistakes.label_advice(mistakes.look_at(label_raw), CLASSES, fixed=True)}",
            "label-range",
        )
    label_DHW = label_raw.astype(np.uint8)
    if moved:
        outside = count_outside(label_DHW, label.affine, volume.affine, volume.shape)
        if outside:
            raise DecodeError(
                f"{label_path}: expected every labelled voxel inside the image, found {outside:,} of "
                f"{np.count_nonzero(label_DHW):,} outside: image {_printed(volume)}; label {_printed(label)}; find the "
                "segmentation of this scan, or repair the header that is wrong; if the image was cut out of a larger "
                "scan, set the label's voxels beyond it to 0",
                "affine-mismatch",
            )
        label_DHW = onto_grid(label_DHW, label.affine, volume.affine, volume.shape)
    return image_DHW, label_DHW, pixdim


def _check_affine(path: Path, volume: _Volume) -> None:
    """Refuse an affine that does not tell the places of voxels, or that contradicts pixdim.

    Raises:
        DecodeError: it is not finite, it cannot be inverted, or its spacing differs from pixdim by more than 1 %.
    """
    if not np.isfinite(volume.affine).all() or not abs(np.linalg.det(volume.affine)) > 0:
        raise DecodeError(
            f"{path}: expected a finite affine that can be inverted, found {volume.affine.tolist()}; repair the header",
            "affine",
        )
    spacing_mm = np.linalg.norm(volume.affine[:3, :3], axis=0)
    if not np.allclose(spacing_mm, volume.pixdim_mm, rtol=SPACING_TOLERANCE, atol=0):
        raise DecodeError(
            f"{path}: expected one spacing in the header, found pixdim {np.round(volume.pixdim_mm, 4).tolist()} mm and "
            f"an affine with {np.round(spacing_mm, 4).tolist()} mm; --spacing goes by pixdim and the place of voxels "
            "by the affine: find out which is right and write it into both",
            "spacing",
        )


def _on_one_grid(folder: Path, image: _Volume, label: _Volume, on_mismatch: OnMismatch) -> bool:
    """Return whether image and label lie on one grid, within `PLACE_TOLERANCE`.

    Raises:
        DecodeError: they do not, and `on_mismatch` is "fail".
    """
    same_shape = image.shape == label.shape
    apart_mm = corner_distance_mm(image.affine, label.affine, image.shape)
    most_mm = PLACE_TOLERANCE * min(image.pixdim_mm)
    if same_shape and apart_mm <= most_mm:
        return True
    if on_mismatch == "resample":
        return False
    found = f"corners up to {apart_mm:.3f} mm apart" if same_shape else "two shapes"
    raise DecodeError(
        f"{folder}: expected image and label on one grid (of one shape, corners at most {most_mm:.3f} mm apart), found "
        f"{found}: image {_printed(image)}; label {_printed(label)}; if both headers are right, --on-mismatch resample "
        "puts the label onto the image's grid; if not, repair the header that is wrong or fetch the case anew",
        "affine-mismatch" if same_shape else "shape-mismatch",
    )


def _printed(volume: _Volume) -> str:
    return f"{volume.shape} with affine {np.round(volume.affine, 4).tolist()}"


class _Volume(NamedTuple):
    """One NIfTI file: its 3-D array, scaled as its header says where asked for, pixdim[1:4] in mm, and its affine."""

    shape: Shape
    data: npt.NDArray[Any]
    pixdim_mm: Spacing
    affine: Affine


def _open_volume(path: Path, *, data: bool = False) -> _Volume:
    nibabel = import_nibabel()
    try:
        file = nibabel.load(path)
        shape = tuple(file.shape)
        depth_mm, height_mm, width_mm = file.header["pixdim"][1:4].tolist()
        affine = np.asarray(file.affine, np.float64)
        whole = len(shape) == 3 and 0 not in shape
        array = np.asarray(file.dataobj) if whole and data else np.empty(0)
    except (
        nibabel.filebasedimages.ImageFileError,
        nibabel.spatialimages.HeaderDataError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        zlib.error,
    ) as error:
        raise DecodeError(
            f"{path}: expected a gzipped NIfTI volume, found one that cannot be read "
            f"({type(error).__name__}: {error}); fetch it anew",
            "not-nifti",
        ) from error
    if not whole:
        raise DecodeError(
            f"{path}: expected a 3-D volume (D, H, W) with voxels, found shape {shape}; take the wanted scan out of a "
            "series of scans; of a one-hot label, take the argmax along the axis of the classes",
            "not-3d",
        )
    return _Volume(shape, array, (depth_mm, height_mm, width_mm), affine)


def import_nibabel() -> ModuleType:
    """Import nibabel, which only preparing needs.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import nibabel
    except ImportError as error:
        raise MissingDependencyError(
            "expected nibabel, which reads NIfTI files, found it not installed; pip install 'voxflux[demo]'"
        ) from error
    module: ModuleType = nibabel
    return module
