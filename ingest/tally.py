"""What a data worker has done: counted in its process, and handed on about once a second and at each task's end.

Who takes it is a plain callable, so that nothing here knows of Ray or of metrics.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable

from .stores.retry import COMPOSITES, RETRIES

FLUSH_S = 1.0  # so that what is counted costs a call a second and task, and not one a sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one process did since it last told.

    Attributes:
        epoch: of the task that it was done in.
        started_unix_s: when that task began, in seconds since 1970.
        samples: made, ready to train on.
        bytes_read: of objects that arrived whole.
        fetch_s: seconds in which the task had nothing to do but wait for objects.
        transform_s: seconds of decoding, cropping and augmenting.
        composites: composed by this process.
        retries: by kind, as `stores.retry.PassingError` names them.
    """

    epoch: int
    started_unix_s: float
    samples: int = 0
    bytes_read: int = 0
    fetch_s: float = 0.0
    transform_s: float = 0.0
    composites: int = 0
    retries: dict[str, int] = dataclasses.field(default_factory=dict)


Recorder = Callable[[Work], None]
"""Takes what was done; picklable, quick, and raises nothing."""


class Tally:
    """Adds up what this process does. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told = time.monotonic()
        self._epoch, self._started_unix_s = 0, time.time()
        self._sums: collections.Counter[str] = collections.Counter()
        self._fetch_s = self._transform_s = 0.0
        self._before = _counts()

    def begin(self, epoch: int) -> None:
        """A task begins: what came before it belongs to nobody."""
        with self._lock:
            self._take()
            self._epoch, self._started_unix_s = epoch, time.time()

    def fetched(self, *, bytes_read: int, waited_s: float) -> None:
        """Objects arrived, and were waited for so long."""
        with self._lock:
            self._sums["bytes_read"] += bytes_read
            self._fetch_s += waited_s

    def transformed(self, *, samples: int, seconds: float) -> None:
        """Samples were made."""
        with self._lock:
            self._sums["samples"] += samples
            self._transform_s += seconds

    def tell(self, record: Recorder | None, *, now: bool = False) -> None:
        """Hand on what was done since the last time, if that is long enough ago or `now`; to None, keep it."""
        if record is None:
            return
        with self._lock:
            if not now and time.monotonic() - self._told < FLUSH_S:
                return
            work = self._take()
        record(work)

    def _take(self) -> Work:
        counts = _counts()
        changed = {kind: number - self._before.get(kind, 0) for kind, number in counts.items()}
        work = Work(
            epoch=self._epoch,
            started_unix_s=self._started_unix_s,
            samples=self._sums["samples"],
            bytes_read=self._sums["bytes_read"],
            fetch_s=self._fetch_s,
            transform_s=self._transform_s,
            composites=changed.pop("composites", 0),
            retries={kind: number for kind, number in changed.items() if number},
        )
        self._told, self._before = time.monotonic(), counts
        self._sums.clear()
        self._fetch_s = self._transform_s = 0.0
        return work


def _counts() -> dict[str, int]:
    return RETRIES.snapshot() | {"composites": sum(COMPOSITES.snapshot().values())}


TALLY = Tally()
"""This process's own."""
