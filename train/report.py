"""What a run shows of itself: the table by epoch, the curves, and a held-out slice.

A row is a dict of `metrics.json`: `epoch, train_loss, mean_dice, learning_rate, samples_per_s, first_batch_s,
stall_share, au`; any of them may be missing or None (an epoch without validation, one step). Rows count epochs from 0,
tables and pictures from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from ingest.errors import ConfigError
from ingest.overlay import COLOURS, add_legend, draw_slice, informative_slice, save_figure

from .long_table import add_chosen

Row = Mapping[str, Any]
MUCH_STALL = 0.5  # share of an epoch

# Field of the row, heading, how a number is written.
_COLUMNS = (
    ("epoch", "epoch", "{:.0f}"),
    ("train_loss", "loss", "{:.4f}"),
    ("mean_dice", "mean Dice", "{:.4f}"),
    ("learning_rate", "learning rate", "{:.3g}"),
    ("samples_per_s", "samples/s", "{:.1f}"),
    ("first_batch_s", "first batch s", "{:.2f}"),
    ("stall_share", "stall", "{:.1%}"),
    ("au", "AU", "{:.1%}"),
)


def epoch_table(rows: Sequence[Row]) -> Table:
    """The epochs as a table for the terminal; what an epoch lacks is a dash.

    Args:
        rows: One a finished epoch, in order.

    Returns:
        A table to print with rich; stall and AU in per cent. Of many epochs it has the first, the last, the best, and
        those with a problem: a loss that is not known, or a stall of more than half of the time.
    """
    table = Table(title="Training by epoch")
    for _, heading, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    shown = [from_one(row) for row in rows]
    cells = [tuple(_written(row.get(field), form) for field, _, form in _COLUMNS) for row in shown]
    scored = [at for at, row in enumerate(rows) if _is_number(row.get("mean_dice"))]
    best = max(scored, key=lambda at: (rows[at]["mean_dice"], -at), default=None)
    add_chosen(table, cells, [at for at, row in enumerate(rows) if _has_problem(row)], best)
    return table


def from_one(row: Row) -> Row:
    """Return the row with its epoch counted from 1, as people read it."""
    return {**row, "epoch": row["epoch"] + 1} if _is_number(row.get("epoch")) else row


def _has_problem(row: Row) -> bool:
    stall: Any = row.get("stall_share")
    return not _is_number(row.get("train_loss")) or (_is_number(stall) and stall > MUCH_STALL)


def plot_curves(rows: Sequence[Row], path: Path | str) -> None:
    """Training loss and held-out mean Dice against the epoch, as PNG.

    Args:
        rows: One a finished epoch; epochs without a value leave no point. No rows give empty axes.
        path: The PNG to write; its folder is made.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (field, name, colour) in zip(
        figure.subplots(1, 2),
        (("train_loss", "training loss", COLOURS[6]), ("mean_dice", "held-out mean Dice", COLOURS[5])),
        strict=True,
    ):
        points = [
            (row["epoch"] + 1, row[field])
            for row in rows
            if _is_number(row.get("epoch")) and _is_number(row.get(field))
        ]
        axes.plot([epoch for epoch, _ in points], [value for _, value in points], marker="o", ms=3, color=colour)
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if points and field == "mean_dice":
            best_epoch, best = max(points, key=lambda point: point[1])
            axes.set_title(f"best {best:.4f} at epoch {best_epoch}", fontsize=9)
            axes.set_ylim(0, 1)
        elif points:
            axes.set_title(f"last {points[-1][1]:.4f}", fontsize=9)
            axes.set_ylim(bottom=0)
    save_figure(figure, path)


def plot_case(
    image_DHW: npt.NDArray[Any],
    truth_DHW: npt.NDArray[Any],
    prediction_DHW: npt.NDArray[Any],
    path: Path | str,
    title: str,
) -> None:
    """One slice of a case three times: the image, the truth over it, the prediction over it; as PNG.

    The slice is chosen by the truth (`ingest.overlay.informative_slice`).

    Args:
        image_DHW: (D, H, W) float.
        truth_DHW: (D, H, W) integers, 0 for background.
        prediction_DHW: The same, as the model sees it.
        path: The PNG to write; its folder is made.
        title: Written above, literally.

    Raises:
        ConfigError: if the three shapes differ.
    """
    if not image_DHW.shape == truth_DHW.shape == prediction_DHW.shape or image_DHW.ndim != 3:
        raise ConfigError(
            f"expected image, truth and prediction of one shape (D, H, W); found {image_DHW.shape}, "
            f"{truth_DHW.shape} and {prediction_DHW.shape}"
        )
    depth = informative_slice(truth_DHW)
    figure = Figure(figsize=(10, 4), layout="constrained")
    overlays = (None, truth_DHW[depth], prediction_DHW[depth])
    titles = (f"image, slice {depth} of {len(image_DHW)}", "truth", "prediction")
    for axes, label_HW, heading in zip(figure.subplots(1, 3), overlays, titles, strict=True):
        draw_slice(axes, image_DHW[depth], label_HW, heading)
    figure.suptitle(title, fontsize=11, parse_math=False)
    shown = np.union1d(truth_DHW[depth], prediction_DHW[depth]).tolist()
    add_legend(figure, [value for value in shown if value != 0])
    save_figure(figure, path)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _written(value: object, form: str) -> str:
    return form.format(value) if _is_number(value) else "-"
