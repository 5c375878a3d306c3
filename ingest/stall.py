"""How long the accelerator waited for data: AU and stalls of one epoch on one rank.

AU (accelerator utilisation) follows MLPerf Storage's formula (source: argonne-lcf/dlio_benchmark,
`utils/statscounter.py`; FACTS section 5):

    AU = sum over steps i >= 2 of compute_i / (T - p_1)

with T the epoch's wall time, barriers included, and p_1 the first step's load and compute together. Ours times
cropping and augmentation too, which DLIO does not have: it is the AU formula, not an MLPerf result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StallReport:
    """One rank's epoch. What cannot be said of so short an epoch is None."""

    steps: int
    """Steps computed."""

    samples: int
    """Samples computed on."""

    wall_s: float
    """From making the meter to `result`, in seconds: T of the formula."""

    wait_s: float
    """Seconds blocked waiting for data, the first batch and the wait for the end of the data included."""

    compute_s: float
    """Seconds inside the loop's body."""

    au: float | None
    """Accelerator utilisation, 0 to 1; None below two steps."""

    stall_share: float | None
    """`wait_s / wall_s`, 0 to 1; None if no time passed."""

    first_batch_s: float | None
    """Seconds from making the meter until the first batch was there; None without a batch."""

    samples_per_s: float | None
    """`samples / wall_s` of this rank; None if no time passed."""

    stall_p50_s: float | None
    """Median wait of the steps after the first, in seconds (the first has its own field); None below two steps."""

    stall_p95_s: float | None
    """95th percentile of the same."""

    stall_p99_s: float | None
    """99th percentile of the same."""


class StallMeter:
    """Times one epoch of a training loop; it starts when it is made, and serves for that epoch only.

    The loop looks like this::

        meter = StallMeter()
        for batch in meter.steps(batches):  # every next() counts as waiting, the loop's body as compute
            ...
        barrier()
        report = meter.result(samples=samples)

    On a GPU, kernels run on after the call returns: let the body end with something that waits for the device
    (reading the loss, or `torch.cuda.synchronize()`), or compute goes uncounted and AU comes out too low. Not
    thread-safe; cheap (two clock readings a step).

    Args:
        clock: Returns the time in seconds, never going back; handed in so that tests are exact.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waits: list[float] = []
        self._computes: list[float] = []
        self._first_batch_s: float | None = None
        self._end_wait_s = 0.0
        self._aside_s = 0.0
        self._started = clock()

    def steps(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, with the wait for each and the step made of each recorded.

        Args:
            batches: Any iterable; making its iterator counts as waiting for its first batch.

        Yields:
            What `batches` yields, unchanged. A loop may be left early: its last body counts.
        """
        before = self._clock()
        iterator = iter(batches)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                self._end_wait_s += self._clock() - before
                return
            now = self._clock()
            self._waits.append(now - before)
            if self._first_batch_s is None:
                self._first_batch_s = now - self._started
            try:
                yield batch
            finally:  # also when the loop is left by `break`, which closes this generator
                before = self._clock()
                self._computes.append(before - now - self._aside_s)
                self._aside_s = 0.0

    def timed(self, first: int) -> list[tuple[float, float]]:
        """Seconds of waiting and of computing for each step from the `first` (from 0) whose body has ended."""
        return list(zip(self._waits[first : len(self._computes)], self._computes[first:], strict=True))

    @property
    def waited_s(self) -> float:
        """Seconds blocked waiting for data so far."""
        return sum(self._waits) + self._end_wait_s

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within a step: what is neither computing nor waiting for data, such as writing a checkpoint."""
        before = self._clock()
        try:
            yield
        finally:
            self._aside_s += self._clock() - before

    def result(self, *, samples: int) -> StallReport:
        """The epoch's figures on this rank; call it after the closing barrier, which belongs to T.

        Args:
            samples: Samples that this rank trained on in the epoch.

        Returns:
            The figures, up to now.
        """
        wall_s = self._clock() - self._started
        wait_s = self.waited_s
        later = self._waits[1:]
        return StallReport(
            steps=len(self._computes),
            samples=samples,
            wall_s=wall_s,
            wait_s=wait_s,
            compute_s=sum(self._computes),
            au=self._au(wall_s),
            stall_share=wait_s / wall_s if wall_s > 0 else None,
            first_batch_s=self._first_batch_s,
            samples_per_s=samples / wall_s if wall_s > 0 else None,
            stall_p50_s=percentile(later, 50),
            stall_p95_s=percentile(later, 95),
            stall_p99_s=percentile(later, 99),
        )

    def _au(self, wall_s: float) -> float | None:
        if len(self._computes) < 2:
            return None
        steady_s = wall_s - (self._waits[0] + self._computes[0])
        return sum(self._computes[1:]) / steady_s if steady_s > 0 else None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The value below which `percent` of 100 of the values lie, between neighbours in a straight line.

    Args:
        values: In any order.
        percent: 0 to 100.

    Returns:
        The percentile, in the values' unit; None of nothing.
    """
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
