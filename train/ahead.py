"""A rank's batches, epoch by epoch, without a pause between epochs.

Ray begins an execution of a data set when all ranks have ended the one before: it then ends the old executor, plans,
starts read tasks and waits for their first blocks, about half a second in which every GPU stands still. So small epochs
are read several in one execution, as long as nothing is scored between them; and two data sets take turns, each for
every second execution, so that what Ray does at the start of one is done while there is still enough to train on. What
is read is the same; so is its order.

What a rank takes was made ready by a thread (`ReadAhead`), so that the trainer's own, which is what a GPU waits for,
does none of the work. Where blocks come from other nodes, the batches that are ready hide their way as well.
"""

from __future__ import annotations

import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from ray.data import DataIterator

T = TypeVar("T")
_Ready = tuple[T] | BaseException | None

TURNS = ("train", "train_next")
"""The names of the two data sets among those of a trainer; the first one has the first execution."""

LEAD_S = 3.0
"""Seconds of training that an execution still has when the next is begun: several times what Ray needs for it, and
short enough for the bad cases of an epoch to be known before the next is planned, but for those of its last reads. Of a
short execution it is a quarter, since the next takes part of the CPUs that it is read with; and it is half of the last
epoch at the most."""


MOST_WAITED = 0.05
"""Share of the time since the middle of an epoch that ranks may have waited for batches for the next to be begun before
the last one. Where reading is what holds them up, two executions at once would only share its CPUs, and of a few CPUs
lose some: Ray gives each of n data sets a node's free CPUs divided by n, rounded down (1.5 are 0 for each of two)."""


