"""Everything that is wrong with one case, where decoding it ends at the first fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import gunzip
from .decode import (
    IMAGE_DTYPE,
    LABEL_DTYPE,
    DecodeConfig,
    LabelMap,
    check_channels,
    check_finite,
    check_values,
    decode_case,
    read_array,
    read_header,
)
from .errors import DecodeError, StoreError


class Look(NamedTuple):
    """What looking at one case found.

    Attributes:
        faults: all that is wrong with it, none for a good case.
        image: its voxels of whatever real type and shape they are; None where they cannot be had.
        label: (1, D, H, W) uint8, with any values; None where it is no such label.
    """

    faults: list[DecodeError | StoreError]
    image: npt.NDArray[Any] | None
    label: LabelMap | None


def look_at(
    image: bytes | StoreError, label: bytes | StoreError, config: DecodeConfig, *, image_name: str, label_name: str
) -> Look:
    """Find all faults of a case.

    Args:
        image: the image's stored bytes, or why they cannot be had.
        label: the same of the label.
        config: what a good case looks like.
        image_name: the image's URI, for messages.
        label_name: the label's URI, for messages.
    """
    faults: dict[str, DecodeError | StoreError] = {}

    def attempt(check: Callable[[], object]) -> Any:
        try:
            return check()
        except DecodeError as error:
            faults.setdefault(str(error), error)
            return None

    if isinstance(image, bytes) and isinstance(label, bytes):
        whole = attempt(lambda: decode_case(image, label, config, image_name=image_name, label_name=label_name))
        if whole is not None:
            return Look([], *whole)
    for body in (image, label):
        if isinstance(body, StoreError):
            faults[str(body)] = body
    image_CDHW = label_1DHW = None
    if isinstance(image, bytes):
        image_CDHW = attempt(lambda: read_array(image, image_name, IMAGE_DTYPE))
    if isinstance(label, bytes):
        label_1DHW = attempt(lambda: read_array(label, label_name, LABEL_DTYPE))
    if label_1DHW is not None:
        attempt(lambda: check_values(label_1DHW, config, label_name))
    if image_CDHW is not None:
        attempt(lambda: check_channels(image_CDHW.shape, config, image_name))
        attempt(lambda: check_finite(image_CDHW, image_name))
    voxels = image_CDHW if image_CDHW is not None or isinstance(image, StoreError) else _any_array(image)
    return Look(list(faults.values()), voxels, label_1DHW)


def _any_array(data: bytes) -> npt.NDArray[Any] | None:
    """An `.npy` of any real type and shape, e.g. an int16 CT scan; None for anything else."""
    try:
        header, offset = read_header(data, "")
        count = math.prod(header.shape)
        expected_bytes = offset + count * header.dtype.itemsize
        if header.dtype.kind not in "biuf" or not count or expected_bytes > gunzip.MOST_BYTES:
            return None
        body = gunzip.uncompressed(data, expected_bytes)
    except (DecodeError, ValueError):
        return None
    if len(body) != expected_bytes:
        return None
    flat = np.frombuffer(body, dtype=header.dtype, count=count, offset=offset)
    return flat.reshape(header.shape, order="F" if header.fortran_order else "C")
