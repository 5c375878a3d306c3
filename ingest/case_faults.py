"""Finds all faults of a case. Decoding alone ends at the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy.typing as npt

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
    view_any,
)
from .errors import DecodeError, StoreError


class Look(NamedTuple):
    """The faults and the arrays of one case.

    Attributes:
        faults: all faults; empty for a good case.
        image: the image's voxels, of any real type and any shape; None if they cannot be read.
        label: (1, D, H, W) uint8, with any values; None if the label cannot be read or is no such array.
    """

    faults: list[DecodeError | StoreError]
    image: npt.NDArray[Any] | None
    label: LabelMap | None


def look_at(
    image: bytes | StoreError, label: bytes | StoreError, config: DecodeConfig, *, image_name: str, label_name: str
) -> Look:
    """Find all faults of a case.

    Args:
        image: the image's stored bytes, or the error of reading them.
        label: the label's stored bytes, or the error of reading them.
        config: the properties of a good case.
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
    """View an `.npy` of any real type and shape; None for anything else."""
    try:
        return view_any(data, *read_header(data, ""))
    except DecodeError:
        return None
