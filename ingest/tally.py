"""What a data worker has done: counted in its process, by epoch, and handed on about once a second and at a task's end.

Who takes it is a plain callable, so that nothing here knows of Ray or of metrics.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

import numpy as np

from .plan import Indices
from .stores.retry import COMPOSITES, RETRIES

FLUSH_S = 1.0  # so that what is counted costs a call a second, task and epoch, and not one a sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one process did for one epoch since it last told.

    Attributes:
        epoch: that it was done for.
        started_unix_s: when the task began with this epoch, in seconds since 1970.
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


@dataclasses.dataclass
class _Sums:
    samples: int = 0
    bytes_read: int = 0
    fetch_s: float = 0.0
    transform_s: float = 0.0


class Tally:
    """Adds up what this process does. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest = 0
        self._started_unix_s: dict[int, float] = {}
        self._restart()

    def begin(self, epoch: int) -> None:
        """A task begins, with a case of this epoch: what came before it belongs to nobody."""
        with self._lock:
            self._restart()
            self._newest, self._started_unix_s = epoch, {epoch: time.time()}
            self._of(epoch)

    def fetched(self, epoch: int, *, bytes_read: int, waited_s: float) -> None:
        """Objects of an epoch arrived, and were waited for so long."""
        with self._lock:
            self._newest = epoch
            sums = self._of(epoch, waited_s)
            sums.bytes_read += bytes_read
            sums.fetch_s += waited_s

    def transformed(self, epochs: Indices, seconds: float) -> None:
        """Samples were made, each of an epoch; those of one block take the same time each."""
        numbers, counts = np.unique(epochs, return_counts=True)
        with self._lock:
            if not len(numbers):
                self._of(self._newest).transform_s += seconds
            for epoch, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                sums = self._of(epoch)
                sums.samples += count
                sums.transform_s += seconds * count / len(epochs)

    def tell(self, record: Recorder | None, *, now: bool = False) -> None:
        """Hand on what was done since the last time, if that is long enough ago or `now`; to None, keep it."""
        if record is None:
            return
        with self._lock:
            if not now and time.monotonic() - self._told < FLUSH_S:
                return
            works = self._works()
            self._restart()
        for work in works:
            record(work)

    def _of(self, epoch: int, already_s: float = 0.0) -> _Sums:
        self._started_unix_s.setdefault(epoch, time.time() - already_s)
        return self._sums.setdefault(epoch, _Sums())

    def _works(self) -> list[Work]:
        """One an epoch; what is counted for the whole process goes to the newest."""
        changed = {kind: number - self._before.get(kind, 0) for kind, number in _counts().items()}
        composites = changed.pop("composites", 0)
        retries = {kind: number for kind, number in changed.items() if number}
        self._of(self._newest)
        return [
            Work(
                epoch=epoch,
                started_unix_s=self._started_unix_s[epoch],
                **vars(sums),
                composites=composites if epoch == self._newest else 0,
                retries=retries if epoch == self._newest else {},
            )
            for epoch, sums in sorted(self._sums.items())
        ]

    def _restart(self) -> None:
        self._told, self._before = time.monotonic(), _counts()
        self._sums: dict[int, _Sums] = {}


def _counts() -> dict[str, int]:
    return RETRIES.snapshot() | {"composites": sum(COMPOSITES.snapshot().values())}


TALLY = Tally()
"""This process's own."""
