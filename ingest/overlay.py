"""Pictures of cases: a slice of the image with its labels laid over it.

Figures are built as objects, never through pyplot's global state, so that any thread or worker may draw.
Colours are Okabe and Ito's, told apart by colour-blind readers (https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
"""Of classes 1, 2, 3, ...; from the start again after the seventh."""

OPACITY = 0.5
"""Of a label over the image, 0 to 1."""

_COLUMNS = 4  # cases side by side: legible on a laptop's screen
_PANEL_INCHES = 3.0


def class_colour(value: int) -> str:
    """The colour of class `value`, 1 or more, as `#RRGGBB`."""
    return COLOURS[(value - 1) % len(COLOURS)]


def informative_slice(label_DHW: npt.NDArray[Any]) -> int:
    """The D index of the slice to show: near the middle, among those that show the most.

    Of the slices with the most classes present, those with at least 0.8 of the largest foreground among them are
    candidates, and the one nearest the middle is taken; the middle itself if there is no foreground.

    Args:
        label_DHW: (D, H, W) integers, 0 for background.

    Returns:
        An index along D.
    """
    classes = [value for value in np.unique(label_DHW).tolist() if value != 0]
    counts_KD = np.array([(label_DHW == value).sum(axis=(1, 2)) for value in classes]).reshape(-1, len(label_DHW))
    present_D = (counts_KD > 0).sum(axis=0)
    foreground_D = counts_KD.sum(axis=0) * (present_D == present_D.max())
    candidates = np.flatnonzero(foreground_D >= 0.8 * foreground_D.max())
    middle = (len(label_DHW) - 1) / 2
    return int(candidates[np.abs(candidates - middle).argmin()])


def draw_slice(
    axes: Axes, image_HW: npt.NDArray[Any], label_HW: npt.NDArray[Any] | None = None, title: str = ""
) -> None:
    """Draw one slice in grey, with labels over it if given.

    Grey runs from the 1st to the 99th percentile of the slice, so that a few bright voxels do not darken it.

    Args:
        axes: Where to draw; its ticks are taken off.
        image_HW: (H, W) numbers; voxels that are not finite are left blank.
        label_HW: (H, W) integers, 0 for background; None for the image alone.
        title: Written above, literally (a `$` starts no formula).
    """
    finite = image_HW[np.isfinite(image_HW)]
    low, high = np.percentile(finite, (1, 99)).tolist() if finite.size else (0.0, 1.0)
    axes.imshow(image_HW, cmap="gray", vmin=low, vmax=max(high, np.nextafter(low, np.inf)), interpolation="nearest")
    if label_HW is not None:
        from matplotlib.colors import to_rgba

        overlay_HW4 = np.zeros((*label_HW.shape, 4), np.float32)
        for value in np.unique(label_HW).tolist():
            if value != 0:
                overlay_HW4[label_HW == value] = to_rgba(class_colour(value), OPACITY)
        axes.imshow(overlay_HW4, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9, parse_math=False)


def add_legend(figure: Figure, classes: Iterable[int]) -> None:
    """A legend of the classes' colours below the figure's panels; nothing if there are none."""
    from matplotlib.patches import Patch

    handles = [Patch(color=class_colour(value), alpha=OPACITY, label=f"class {value}") for value in classes]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False)


def save_figure(figure: Figure, path: Path | str) -> None:
    """Write the figure as PNG, making its folder; characters that the font lacks are drawn as boxes, in silence."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasAgg(figure).print_figure(place, format="png", dpi=120)


def draw_overlays(cases: Sequence[tuple[str, npt.NDArray[Any], npt.NDArray[Any]]], path: Path | str) -> None:
    """A grid of cases, each a slice of its first channel with its labels.

    Args:
        cases: (case id, image (C, D, H, W), label (1, D, H, W)); at least one.
        path: The PNG to write; its folder is made.

    Raises:
        ConfigError: if there is no case, or an image and its label do not fit each other.
    """
    if not cases:
        raise ConfigError("expected one case or more to draw; found none; give a larger sample")
    for case_id, image_CDHW, label_1DHW in cases:
        if image_CDHW.ndim != 4 or label_1DHW.shape != (1, *image_CDHW.shape[1:]):
            raise ConfigError(
                f"{case_id}: expected an image (C, D, H, W) and a label (1, D, H, W) of the same D, H, W; "
                f"found {image_CDHW.shape} and {label_1DHW.shape}"
            )
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(cases))
    rows = math.ceil(len(cases) / columns)
    figure = Figure(figsize=(columns * _PANEL_INCHES, rows * _PANEL_INCHES + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    present: set[int] = set()
    for axes, (case_id, image_CDHW, label_1DHW) in zip(panels, cases, strict=False):
        depth = informative_slice(label_1DHW[0])
        label_HW = label_1DHW[0, depth]
        present.update(np.unique(label_HW).tolist())
        draw_slice(axes, image_CDHW[0, depth], label_HW, f"{case_id}, slice {depth} of {label_1DHW.shape[1]}")
    for axes in panels[len(cases) :]:
        axes.set_axis_off()
    add_legend(figure, sorted(present - {0}))
    save_figure(figure, path)
