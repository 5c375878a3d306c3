"""Bad cases: what is done about one, how many a run may lose, and the book of which they were."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import (
    ConfigError,
    DecodeError,
    EncodingError,
    ManifestError,
    ObjectError,
    ObjectNotFoundError,
    PlaceNotFoundError,
    PreconditionError,
    QuarantineBudgetError,
    StaleManifestError,
)
from .gunzip import uncompressed
from .plan import Indices
from .stores.base import Store, open_store
from .stores.local import LocalStore

QUARANTINE_FILE = "quarantine.parquet"
WRITE_EVERY_S = 1.0
"""Seconds between two writes of one object in a bucket (https://cloud.google.com/storage/quotas, on objects)."""

SHOWN = 10  # cases that a message names before "and N more"

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("case_id", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("epoch", pa.int64(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BadCaseConfig:
    """What is done about a case that cannot be trained on.

    Permission and network errors are no case's fault: they end the run whatever stands here.
    """

    on_bad: Literal["fail", "quarantine"] = "fail"
    """A case whose object is missing or damaged, or is not the volume that was expected: `fail` ends the run,
    `quarantine` leaves the case out from then on and writes it into the run's quarantine.parquet."""

    budget_fraction: float = 0.001
    """Share of the data set's cases that may be quarantined, at least one case unless it is 0; one more ends the
    run."""

    budget_cases: int | None = None
    """The same as a number of cases; None goes by `budget_fraction`."""

    on_stale: Literal["fail", "refresh", "quarantine"] = "fail"
    """A case whose object was overwritten since it was listed, whatever `on_bad` says: `fail` ends the run,
    `refresh` reads the object as it is now, `quarantine` leaves the case out."""

    def __post_init__(self) -> None:
        if self.on_bad not in ("fail", "quarantine"):
            raise ConfigError(f"data.on_bad must be fail or quarantine; got {self.on_bad!r}")
        if self.on_stale not in ("fail", "refresh", "quarantine"):
            raise ConfigError(f"data.on_stale must be fail, refresh or quarantine; got {self.on_stale!r}")
        if not 0 <= self.budget_fraction <= 1:
            raise ConfigError(f"data.budget_fraction must be from 0 to 1; got {self.budget_fraction}")
        if self.budget_cases is not None and self.budget_cases < 0:
            raise ConfigError(f"data.budget_cases must be 0 or more; got {self.budget_cases}")

    @property
    def quarantines(self) -> bool:
        """Whether any case may end in quarantine, so that a book is needed."""
        return "quarantine" in (self.on_bad, self.on_stale)

    def takes(self, error: ObjectError | DecodeError) -> bool:
        """Whether the case that this error is about goes into quarantine."""
        if isinstance(error, StaleManifestError) and self.on_stale != "refresh":
            return self.on_stale == "quarantine"
        return self.on_bad == "quarantine"

    def budget(self, cases: int) -> int:
        """How many of so many cases may be quarantined."""
        if self.budget_cases is not None:
            return self.budget_cases
        if self.budget_fraction == 0:
            return 0
        return max(1, math.floor(self.budget_fraction * cases + 1e-9))  # 0.29 * 100 is a little below 29


@dataclasses.dataclass(frozen=True, slots=True)
class QuarantineEntry:
    """One bad case.

    Attributes:
        index: of the case in the manifest.
        case_id: its key.
        uri: of the object at fault.
        reason: `missing`, `stale`, `encoding`, `corrupt`, or a `DecodeError`'s reason.
        message: the error's.
        epoch: in which it was found.
    """

    index: int
    case_id: str
    uri: str
    reason: str
    message: str
    epoch: int


class Quarantine(Protocol):
    """Keeps a run's bad cases. Thread-safe; an answer holds for every process of the run."""

    def report(self, *entries: QuarantineEntry) -> None:
        """Add cases. When this returns, their entries are written. If a case has an entry already, that entry stays.

        Raises:
            QuarantineBudgetError: the cases are more than the budget allows; as many as it allows are added.
        """

    def entries(self) -> list[QuarantineEntry]:
        """The cases taken in so far, in the order they were."""

    def indices(self) -> Indices:
        """(q,) int64, their indices, ascending."""


class _Write:
    """Entries that are written together, and the result of the write."""

    def __init__(self) -> None:
        self.entries: dict[int, QuarantineEntry] = {}
        self.done = False
        self.error: Exception | None = None


class QuarantineBook:
    """The book itself, of this process or inside an actor. Does not pickle: see `quarantine_actor` for that.

    What the run's folder holds from an earlier start is in the book, so that a case stays out for good. To try
    cases again, delete the file between two starts.
    """

    def __init__(
        self,
        run_dir: str | None,
        budget: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Note where and how much; the file is read when the book is first asked.

        Args:
            run_dir: the run's folder or gs:// place; None writes nothing.
            budget: cases that may be taken in.
            clock: gives seconds.
            sleep: waits that many seconds.
        """
        self._run_dir = run_dir
        self._budget = budget
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._one_writer = threading.Lock()
        self._next_write_s = clock()
        self._entries: dict[int, QuarantineEntry] | None = None
        self._generation: int | None = 0  # of the file that holds these entries
        self._open: _Write | None = None
        self._under_way: _Write | None = None
        self._refused: dict[int, QuarantineEntry] = {}

    def report(self, *entries: QuarantineEntry) -> None:
        """See `Quarantine.report`. One write takes the entries of all threads that wait for it."""
        with self._lock:
            write, over = self._joined(entries)
        if write is not None:
            with self._one_writer:
                if not write.done:
                    self._write(write)
            if write.error is not None:
                raise write.error
        if over:
            raise over_budget([*self.entries(), *self._refused.values()], self._budget)

    def _joined(self, entries: Sequence[QuarantineEntry]) -> tuple[_Write | None, bool]:
        """Return the write that takes these entries, None if all are written, and whether some are over the budget."""
        known = self._loaded()
        write, over = None, False
        for entry in entries:
            if entry.index in known:
                continue
            pending = [each for each in (self._under_way, self._open) if each is not None]
            joined = next((each for each in pending if entry.index in each.entries), None)
            if joined is None:
                if len(known) + sum(len(each.entries) for each in pending) >= self._budget:
                    self._refused[entry.index] = entry
                    over = True
                    continue
                self._open = joined = self._open or _Write()
                joined.entries[entry.index] = entry
            if write is not self._open:  # if entries are in both, wait for the open write, which comes last
                write = joined
        return write, over

    def _write(self, write: _Write) -> None:
        """Wait until the place takes a write again, and write the entries. Later entries join the next write."""
        self._sleep(max(0.0, self._next_write_s - self._clock()))
        with self._lock:
            self._open, self._under_way = None, write
            known = self._loaded()
            taken = known | {index: entry for index, entry in write.entries.items() if index not in known}
        try:
            if self._run_dir is not None:
                store = open_store(self._run_dir)
                taken = self._put(store, taken)
                if not isinstance(store, LocalStore):
                    self._next_write_s = self._clock() + WRITE_EVERY_S
            with self._lock:
                self._entries = taken
        except Exception as error:  # noqa: BLE001  each `report` that waits for this write raises it
            write.error = error
        finally:
            with self._lock:
                self._under_way = None
            write.done = True

    def _put(self, store: Store, taken: dict[int, QuarantineEntry]) -> dict[int, QuarantineEntry]:
        """Write the entries together with those that another run wrote since, and return all of them.

        Another run may take the folder over while this run's machine sleeps, and its entries must not be lost.
        """
        while True:
            with contextlib.suppress(PreconditionError):
                self._generation = store.put(QUARANTINE_FILE, to_parquet(taken.values()), self._generation)
                return taken
            saved, self._generation = _saved(store)
            there = {entry.index: entry for entry in saved}
            taken = there | {index: entry for index, entry in taken.items() if index not in there}

    def entries(self) -> list[QuarantineEntry]:
        """See `Quarantine.entries`."""
        with self._lock:
            return list(self._loaded().values())

    def indices(self) -> Indices:
        """See `Quarantine.indices`."""
        return np.array(sorted(entry.index for entry in self.entries()), dtype=np.int64)

    def _loaded(self) -> dict[int, QuarantineEntry]:
        if self._entries is None:
            saved, self._generation = ([], 0) if self._run_dir is None else _saved(open_store(self._run_dir))
            self._entries = {entry.index: entry for entry in saved}
        return self._entries


def entry_of(error: ObjectError | DecodeError, *, index: int, case_id: str, uri: str, epoch: int) -> QuarantineEntry:
    """The entry of a case that this error is about; `uri` is that of the object at fault."""
    if isinstance(error, DecodeError):
        reason = error.reason
    elif isinstance(error, ObjectNotFoundError):
        reason = "missing"
    elif isinstance(error, EncodingError):
        reason = "encoding"
    else:
        reason = "stale" if isinstance(error, StaleManifestError) else "corrupt"
    return QuarantineEntry(index, case_id, uri, reason, str(error), epoch)


def over_budget(entries: list[QuarantineEntry], budget: int, *, in_a_run: bool = True) -> QuarantineBudgetError:
    """Return the error that names the cases and the budget.

    Args:
        entries: the bad cases.
        budget: cases that may be bad.
        in_a_run: whether a training run found them, which can be resumed.
    """
    return QuarantineBudgetError(
        f"expected at most {budget} bad cases, found {len(entries)}: {_named(entries)}; mend them, or "
        "raise --data.budget-cases" + (": a run goes on with it by --trainer.resume" if in_a_run else "")
    )


def summary(entries: list[QuarantineEntry], run_dir: str | None = None) -> str:
    """A run's bad cases in one line: how many for which reason, the first names, and where all of them stand."""
    if not entries:
        return "no case was quarantined"
    reasons = collections.Counter(entry.reason for entry in entries).most_common()
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
    where = "" if run_dir is None else f"; all in {run_dir.rstrip('/')}/{QUARANTINE_FILE}"
    return f"{_cases(len(entries))} quarantined ({counts}): {_named(entries, 3, with_uri=False)}{where}"


def to_parquet(entries: Iterable[QuarantineEntry]) -> bytes:
    """A Parquet file of `SCHEMA`, a row an entry."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dataclasses.asdict(entry) for entry in entries], schema=SCHEMA), sink)
    return sink.getvalue()


def load_entries(run_dir: str) -> list[QuarantineEntry]:
    """What a run's folder holds; nothing where there is no such file, or no folder.

    Raises:
        ManifestError: there is a file, and it is not one of ours.
        StoreError: the place cannot be read.
    """
    return _saved(open_store(run_dir))[0]


def _saved(store: Store) -> tuple[list[QuarantineEntry], int | None]:
    """Return the entries in a run's folder and the generation of the file; no entries and 0 if there is no file."""
    try:
        saved = next((found for found in store.list(QUARANTINE_FILE) if found.name == QUARANTINE_FILE), None)
    except PlaceNotFoundError:
        return [], 0
    if saved is None:
        return [], 0
    data = store.fetch([saved])[0]
    try:
        table = pq.read_table(pa.BufferReader(uncompressed(data))).select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ManifestError(
            f"{store.uri_of(QUARANTINE_FILE)}: expected a Parquet file with the columns {SCHEMA.names}, found "
            f"something else ({error}); put back the one that the run wrote, or move it away to try all cases again"
        ) from error
    return [QuarantineEntry(**row) for row in table.to_pylist()], saved.generation


def _named(entries: list[QuarantineEntry], shown: int = SHOWN, *, with_uri: bool = True) -> str:
    names = [
        f"{entry.case_id} ({entry.reason}: {entry.uri})" if with_uri else f"{entry.case_id} ({entry.reason})"
        for entry in entries[:shown]
    ]
    more = f" and {len(entries) - shown} more" if len(entries) > shown else ""
    return ", ".join(names) + more


def _cases(count: int) -> str:
    return "1 case" if count == 1 else f"{count} cases"
