"""Where a case's voxels lie in the scanner: kept beside prepared cases, and put into label maps as NIfTI.

A place prepared by `voxflux prepare` has `geometry/case_00000.json` beside `images/`: the affine of the
prepared grid. It takes voxel indices (d, h, w, 1) to millimetres (x, y, z, 1), x to the right, y to the front, z
upwards, as NIfTI has it.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import ConfigError, MissingDependencyError, PlaceNotFoundError
from .gunzip import uncompressed
from .names import same_form
from .stores.base import ObjectMeta, StoreConfig, open_store
from .subjects import COPY_PATTERN

FOLDER = "geometry/"

Affine: TypeAlias = npt.NDArray[np.float64]
"""(4, 4) float64."""


def resampled_affine(
    affine: Affine,
    before_DHW: Sequence[int],
    after_DHW: Sequence[int],
    padded_DHW: Sequence[int],
    step_DHW: Sequence[float] | None = None,
) -> Affine:
    """Return the affine of a grid that was resampled, and padded by half on each side.

    Voxel i of the padded grid is voxel i - p of the resampled grid; p is half of the padding, rounded down. In the
    first grid it lies at ``start + (i - p) * step``. For the two kinds of grid see `prepare.resample`.

    Args:
        affine: of the grid before.
        before_DHW: its shape.
        after_DHW: shape after resampling.
        padded_DHW: shape after padding.
        step_DHW: distance of neighbouring voxels after resampling, in voxels before, on a grid with the same middle
            (`--resample grid`). None: the corners were kept (the image of `--resample mlperf`).
    """
    sizes = list(zip(before_DHW, after_DHW, strict=True))
    if step_DHW is None:
        step_DHW = [(before - 1) / (after - 1) if after > 1 else 1.0 for before, after in sizes]
        starts = [0.0, 0.0, 0.0]
    else:
        starts = [
            (before - 1) / 2 - (after - 1) / 2 * step for (before, after), step in zip(sizes, step_DHW, strict=True)
        ]
    change = np.diag([*step_DHW, 1.0])
    pads = [(padded - after) // 2 for padded, after in zip(padded_DHW, after_DHW, strict=True)]
    change[:3, 3] = [start - pad * step for start, pad, step in zip(starts, pads, step_DHW, strict=True)]
    return affine @ change


def to_json(affine: Affine) -> bytes:
    """Return the sidecar's bytes.

    Raises:
        ValueError: the affine has numbers that are not finite, which JSON cannot hold.
    """
    return json.dumps({"affine": affine.tolist()}, allow_nan=False).encode() + b"\n"


def from_json(data: bytes, name: str) -> Affine:
    """Read what `to_json` wrote.

    Raises:
        ConfigError: it is something else.
    """
    try:
        affine = np.array(json.loads(uncompressed(data))["affine"], dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError(f"shape {affine.shape}")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{name}: expected a JSON object with `affine`, 4 x 4 finite numbers, found something else ({error}); "
            "prepare the case anew, or give another --geometry"
        ) from error
    return affine


def geometry_uri(images_uri: str) -> str | None:
    """The place beside images that `prepare` writes affines to; None where the images' folder is not `images`."""
    parent, _, folder = images_uri.rstrip("/").rpartition("/")
    return f"{parent}/{FOLDER}" if folder == "images" and parent else None


def list_geometry(uri: str, store: StoreConfig | None = None) -> dict[str, ObjectMeta]:
    """The affines that a place holds, by case id; none where there is no such place."""
    try:
        found = list(open_store(uri, store).list())
    except PlaceNotFoundError:
        return {}
    return {same_form(entry.name.removesuffix(".json")): entry for entry in found if entry.name.endswith(".json")}


def original(case_id: str) -> str:
    """The case that a copy is of: copies lie where it lies."""
    return re.sub(COPY_PATTERN, "", case_id)


def nifti_bytes(label_DHW: npt.NDArray[np.uint8], affine: Affine) -> bytes:
    """A label map as a gzipped NIfTI file, the same bytes each time.

    Raises:
        MissingDependencyError: nibabel is not installed.
    """
    try:
        import nibabel
    except ImportError as error:
        raise MissingDependencyError(
            "expected nibabel, which writes NIfTI files, found it not installed; pip install 'voxflux[demo]', or "
            "give --no-nifti"
        ) from error
    image = nibabel.Nifti1Image(label_DHW, affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    return gzip.compress(image.to_bytes(), mtime=0)
