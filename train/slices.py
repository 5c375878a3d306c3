"""Slices of held-out cases, kept with the run so that its page can be made again without data or model."""

from __future__ import annotations

import base64
import dataclasses
import io
import zipfile
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

from ingest.errors import ConfigError
from ingest.overlay import OPACITY, class_colour
from ingest.stores import open_store
from ingest.stores.base import Store

if TYPE_CHECKING:
    from .pictures import PredictedCase

SLICES_FILE = "slices.npz"
MOST_SLICES = 48  # of a case: with MOST_PIXELS it keeps a case below about 2 MB of page
MOST_PIXELS = 256  # along H and W
_BROKEN = (zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class CaseSlices:
    """Some slices of one case.

    Attributes:
        depths: (S,) int64, their indices along D, ascending.
        of_depths: D of the whole case.
        image: (S, H, W) uint8, grey from the 1st to the 99th percentile of the case.
        truth: (S, H, W) uint8.
        prediction: (S, H, W) uint8.
    """

    case_id: str
    depths: npt.NDArray[np.int64]
    of_depths: int
    image: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.uint8]
    prediction: npt.NDArray[np.uint8]


def slices_of(case: PredictedCase) -> CaseSlices:
    """Evenly spaced slices, every n-th pixel of them where they are large."""
    depth = len(case.image)
    depths = np.unique(np.linspace(0, depth - 1, min(depth, MOST_SLICES)).round().astype(np.int64))
    stride = -(-max(case.image.shape[1:]) // MOST_PIXELS)
    finite = case.image[np.isfinite(case.image)]
    low, high = np.percentile(finite, (1, 99)).tolist() if finite.size else (0.0, 1.0)
    picked_SHW = case.image[depths, ::stride, ::stride]
    grey_SHW = np.clip((np.nan_to_num(picked_SHW) - low) / max(high - low, 1e-6), 0, 1) * 255
    return CaseSlices(
        case.case_id,
        depths,
        depth,
        grey_SHW.astype(np.uint8),
        case.truth[depths, ::stride, ::stride].astype(np.uint8),
        case.prediction[depths, ::stride, ::stride].astype(np.uint8),
    )


def save_slices(store: Store, cases: Sequence[PredictedCase]) -> None:
    """Keep slices of these cases in RUN_DIR/slices.npz, in place of what was there."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for number, case in enumerate(map(slices_of, cases)):
        for name, value in vars(case).items():
            arrays[f"{number:04d}/{name}"] = np.asarray(value)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # NumPy's stub takes the names for its own options
    store.put(SLICES_FILE, file.getvalue())


def load_slices(run_dir: str) -> list[CaseSlices]:
    """The cases kept with the run; none of a run that kept none. Nothing is unpickled.

    Raises:
        ConfigError: RUN_DIR/slices.npz is damaged.
    """
    store = open_store(run_dir)
    for entry in store.list(SLICES_FILE):
        if entry.name == SLICES_FILE:
            body = store.fetch([entry])[0]
            try:
                with np.load(io.BytesIO(body), allow_pickle=False) as saved:
                    numbers = sorted({name.partition("/")[0] for name in saved.files})
                    return [
                        _case({name.partition("/")[2]: saved[name] for name in saved.files if name.startswith(number)})
                        for number in numbers
                    ]
            except (ValueError, TypeError, KeyError, AttributeError, EOFError, OSError, *_BROKEN) as error:
                raise ConfigError(
                    f"{store.uri_of(SLICES_FILE)}: expected slices that a run kept, found something else ({error})"
                ) from error
    return []


def _case(fields: dict[str, npt.NDArray[np.generic]]) -> CaseSlices:
    return CaseSlices(
        str(fields["case_id"]),
        fields["depths"].astype(np.int64),
        int(fields["of_depths"]),
        *(fields[name].astype(np.uint8) for name in ("image", "truth", "prediction")),
    )


def grey_png(image_HW: npt.NDArray[np.uint8]) -> str:
    """The slice as a PNG, base64."""
    return _png(Image.fromarray(image_HW))


def label_png(label_HW: npt.NDArray[np.uint8]) -> str:
    """The labels as a PNG to lay over the slice, base64: background is clear, each class has its colour."""
    height, width = label_HW.shape
    picture = Image.frombytes("P", (width, height), np.ascontiguousarray(label_HW).tobytes())
    colours = [(0, 0, 0), *(ImageColor.getrgb(class_colour(value))[:3] for value in range(1, 256))]
    picture.putpalette([part for colour in colours for part in colour])
    opacity = round(255 * OPACITY)
    return _png(picture, transparency=bytes([0, *[opacity] * 255]))


def _png(picture: Image.Image, **options: object) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True, **options)
    return base64.b64encode(file.getvalue()).decode()
