"""TensorBoard logs of a run, by tensorboardX, which Ray Train brings along; TensorBoard itself shows them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from ingest.stores.base import Store

from .records import StepRecord

FOLDER = "tensorboard/"
_OF_ROW = ("train_loss", "mean_dice", "learning_rate", "samples_per_s", "au", "stall_share", "quarantined")


class TensorBoard:
    """Scalars by step and by epoch. Written aside and put whole, so that a bucket serves as well as a folder.

    By tensorboardX's own writer of event files: its `SummaryWriter` hands events to a thread that cannot be waited for.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._aside = tempfile.TemporaryDirectory(prefix="voxflux-tensorboard-")
        self._writer = EventsWriter(f"{self._aside.name}/events")

    def steps(self, records: Sequence[StepRecord]) -> None:
        """Log loss, wait and computing of each step."""
        for record in records:
            for name in ("loss", "wait_s", "compute_s"):
                self._add(f"step/{name}", getattr(record, name), record.step, record.ended_unix_s)

    def row(self, row: Mapping[str, Any]) -> None:
        """Log an epoch's row of metrics.json, at its last step."""
        step, now_s = row["step"], time.time()
        values = {f"epoch/{name}": row.get(name) for name in _OF_ROW}
        values |= {f"dice/class_{number}": dice for number, dice in enumerate(row.get("dice_by_class") or [], 1)}
        values |= {f"stall_s/{cause}": seconds for cause, seconds in (row.get("stall_by_cause_s") or {}).items()}
        for name, value in values.items():
            if value is not None:
                self._add(name, value, step, now_s)

    def keep(self) -> None:
        """Put what is logged by now under RUN_DIR/tensorboard."""
        self._writer.flush()
        for file in Path(self._aside.name).iterdir():
            self._store.put(FOLDER + file.name, file.read_bytes())

    def close(self) -> None:
        """Put everything, and take away what was written aside."""
        self.keep()
        self._writer.close()
        self._aside.cleanup()

    def _add(self, name: str, value: float, step: int, at_unix_s: float) -> None:
        self._writer.write_event(Event(wall_time=at_unix_s, step=step, summary=summary.scalar(name, value)))
