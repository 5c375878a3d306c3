"""One case and its names: what every source makes and what every output holds."""

from __future__ import annotations

import io
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..geometry import FOLDER, Affine

IMAGES = "images/"
LABELS = "labels/"


class Pair(NamedTuple):
    """One case's two volumes.

    Attributes:
        image: (1, D, H, W) float32, normalised.
        label: (1, D, H, W) uint8, classes 0, 1 and 2.
    """

    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.uint8]


class CaseSource(Protocol):
    """Where cases come from. Pickles, holds no open file, and makes a case alike in any process."""

    def make(self, case: int) -> Pair:
        """Make one case, a pure function of the source's settings and `case`.

        Raises:
            DecodeError: the case's input is not what it must be.
        """

    def affine(self, case: int) -> Affine:
        """Where the voxels that `make` gives lie: (4, 4), from (d, h, w, 1) to millimetres; see `geometry`.

        Raises:
            DecodeError: the case's input is not what it must be.
        """


def case_id(case: int, copy: int = 0) -> str:
    """The key of a case: ``case_00007``, and of its second copy ``case_00007_copy_00002``.

    Copy 0 is the case itself. `original_case_id` takes the copy's number off again.
    """
    return f"case_{case:05d}" if copy == 0 else f"case_{case:05d}_copy_{copy:05d}"


def original_case_id(key: str) -> str:
    """The case that `key` is, or is a copy of: ``case_00007`` of ``case_00007_copy_00002``.

    Copies have the same bytes. Whoever holds cases out of training must hold out all copies of each, or the
    held-out score is that of training cases.
    """
    return key.partition("_copy_")[0]


def image_name(case: int, copy: int = 0) -> str:
    """The image's object name below the output, ``images/case_00007_x.npy``."""
    return f"{IMAGES}{case_id(case, copy)}_x.npy"


def label_name(case: int, copy: int = 0) -> str:
    """The label's object name below the output, ``labels/case_00007_y.npy``."""
    return f"{LABELS}{case_id(case, copy)}_y.npy"


def geometry_name(case: int) -> str:
    """The name of what tells where its voxels lie, ``geometry/case_00000.json``; copies share it."""
    return f"{FOLDER}{case_id(case)}.json"


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """An array as the bytes of a ``.npy`` file, C order, never pickled."""
    sink = io.BytesIO()
    np.save(sink, np.ascontiguousarray(array), allow_pickle=False)
    return sink.getvalue()