def executions_of(epochs: range, most: int, evaluates: Callable[[int], bool]) -> list[range]:
    """Which epochs are read in one execution of Ray Data.

    Args:
        epochs: that are trained.
        most: epochs of one execution, as `ingest.plan.epochs_together` says.
        evaluates: whether held-out cases are scored after an epoch. An execution ends there: one that goes on would
            hold the CPUs that scoring waits for, while its ranks wait for the scoring.
    """
    found: list[range] = []
    start = epochs.start
    for stop in (epoch + 1 for epoch in epochs if evaluates(epoch) or epoch == epochs[-1]):
        parts = -(-(stop - start) // most)  # of about one length: a short one left over would pay a start for little
        cuts = [start + (stop - start) * part // parts for part in range(parts + 1)]
        found += [range(*cut) for cut in itertools.pairwise(cuts)]
        start = stop
    return found


class EpochBatches(Generic[T]):
    """One rank's epochs."""

    def __init__(
        self,
        shard_of: Callable[[str], DataIterator],
        batches: Callable[[DataIterator], Iterable[T]],
        *,
        executions: Sequence[range],
        ahead: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hold what reading needs.

        Args:
            shard_of: `ray.train.get_dataset_shard`, which waits for the other ranks. Called from threads.
            batches: of one execution of a shard.
            executions: the epochs of each, from this start to the run's end.
            ahead: batches that are made ready before they are asked for.
            clock: seconds; handed in for tests.
        """
        self._shard_of, self._batches, self._clock = shard_of, batches, clock
        self._executions, self._ahead = executions, ahead
        self._number = {epoch: number for number, epochs in enumerate(executions) for epoch in epochs}
        self._shards: dict[str, DataIterator] = {}
        self._opening = threading.Lock()
        self._begun: tuple[int, ReadAhead[T]] | None = None
        self._read_now: ReadAhead[T] | None = None
        self._reading: tuple[int, Iterator[T]] | None = None

    def shard(self, epoch: int) -> DataIterator | None:
        """What an epoch is read from; None while that is not known."""
        return self._shards.get(self._turn(epoch)) if epoch in self._number else None

    @property
    def begun(self) -> int | None:
        """The epoch whose execution is begun, where none of it is asked for yet."""
        return None if self._begun is None else self._begun[0]

    def begin(self, epoch: int) -> None:
        """Begin the execution that starts with an epoch, if one does and none is begun."""
        if self._begun is None and epoch in self._number and self._execution(epoch).start == epoch:
            self._begun = epoch, ReadAhead(functools.partial(self._read, epoch), self._ahead)

    def of(self, epoch: int, steps: int, *, ahead: bool = True) -> Iterator[T]:
        """An epoch's batches; where it is the last of its execution, the next one is begun on the way.

        Args:
            epoch: the first, or the one after that of the last call, whose batches have all been taken.
            steps: how many batches it has; of the last one of an execution, about how many.
            ahead: False does not begin the next: where its turn comes late, since held-out cases are scored before,
                it would take the scoring's CPUs, and Ray ends what nobody takes blocks from for half an hour.

        Raises:
            RuntimeError: an epoch of an execution of several has fewer batches than it should.
            Exception: whatever made reading fail, also where it failed ahead of time.
        """
        batches = self._batches_from(epoch)
        execution = self._execution(epoch)
        last, half, quarter = epoch == execution[-1], max(1, steps // 2), steps * len(execution) / 4
        since_s = waited_s = 0.0
        for taken in itertools.count(1):
            if taken > steps and not last:
                self._reading = epoch + 1, batches
                return
            asked_s = self._clock()
            batch = next(batches, None)
            if batch is None and len(execution) > 1 and taken <= steps:
                raise RuntimeError(
                    f"expected {steps} batches of epoch {epoch + 1}, since epochs {execution.start + 1} to "
                    f"{execution.stop} are read on end, found {taken - 1}: Ray shares blocks out otherwise than 2.60 "
                    "does; install the Ray of constraints.txt, or give --data.shards.execution-cases 1"
                )
            if batch is None:
                break
            now_s = self._clock()
            if taken <= half:
                since_s = now_s
            else:
                waited_s += now_s - asked_s
            if taken == half and epoch == execution.start and execution.stop in self._number:
                # Its first use starts a process, which takes longer than an execution's start.
                threading.Thread(target=self._open, args=(execution.stop,), name="open", daemon=True).start()
            if ahead and self._is_time(steps - taken + 1, quarter, taken - half, now_s - since_s, waited_s):
                self.begin(epoch + 1)
            yield batch
        if ahead:
            self.begin(epoch + 1)

    def close(self) -> None:
        """Let go of an execution that is begun and of one that is being read, of which nothing more comes."""
        for execution in (self._begun and self._begun[1], self._read_now):
            if execution is not None:
                execution.close()
        self._begun = self._reading = self._read_now = None

    def _batches_from(self, epoch: int) -> Iterator[T]:
        if self._reading is None:
            self.begin(epoch)
        due = self.begun if self._reading is None else self._reading[0]
        if due != epoch:
            wanted = "the first of an execution" if due is None else due + 1
            raise ValueError(
                f"expected epochs one after the other, found {epoch + 1} asked for where {wanted} is due; ask for that "
                "first"
            )
        if self._reading is not None:
            batches, self._reading = self._reading[1], None
            return batches
        assert self._begun is not None
        (_, self._read_now), self._begun = self._begun, None
        return iter(self._read_now)

    def _is_time(self, left: int, quarter: float, timed: int, spent_s: float, waited_s: float) -> bool:
        """Whether a batch is the last, or of the last quarter, with less than the lead to go and few waits of late.

        Args:
            left: batches of the execution that are not trained on yet.
            quarter: a quarter of all of its batches.
            timed: steps of the second half of its last epoch so far.
            spent_s: seconds that those took.
            waited_s: seconds of these that were waited for batches.
        """
        if left <= 1 or timed < 1:
            return left <= 1
        return left <= quarter and left * spent_s / timed <= LEAD_S and waited_s <= MOST_WAITED * spent_s

    def _read(self, epoch: int) -> Iterable[T]:
        return self._batches(self._open(epoch))

    def _open(self, epoch: int) -> DataIterator:
        name = self._turn(epoch)
        with self._opening:
            if name not in self._shards:
                self._shards[name] = self._shard_of(name)
        return self._shards[name]

    def _turn(self, epoch: int) -> str:
        return TURNS[self._number[epoch] % len(TURNS)]

    def _execution(self, epoch: int) -> range:
        return self._executions[self._number[epoch]]


class ReadAhead(Generic[T]):
    """Iterates in a thread of its own, from when it is made, a few items ahead of who takes them, once."""

    def __init__(self, read: Callable[[], Iterable[T]], ahead: int) -> None:
        """Start the thread. It ends when all is read, when the taking ends, or with the process.

        Args:
            read: what to iterate over; called in the thread.
            ahead: items that are ready before they are asked for, 1 or more.
        """
        self._read = read
        self._ready: queue.SimpleQueue[_Ready[T]] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._ended = threading.Event()
        for _ in range(ahead - 1):
            self._room.put(None)
        threading.Thread(target=self._run, name="read-ahead", daemon=True).start()

    def __iter__(self) -> Iterator[T]:
        """All items.

        Raises:
            Exception: whatever made reading fail, once what was read before it is taken.
        """
        try:
            while not self._ended.is_set() and (ready := self._ready.get()) is not None:
                if isinstance(ready, BaseException):
                    raise ready
                self._room.put(None)
                yield ready[0]
        finally:
            self.close()

    def close(self) -> None:
        """Let the thread end: what it has read is thrown away, and nothing more comes; not while one is waited for."""
        self._ended.set()
        self._room.put(None)

    def _run(self) -> None:
        try:
            for item in self._read():
                self._ready.put((item,))
                self._room.get()
                if self._ended.is_set():
                    return
            self._ready.put(None)
        except BaseException as error:  # noqa: BLE001  it is raised where the items are taken
            self._ready.put(error)
