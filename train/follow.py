"""Prints a run's epochs as they end, from what the controller wrote of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from rich.console import Console

from .metrics import Row, read_metrics

POLL_S = 1.0


def epoch_line(row: Row, epochs: int) -> str:
    """One epoch in one line, as the run goes."""
    dice = "" if row["mean_dice"] is None else f", mean Dice {row['mean_dice']:.4f}"
    return (
        f"epoch {row['epoch'] + 1}/{epochs}: loss {row['train_loss']:.4f}{dice}, "
        f"{row['samples_per_s']:.1f} samples/s, stall {row['stall_share']:.1%}"
    )


@contextlib.contextmanager
def following(run_dir: str, epochs: int, console: Console) -> Iterator[None]:
    """Print a line for each epoch as its row appears."""
    done = threading.Event()
    shown = 0

    def follow() -> None:
        nonlocal shown
        finished = False
        while not finished:
            finished = done.wait(POLL_S)
            rows = read_metrics(run_dir)
            for row in rows[shown:]:
                console.print(epoch_line(row, epochs))
            shown = len(rows)

    thread = threading.Thread(target=follow, name="follow-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
