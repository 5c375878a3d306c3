"""A record of every optimiser step, kept apart from checkpoints, so that an audit can hold one against the other.

In a folder: DIR/attempt-ATTEMPT-rank-RANK.jsonl, a first line that says from where this attempt goes on, then a line a
step. A line is handed to the operating system before the next step, so it outlives the process, and is on disk before
the checkpoint that covers it is reported, so it outlives the machine.

On gs://, where objects cannot be appended to: the same lines in objects
attempt-ATTEMPT-rank-RANK-part-NUMBER.jsonl. Part 0 is the first line. Each further part is written before the
checkpoint that covers its steps is reported, or at the end of the attempt. A process that is killed loses the lines
after its last part: steps that no checkpoint covers.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

from ingest.errors import ConfigError, PlaceNotFoundError
from ingest.home import expanded
from ingest.plan import Indices
from ingest.stores import Store, open_store
from ingest.stores.local import LocalStore

from .plain_json import to_json

NAME = re.compile(r"attempt-(.+)-rank-(\d+)(?:-part-(\d+))?\.jsonl")
NAMED = re.compile(r"attempt-(\d{20})-")  # by `attempt_name`


def attempt_name(folder: str | None = None, clock: Callable[[], int] = time.time_ns) -> str:
    """A new name for an attempt: names sort by when they were made, also where a clock was put back.

    Args:
        folder: the ledger that the attempt is for: its name is behind all that are there. None for none.
        clock: the time in ns; rank 0 may be on another machine at each start.

    Raises:
        StoreError: the ledger cannot be read.
    """
    newest = 0
    if folder is not None:
        with contextlib.suppress(PlaceNotFoundError):
            made = (NAMED.match(entry.name) for entry in open_store(folder).list("attempt-"))
            newest = max((int(found[1]) for found in made if found is not None), default=0)
    return f"{max(clock(), newest + 1):020d}-{uuid.uuid4().hex[:8]}"


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
            folder: an absolute path, which is made if there is none, or a gs:// place.
            attempt: one name for all ranks, from `attempt_name`.
            rank: of this process.
            world_size: ranks of this attempt.
            batch_size: samples a rank and optimiser step.
            step: steps that the checkpoint covers, from which this attempt goes on.
            checkpoint: its name; None at the start of the run.

        Raises:
            ConfigError: `folder` is relative.
            StoreError: the place cannot be written.
        """
        self._file: IO[str] | None = None
        self._store: Store | None = None
        self._waiting: list[str] = []  # lines that no part holds yet
        self._parts = 0
        self._name = f"attempt-{attempt}-rank-{rank:05d}"
        if folder is None:
            return
        store = open_store(check_place(folder))
        if isinstance(store, LocalStore):
            place = Path(store.root)
            place.mkdir(parents=True, exist_ok=True)
            self._file = (place / f"{self._name}.jsonl").open("x", encoding="utf-8")
        else:
            self._store = store
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
        if self._store is not None:
            self.sync()  # a place that may not be written is found before the first step

    def append(self, *, epoch: int, step: int, indices: Indices) -> None:
        """Record the step that took the model from `step` - 1 to `step`."""
        if self._file is not None or self._store is not None:
            self._write({"epoch": epoch, "step": step, "indices": indices.tolist()})

    def sync(self) -> None:
        """Return when everything is on disk, or in the bucket; to be called before a checkpoint is reported."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._store is not None and self._waiting:
            self._store.put(f"{self._name}-part-{self._parts:05d}.jsonl", "".join(self._waiting).encode())
            self._waiting.clear()
            self._parts += 1

    def _write(self, entry: dict[str, object]) -> None:
        line = to_json(entry, indent=None) + "\n"
        if self._file is None:
            self._waiting.append(line)
            return
        self._file.write(line)
        self._file.flush()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.sync()
        finally:
            if self._file is not None:
                self._file.close()


def absolute_place(folder: str) -> str:
    """A URI as it is; a path made absolute from the working directory of this process, which must be the driver."""
    return folder if "://" in folder else str(Path(expanded(folder)).resolve())


def check_place(folder: str) -> str:
    """The place, unless it is a relative path.

    Raises:
        ConfigError: it is: a worker would open it below its own working directory, which Ray removes.
    """
    if "://" not in folder and not Path(expanded(folder)).is_absolute():
        raise ConfigError(
            f"expected an absolute path or a gs:// place for the ledger, found {folder!r}; give --trainer.ledger "
            f"{absolute_place(folder)} or gs://…"
        )
    return folder


def read_ledger(folder: str) -> dict[str, dict[str, str]]:
    """The text of a ledger: by attempt and rank, in the order that they sort by; of a bucket, all parts in one.

    Args:
        folder: a path, taken from here where it is relative, or a gs:// place. A run may be writing to it.

    Raises:
        ConfigError: there is no ledger, a part of it is missing, or it is no text.
        StoreError: the place cannot be read.
    """
    store = open_store(folder)
    parts: dict[str, dict[str, dict[int, str]]] = {}
    try:
        for entry in store.list("attempt-"):
            matched = NAME.fullmatch(entry.name)
            if matched is None:
                continue
            attempt, rank, part = matched.groups()
            try:
                # The file of a run that is going on grows between its listing and its reading.
                local = isinstance(store, LocalStore)
                data = Path(store.uri_of(entry.name)).read_bytes() if local else store.fetch([entry])[0]
                text = data.decode()
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{store.uri_of(entry.name)}: expected lines of JSON, found no text ({error}); put back a copy"
                ) from error
            parts.setdefault(attempt, {}).setdefault(rank, {})[int(part or 0)] = text
    except PlaceNotFoundError:
        parts = {}
    if not parts:
        raise ConfigError(f"expected a ledger in {folder}, found none; check --ledger")
    for attempt, ranks in parts.items():
        for rank, texts in ranks.items():
            missing = sorted(set(range(len(texts))) - set(texts))
            if missing:
                raise ConfigError(
                    f"expected parts 0 to {max(texts)} of attempt-{attempt}-rank-{rank} in {folder}, found no part "
                    f"{missing[0]}; put back a copy of it"
                )
    return {
        attempt: {rank: "".join(texts[part] for part in sorted(texts)) for rank, texts in sorted(ranks.items())}
        for attempt, ranks in sorted(parts.items())
    }
