"""The rows of metrics.json: one an epoch, merged over ranks, written as soon as an epoch is reported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from ray.train import Checkpoint, UserCallback

from ingest.stores import open_store

from .best import is_best, keep_best
from .checkpoint import name_latest

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
    return merged


def upsert(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows with this one in its epoch's place: an epoch that was trained again counts once."""
    return sorted([*(r for r in rows if r["epoch"] != row["epoch"]), row], key=lambda r: int(r["epoch"]))


class MetricsWriter(UserCallback):
    """Keeps RUN_DIR/metrics.json and latest.json up to date from the run's controller, whoever started the run."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir

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
            rows = upsert(read_metrics(self._run_dir), merge_ranks(finished))
            open_store(self._run_dir).put(METRICS_FILE, json.dumps(rows, indent=1).encode())
            if name is not None and is_best(rows, finished[0]):
                keep_best(self._run_dir, name, finished[0])
        if name is not None:
            name_latest(self._run_dir, name)


def read_metrics(run_dir: str) -> list[Row]:
    """The rows written so far, by epoch; empty before the first."""
    store = open_store(run_dir)
    for entry in store.list(METRICS_FILE):
        if entry.name == METRICS_FILE:
            rows: list[Row] = json.loads(store.fetch([entry])[0])
            return rows
    return []
