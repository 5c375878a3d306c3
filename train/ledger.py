"""A record of every optimiser step, kept apart from checkpoints, so that an audit can hold one against the other.

DIR/attempt-ATTEMPT-rank-RANK.jsonl: a first line that says from where this attempt goes on, then a line a step. A line
is handed to the operating system before the next step, so it outlives the process, and is on disk before the
checkpoint that covers it is reported, so it outlives the machine.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import IO

from ingest.plan import Indices

from .plain_json import to_json


def attempt_name() -> str:
    """A new name for an attempt: names sort by when they were made."""
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"


class Ledger:
    """Appends one rank's steps; does nothing where no folder is given."""

    def __init__(
        self,
        folder: str | None,
        *,
        attempt: str,
        rank: int,
        world_size: int,
        batch_size: int,
        step: int,
        checkpoint: str | None,
    ) -> None:
        """Begin an attempt.

        Args:
            folder: local or shared; made if there is none.
            attempt: one name for all ranks, from `attempt_name`.
            rank: of this process.
            world_size: ranks of this attempt.
            batch_size: samples a rank and optimiser step.
            step: steps that the checkpoint covers, from which this attempt goes on.
            checkpoint: its name; None at the start of the run.
        """
        self._file: IO[str] | None = None
        if folder is None:
            return
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        self._file = (place / f"attempt-{attempt}-rank-{rank:05d}.jsonl").open("x", encoding="utf-8")
        self._write(
            {
                "rank": rank,
                "world_size": world_size,
                "batch_size": batch_size,
                "step": step,
                "checkpoint": checkpoint,
                "pid": os.getpid(),
                "host": socket.gethostname(),
            }
        )

    def append(self, *, epoch: int, step: int, indices: Indices) -> None:
        """Record the step that took the model from `step` - 1 to `step`."""
        if self._file is not None:
            self._write({"epoch": epoch, "step": step, "indices": indices.tolist()})

    def sync(self) -> None:
        """Return when everything is on disk; to be called before a checkpoint is reported."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _write(self, entry: dict[str, object]) -> None:
        assert self._file is not None
        self._file.write(to_json(entry, indent=None) + "\n")
        self._file.flush()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
