"""The rows of metrics.json: one an epoch, merged over ranks, written as soon as an epoch is reported."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from ray.train import Checkpoint, UserCallback

from ingest.errors import ConfigError, IngestError
from ingest.stores import open_store

from .best import is_best, keep_best
from .checkpoint import Files, name_latest, seal, unwritten_rows
from .monitor import Monitor
from .plain_json import is_figure, of_json, to_json
from .waits import CAUSES, add_up

METRICS_FILE = "metrics.json"
logger = logging.getLogger(__name__)
Row = dict[str, Any]


def merge_ranks(rows: Sequence[Row]) -> Row:
    """One row for all ranks: samples add up, times and shares are means, the slowest first batch counts.

    Loss, scores and counts of cases are those of all ranks already.
    """
    merged = dict(rows[0])
    merged["samples"] = sum(row["samples"] for row in rows)
    merged["samples_per_s"] = sum(row["samples_per_s"] for row in rows)
    merged["first_batch_s"] = max((s for row in rows if (s := row["first_batch_s"]) is not None), default=None)
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
        monitor: is told of epochs, and of what could not be kept.
        listing_s: that listing the data took before the run; it goes into the first row that is written.
    """

    def __init__(self, run_dir: str, monitor: Monitor | None = None, listing_s: float = 0.0) -> None:
        self._run_dir = run_dir
        self._monitor = monitor
        self._listing_s = listing_s
        self._unwritten = unwritten_rows(run_dir)  # of an earlier start; the next naming would replace them
        self._checkpoint = ""  # the newest that this process named

    def after_report(
        self,
        run_context: Any,  # noqa: ARG002  the signature is Ray's
        metrics: list[dict[str, Any]],
        checkpoint: Checkpoint | None,
    ) -> None:
        """Finish and name the checkpoint with the epoch's row, then write metrics.json, then keep the best checkpoint.

        Ray has registered the new checkpoint and deleted the oldest by now, and an exception from here ends the run for
        good. So the checkpoint is named first. What fails after that is told of, and loses nothing: latest.json holds
        the row until metrics.json does, and the best checkpoint is kept anew with the next one that is better.

        An epoch that is scored is reported twice: its checkpoint first, then its row, with the scores. The checkpoint
        is said to be scored when all else is done, so that a crash before that scores the epoch again.
        """
        if checkpoint is None:
            name = metrics[0]["checkpoint"] or self._checkpoint  # the one of this start, or the one it went on from
        else:
            name = PurePosixPath(checkpoint.path).name
            if not self._seal(name, metrics):
                return
            self._checkpoint = name
        reported = next((report["row"] for report in metrics if report["row"] is not None), None)
        row = None if reported is None else self._row(reported)
        written, rows = self._rows()
        rows = rows if row is None else upsert(rows, row)
        self._unwritten = [each for each in rows if written is None or each not in written]
        if checkpoint is not None:
            name_latest(self._run_dir, name, self._unwritten, scored=row is not None)
        if self._unwritten and written is not None:
            with self._told_of("metrics.json"):
                open_store(self._run_dir).put(METRICS_FILE, to_json(rows).encode())
                self._unwritten = []
        if row is None:
            return
        if self._monitor is not None:
            self._monitor.tell("epoch_done", row)
        if is_best(rows, row):
            with self._told_of("the best checkpoint"):
                keep_best(self._run_dir, name, row)
        if checkpoint is None:
            name_latest(self._run_dir, name, self._unwritten, scored=True)

    def _seal(self, name: str, metrics: list[dict[str, Any]]) -> bool:
        """Finish a checkpoint; False where not every rank reported its part, as when a node goes away."""
        ranks = metrics[0]["ranks"]
        if len(metrics) != ranks:
            words = f"expected {ranks} ranks' parts of {name}, found {len(metrics)}: this checkpoint does not count"
            logger.warning(words)
            if self._monitor is not None:
                self._monitor.warn(words)
            return False
        files: Files = {file: about for report in metrics for file, about in report["files"].items()}
        seal(self._run_dir, name, files)
        return True

    def _row(self, reported: Row) -> Row:
        causes = reported["stall_by_cause_s"] | {"listing": self._listing_s}
        row, self._listing_s = reported | {"stall_by_cause_s": causes}, 0.0
        row["mean_dice"] = row["mean_dice"] if is_figure(row["mean_dice"]) else None
        if self._monitor is not None:
            row["retries"] = self._monitor.ask("retries_of", row["epoch"]) or {}
        as_read: Row = of_json(to_json(row))  # as it is read again, so that rows can be compared
        return as_read

    def _rows(self) -> tuple[list[Row] | None, list[Row]]:
        """The rows that metrics.json holds, and those with the ones that only latest.json holds.

        Where they cannot be read, the first are None and the second those that this process has yet to write: the
        checkpoint must be named all the same, and metrics.json must not be replaced by a part of it.
        """
        written: list[Row] | None = None
        rows = self._unwritten
        with self._told_of("the rows of earlier epochs"):
            rows, written = read_metrics(self._run_dir), written_rows(self._run_dir)
        return written, rows

    @contextlib.contextmanager
    def _told_of(self, what: str) -> Iterator[None]:
        """A failure of a store is a warning and an event, and no exception."""
        try:
            yield
        except (IngestError, OSError) as error:
            logger.warning("could not keep or read %s of the run: %s", what, error)
            if self._monitor is not None:
                self._monitor.warn(f"could not keep or read {what}: {error}"[:500])


def read_metrics(run_dir: str) -> list[Row]:
    """The rows written so far, by epoch; empty before the first. Those that only latest.json holds are among them.

    Raises:
        ConfigError: RUN_DIR/metrics.json is no list of rows, or latest.json is damaged.
    """
    rows = written_rows(run_dir)
    for row in unwritten_rows(run_dir):
        rows = upsert(rows, row)
    return rows


def written_rows(run_dir: str) -> list[Row]:
    """The rows of metrics.json.

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
