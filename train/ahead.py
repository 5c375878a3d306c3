"""A rank's batches, epoch by epoch: the next epoch is begun while the last steps of this one are trained.

Ray begins an epoch of a data set when all ranks have ended the one before: it then ends the old executor, plans, starts
read tasks and waits for their first blocks, about half a second in which every GPU stands still. So two data sets take
turns, each for every second epoch, and what Ray does at an epoch's start is done while there is still enough to train
on. What is read is the same; so is its order.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from ray.data import DataIterator

T = TypeVar("T")

TURNS = ("train", "train_next")
"""The names of the two data sets among those of a trainer; the first one has the first epoch."""

LEAD_S = 3.0
"""Seconds of training that an epoch still has when the next is begun: several times what Ray needs for it, and short
enough for the bad cases of an epoch to be known before the next is planned, but for those of its last reads. Of a short
epoch it is a quarter, since the next takes part of the CPUs that it is read with."""


MOST_WAITED = 0.05
"""Share of the time since the middle of an epoch that ranks may have waited for batches for the next to be begun before
the last one. Where reading is what holds them up, two epochs at once would only share its CPUs, and of a few CPUs lose
some: Ray gives each of n data sets a node's free CPUs divided by n, rounded down (1.5 are 0 for each of two)."""


class EpochBatches(Generic[T]):
    """One rank's epochs."""

    def __init__(
        self,
        shard_of: Callable[[str], DataIterator],
        batches: Callable[[DataIterator], Iterable[T]],
        *,
        first_epoch: int,
        epochs: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hold what reading needs.

        Args:
            shard_of: `ray.train.get_dataset_shard`, which waits for the other ranks. Called from threads.
            batches: of one epoch of a shard.
            first_epoch: of this start.
            epochs: of the run.
            clock: seconds; handed in for tests.
        """
        self._shard_of, self._batches, self._clock = shard_of, batches, clock
        self._first_epoch, self._epochs = first_epoch, epochs
        self._shards: dict[str, DataIterator] = {}
        self._opening = threading.Lock()
        self._begun: _Epoch[T] | None = None

    def shard(self, epoch: int) -> DataIterator | None:
        """What an epoch is read from; None while that is not known."""
        return self._shards.get(self._turn(epoch))

    @property
    def begun(self) -> int | None:
        """The epoch that is begun and not asked for yet."""
        return None if self._begun is None else self._begun.number

    def begin(self, epoch: int) -> None:
        """Begin to read an epoch, if it is one of the run's and none is begun."""
        if self._begun is None and epoch < self._epochs:
            self._begun = _Epoch(epoch, functools.partial(self._read, epoch))

    def of(self, epoch: int, steps: int, *, ahead: bool = True) -> Iterator[T]:
        """An epoch's batches; the next epoch is begun on the way.

        Args:
            epoch: the first, or the one after that of the last call.
            steps: about how many batches it has.
            ahead: False does not begin the next: where its turn comes late, since held-out cases are scored before,
                it would take the scoring's CPUs, and Ray ends what nobody takes blocks from for half an hour.

        Raises:
            Exception: whatever made reading fail, also where it failed ahead of time.
        """
        self.begin(epoch)
        mine = self._begun
        if mine is None or mine.number != epoch:
            raise ValueError(
                f"expected epochs one after the other, found {epoch} asked for where {self.begun} is begun, of "
                f"{self._epochs}; ask for that one first"
            )
        self._begun = None
        batches, half = mine.batches(), max(1, steps // 2)
        since_s = waited_s = 0.0
        for taken in itertools.count(1):
            asked_s = self._clock()
            batch = next(batches, None)
            if batch is None:
                break
            now_s = self._clock()
            if taken <= half:
                since_s = now_s
            else:
                waited_s += now_s - asked_s
            if taken == half and epoch + 1 < self._epochs:
                # Its first use starts a process, which takes longer than an epoch's start.
                threading.Thread(target=self._open, args=(epoch + 1,), name="open", daemon=True).start()
            if ahead and self._is_time(steps - taken + 1, steps, taken - half, now_s - since_s, waited_s):
                self.begin(epoch + 1)
            yield batch
        if ahead:
            self.begin(epoch + 1)

    def _is_time(self, left: int, steps: int, timed: int, spent_s: float, waited_s: float) -> bool:
        """Whether a batch is the last, or of the last quarter, with less than the lead to go and few waits of late.

        Args:
            left: batches of the epoch that are not trained on yet.
            steps: of the epoch.
            timed: steps of its second half so far.
            spent_s: seconds that those took.
            waited_s: seconds of these that were waited for batches.
        """
        if left <= 1 or timed < 1:
            return left <= 1
        return left <= steps / 4 and left * spent_s / timed <= LEAD_S and waited_s <= MOST_WAITED * spent_s

    def _read(self, epoch: int) -> Iterator[T]:
        return iter(self._batches(self._open(epoch)))

    def _open(self, epoch: int) -> DataIterator:
        name = self._turn(epoch)
        with self._opening:
            if name not in self._shards:
                self._shards[name] = self._shard_of(name)
        return self._shards[name]

    def _turn(self, epoch: int) -> str:
        return TURNS[(epoch - self._first_epoch) % len(TURNS)]


class _Epoch(Generic[T]):
    """An epoch whose first batch is on its way, in a thread that ends with it or with the process."""

    def __init__(self, number: int, read: Callable[[], Iterator[T]]) -> None:
        self.number = number
        self._read = read
        self._begun: concurrent.futures.Future[tuple[list[T], Iterator[T]]] = concurrent.futures.Future()
        threading.Thread(target=self._run, name=f"epoch-{number}", daemon=True).start()

    def batches(self) -> Iterator[T]:
        """All of them."""
        first, others = self._begun.result()
        while first:
            yield first.pop()
        yield from others

    def _run(self) -> None:
        try:
            batches = self._read()
            self._begun.set_result((list(itertools.islice(batches, 1)), batches))
        except BaseException as error:  # noqa: BLE001  it is raised where the batches are taken
            self._begun.set_exception(error)
