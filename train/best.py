"""Keeps the checkpoint with the best mean Dice: a copy that no later checkpoint replaces unless it scores higher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ingest.errors import ConfigError
from ingest.stores import open_store

from .checkpoint import STATE_FILE, check_archive
from .plain_json import is_figure, of_json, to_json

BEST_FILE = "best.json"
BEST_FOLDER = "best"
Row = dict[str, Any]


def is_best(rows: Sequence[Row], row: Row) -> bool:
    """Whether this epoch scored higher than each before it; a figure that is missing or NaN neither wins nor blocks."""
    earlier = [r["mean_dice"] for r in rows if r["epoch"] < row["epoch"] and is_figure(r["mean_dice"])]
    return is_figure(row["mean_dice"]) and all(row["mean_dice"] > other for other in earlier)


def keep_best(run_dir: str, checkpoint: str, row: Row) -> None:
    """Copy a checkpoint's weights to RUN_DIR/best, in one step, then name them in RUN_DIR/best.json.

    Ray Train deletes the checkpoints that it knows of, the oldest first; of this copy it knows nothing.
    """
    store = open_store(run_dir)
    kept = read_best(run_dir)
    # Rows may be missing, where metrics.json was damaged; what is kept must not give way to a lower score for that.
    if kept and is_figure(kept["mean_dice"]) and kept["epoch"] < row["epoch"] and kept["mean_dice"] >= row["mean_dice"]:
        return
    name = f"{checkpoint}/{STATE_FILE}"
    entry = next((entry for entry in store.list(name) if entry.name == name), None)
    if entry is None:
        raise ConfigError(f"expected {store.uri_of(name)}, found none; it is kept with the next better epoch")
    data = store.fetch([entry])[0]
    check_archive(data, store.uri_of(name))
    store.put(f"{BEST_FOLDER}/{STATE_FILE}", data)
    about = {"checkpoint": BEST_FOLDER, "epoch": row["epoch"], "step": row["step"], "mean_dice": row["mean_dice"]}
    store.put(BEST_FILE, to_json(about).encode())


def read_best(run_dir: str) -> Row | None:
    """What RUN_DIR/best.json says: `checkpoint`, `epoch`, `step`, `mean_dice`; None where there is none.

    Raises:
        ConfigError: it is not what `keep_best` writes.
    """
    store = open_store(run_dir)
    for entry in store.list(BEST_FILE):
        if entry.name == BEST_FILE:
            try:
                about: Row = of_json(store.fetch([entry])[0])
                if not isinstance(about["checkpoint"], str) or not isinstance(about["epoch"], int):
                    raise TypeError("its checkpoint is no name, or its epoch no number")
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(
                    f"{store.uri_of(BEST_FILE)}: expected the best checkpoint of a run, found something else ({error})"
                ) from error
            return {"mean_dice": None, **about}
    return None


def reached(rows: Sequence[Row], threshold: float | None, epochs: int) -> Row | None:
    """The epoch, of the first so many, whose mean Dice reached a threshold; None where none did or none is set."""
    if threshold is None:
        return None
    scored = [row for row in rows if row["epoch"] < epochs and is_figure(row["mean_dice"])]
    return next((row for row in scored if row["mean_dice"] >= threshold), None)
