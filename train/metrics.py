"""The rows of metrics.json: one an epoch, merged over ranks, written as soon as an epoch is reported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from ray.train import Checkpoint, UserCallback

from ingest.errors import ConfigError
from ingest.stores import open_store
from ingest.unwrap import own_error

from .best import is_best, keep_best
from .checkpoint import name_latest
from .monitor import Monitor
from .plain_json import is_figure, of_json, to_json
from .waits import CAUSES, add_up

METRICS_FILE = "metrics.json"
Row = dict[str, Any]


def merge_ranks(rows: Sequence[Row]) -> Row:
    """One row for all ranks: samples add up, times and shares are means, the slowest first batch counts.

    Loss, scores and counts of cases are those of all ranks already.
    """
    merged = dict(rows[0])
    merged["samples"] = sum(row["samples"] for row in rows)
    merged["samples_per_s"] = sum(row["samples_per_s"] for row in rows)
    merged["first_batch_s"] = max(row["first_batch_s"] for row in rows)
    merged["stall_share"] = sum(row["stall_share"] for row in rows) / len(rows)
    known = [row["au"] for row in rows if row["au"] is not None]
    merged["au"] = sum(known) / len(known) if known else None
    merged["ranks"] = len(rows)
    if "stall_by_cause_s" in merged:
        merged["wall_s"] = max(row["wall_s"] for row in rows)
        merged["stall_s"] = sum(row["stall_s"] for row in rows) / len(rows)
        seconds = add_up(row["stall_by_cause_s"] for row in rows)
        merged["stall_by_cause_s"] = {cause: seconds[cause] / len(rows) for cause in CAUSES}
    return merged


def upsert(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows with this one in its epoch's place: an epoch that was trained again counts once."""
    return sorted([*(r for r in rows if r["epoch"] != row["epoch"]), row], key=lambda r: int(r["epoch"]))


class MetricsWriter(UserCallback):
    """Keeps RUN_DIR/metrics.json and latest.json up to date from the run's controller, whoever started the run.

    Args:
        run_dir: the run's folder or gs:// place.
        monitor: is told of epochs and faults.
        listing_s: that listing the data took before the run; it goes into the first row that is written.
    """

    def __init__(self, run_dir: str, monitor: Monitor | None = None, listing_s: float = 0.0) -> None:
        self._run_dir = run_dir
        self._monitor = monitor
        self._listing_s = listing_s

    def after_report(
        self,
        run_context: Any,  # noqa: ARG002  the signature is Ray's
        metrics: list[Row],
        checkpoint: Checkpoint | None,
    ) -> None:
        """Write the epoch's row, if an epoch is done, keep its checkpoint if it is the best, then go on from it.

        In this order a crash in between has the epoch trained again, and its row and what was kept replaced.
        """
        name = None if checkpoint is None else PurePosixPath(checkpoint.path).name
        finished = [report["row"] for report in metrics if report["row"] is not None]
        if finished:
            row = merge_ranks(finished)
            row["stall_by_cause_s"]["listing"], self._listing_s = self._listing_s, 0.0
            row["mean_dice"] = row["mean_dice"] if is_figure(row["mean_dice"]) else None
            if self._monitor is not None:
                row["retries"] = self._monitor.ask("retries_of", row["epoch"]) or {}
            rows = upsert(read_metrics(self._run_dir), row)
            open_store(self._run_dir).put(METRICS_FILE, to_json(rows).encode())
            if self._monitor is not None:
                self._monitor.tell("epoch_done", row)
            if name is not None and is_best(rows, row):
                keep_best(self._run_dir, name, row)
        if name is not None:
            name_latest(self._run_dir, name)

    def after_exception(
        self,
        run_context: Any,  # noqa: ARG002  the signature is Ray's
        worker_exceptions: dict[int, Exception],
    ) -> None:
        """Note which ranks failed, and why."""
        if self._monitor is not None:
            for rank, error in worker_exceptions.items():
                said = str(own_error(error) or error).strip().splitlines() or [type(error).__name__]
                self._monitor.tell("event", "fault", f"rank {rank}: {(said[-1] if len(said) > 1 else said[0])[:500]}")


def read_metrics(run_dir: str) -> list[Row]:
    """The rows written so far, by epoch; empty before the first.

    Raises:
        ConfigError: RUN_DIR/metrics.json is no list of rows.
    """
    store = open_store(run_dir)
    for entry in store.list(METRICS_FILE):
        if entry.name == METRICS_FILE:
            try:
                rows: list[Row] = of_json(store.fetch([entry])[0])
                if not isinstance(rows, list) or not all(isinstance(row["epoch"], int) for row in rows):
                    raise TypeError("it is no list of epochs")
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(
                    f"{store.uri_of(METRICS_FILE)}: expected a list of epochs, found something else ({error})"
                ) from error
            return rows
    return []
