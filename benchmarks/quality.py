"""What a run's held-out cases scored, by class and epoch: a table to paste, a JSON file and the curve.

Nothing is trained or scored here: the numbers are those that the run kept, its scores by case held against the means
that it reported.
"""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tyro
from matplotlib.axes import Axes
from rich.console import Console

from ingest.errors import ConfigError
from ingest.overlay import COLOURS
from ingest.stores import open_store
from train.metrics import METRICS_FILE, read_metrics
from train.validate import SCORES_FOLDER

from .report import Report, Row, meta_of

TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Report a finished run's Dice by class: of `train run demo-quality --run-dir RUN_DIR`, or of any other."""

    run_dir: tyro.conf.Positional[str]
    """The run's folder, or gs:// place."""

    classes: tuple[str, ...] = ("grey matter", "white matter")
    """Names of the classes from 1 on."""

    json: Path | None = None
    """Where the JSON goes; the picture goes beside it. None is benchmarks/results/demo-quality.json."""


def run(config: QualityConfig, console: Console) -> int:
    """Print the table, and write the JSON and the picture."""
    metrics = read_metrics(config.run_dir)
    rows = [scored(config, row) for row in metrics if row["mean_dice"] is not None]
    if not rows:
        raise ConfigError(
            f"expected scored epochs in {config.run_dir}/{METRICS_FILE}, found none; give the folder of a run that "
            "has scored held-out cases"
        )
    best = max(rows, key=lambda row: float(row["mean"]))
    minutes = sum(row["wall_s"] + row.get("evaluate_s", 0.0) for row in metrics) / 60
    losses = [row["train_loss"] for row in metrics]
    about: dict[str, Any] = {"run_dir": config.run_dir, "minutes": minutes, "train_loss": losses, "best": dict(best)}
    report = Report(name="demo-quality", rows=rows, meta=meta_of(0, **about))
    report.print(console, {field: "{}" if field in ("epochs", "cases") else "{:.4f}" for field in rows[0]})
    console.print(markdown(rows), soft_wrap=True, markup=False, highlight=False)
    console.print(
        f"{len(metrics)} epochs in {minutes:.1f} min, {best['cases']} held-out cases; best after epoch "
        f"{best['epochs']}: mean Dice {best['mean']:.4f}, lowest case {best['lowest case']:.4f}",
        soft_wrap=True,
    )
    for file in report.save(config.json, lambda axes: draw(axes, rows, losses)):
        console.print(f"wrote {file}", soft_wrap=True)
    return 0


def scored(config: QualityConfig, row: Row) -> dict[str, Any]:
    """One scored epoch, from its scores by case.

    Args:
        config: the run, and the names of its classes.
        row: the epoch's of metrics.json.

    Returns:
        `epochs` done, `cases` scored, the mean over cases of each class by its name, `mean` over all, and the mean
        Dice of the `lowest case`.

    Raises:
        ConfigError: the scores are missing, are of other classes, or have another mean than the run reported.
    """
    name = f"{SCORES_FOLDER}/epoch-{row['epoch']:05d}.parquet"
    store = open_store(config.run_dir)
    found = [entry for entry in store.list(name) if entry.name == name]
    if not found:
        raise ConfigError(
            f"expected the scores by case of epoch {row['epoch'] + 1} in {store.uri_of(name)}, found none"
        )
    by_case = pq.read_table(io.BytesIO(store.fetch(found)[0])).to_pydict()
    columns = [column for column in by_case if column.startswith("dice_")]
    if len(columns) != len(config.classes):
        raise ConfigError(
            f"expected Dice of {len(config.classes)} classes, {', '.join(config.classes)}, in {store.uri_of(name)}, "
            f"found {len(columns)}; name as many with --classes"
        )
    cases = len(by_case["case_id"])
    means = [math.fsum(by_case[column]) / cases for column in columns]
    mean = math.fsum(means) / len(means)
    if abs(mean - row["mean_dice"]) > TOLERANCE or row["scored"] != cases:
        raise ConfigError(
            f"expected the mean Dice that the run reported, {row['mean_dice']!r} over {row['scored']} cases, in "
            f"{store.uri_of(name)}, found {mean!r} over {cases}; the two files are not of one run"
        )
    named = dict(zip(config.classes, means, strict=True))
    return {"epochs": row["epoch"] + 1, "cases": cases, **named, "mean": mean, "lowest case": min(by_case["mean_dice"])}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as the README has it, with four digits."""
    classes = [name for name in rows[0] if name not in ("epochs", "cases", "mean", "lowest case")]
    lines = [" | ".join(["| after epoch", *(f"{name} Dice" for name in classes), "mean", "lowest case |"])]
    lines.append("|" + "---|" * (len(classes) + 3))
    for row in rows:
        values = " | ".join(f"{row[name]:.4f}" for name in (*classes, "mean", "lowest case"))
        lines.append(f"| {row['epochs']} | {values} |")
    return "\n".join(lines)


def draw(axes: Axes, rows: list[dict[str, Any]], losses: list[float | None]) -> None:
    """Held-out Dice by class, and the training loss where there is one, against the epochs done."""
    epochs = [row["epochs"] for row in rows]
    classes = [name for name in rows[0] if name not in ("epochs", "cases", "mean", "lowest case")]
    for number, name in enumerate(classes):
        values = [row[name] for row in rows]
        axes.plot(epochs, values, "o-", ms=4, color=COLOURS[number], label=f"{name}, {values[-1]:.4f} at the end")
    means = [row["mean"] for row in rows]
    axes.plot(epochs, means, "k--", lw=1, label=f"mean, {means[-1]:.4f} at the end")
    drawn = [math.nan if loss is None else loss for loss in losses]
    end = "none" if losses[-1] is None else f"{losses[-1]:.4f}"
    axes.plot(range(1, len(drawn) + 1), drawn, color="#999999", lw=1, label=f"training loss, {end} at the end")
    axes.set_xlabel("epochs done")
    axes.set_ylabel("held-out Dice; training loss")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
