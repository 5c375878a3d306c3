"""What a rank tells the run's monitor of its steps, about once a second, and what an epoch's waits come to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ingest.stall import StallMeter, StallReport

from .monitor import Monitor, Pulse
from .records import StepRecord
from .waits import EpochWork, blocked_so_far, by_cause

PULSE_S = 1.0


class Pulses:
    """One rank's telling; with no monitor it keeps to itself what an epoch's waits were."""

    def __init__(self, monitor: Monitor | None, rank: int, ranks: int) -> None:
        """Begin a start of this rank.

        Args:
            monitor: is told; None where there is none.
            rank: this one.
            ranks: of this start.
        """
        self._monitor, self._rank, self._ranks = monitor, rank, ranks
        self._epoch: int | None = None

    def begin(self, epoch: int, meter: StallMeter, steps_per_epoch: int, shard: Callable[[], Any]) -> None:
        """An epoch begins.

        Args:
            epoch: its number.
            meter: has just been made.
            steps_per_epoch: about how many it has.
            shard: gives Ray's data iterator, whose account of blocked time is read, or None while it is not known.
        """
        self._shard = shard
        self._epoch, self._meter, self._steps_per_epoch = epoch, meter, steps_per_epoch
        self._started_unix_s = time.time()
        self._steps: list[tuple[int, float, float, float, int]] = []
        self._timed = 0
        self._samples = self._samples_told = 0
        self._waited_told_s = 0.0
        self._told = time.monotonic()
        self._blocked_before = self._blocked_told = blocked_so_far(self._shard())

    def step(self, *, step: int, done: int, loss: float, learning_rate: float, samples: int) -> None:
        """A step is made, of which the epoch has `done` by now."""
        self._samples += samples
        self._step, self._done = step, done
        self._steps.append((step, time.time(), loss, learning_rate, samples))
        if time.monotonic() - self._told >= PULSE_S:
            self.tell()

    def end(self, timing: StallReport) -> dict[str, Any]:
        """The epoch's last batch is trained on: fields of its row, in seconds.

        Returns:
            `wall_s` and `stall_s` of the epoch on this rank, and `stall_by_cause_s`, which adds up to `stall_s`.
        """
        self.tell()
        answer = self._monitor.ask("work_of", self._epoch) if self._monitor is not None else None
        work = answer if isinstance(answer, EpochWork) else EpochWork()
        self._epoch = None
        starting_s = 0.0
        if work.first_task_unix_s is not None:
            # Clocks of two nodes may differ: the first batch bounds it.
            starting_s = min(work.first_task_unix_s - self._started_unix_s, timing.first_batch_s or 0.0)
        blocked = blocked_so_far(self._shard()).since(self._blocked_before)
        return {
            "wall_s": timing.wall_s,
            "stall_s": timing.wait_s,
            "stall_by_cause_s": by_cause(timing.wait_s, blocked, work, starting_s),
        }

    def tell(self) -> None:
        """Tell what is not told yet, if there is anything."""
        if self._monitor is None or self._epoch is None or not self._steps:
            return
        timed = self._meter.timed(self._timed)  # of the newest step's body, the end is not known yet
        self._timed += len(timed)
        records = [
            StepRecord(
                epoch=self._epoch,
                step=step,
                ended_unix_s=ended_unix_s,
                wait_s=wait_s,
                compute_s=compute_s,
                loss=loss,
                learning_rate=rate,
                samples=samples,
            )
            for (step, ended_unix_s, loss, rate, samples), (wait_s, compute_s) in zip(self._steps, timed, strict=False)
        ]
        self._steps = self._steps[len(timed) :]
        blocked, waited_s = blocked_so_far(self._shard()), self._meter.waited_s
        so_far = self._meter.result(samples=self._samples)
        self._monitor.tell(
            "pulse",
            Pulse(
                rank=self._rank,
                ranks=self._ranks,
                epoch=self._epoch,
                step=self._step,
                steps_of_epoch=self._done,
                steps_per_epoch=self._steps_per_epoch,
                started_unix_s=self._started_unix_s,
                first_batch_s=so_far.first_batch_s,
                waited_s=waited_s - self._waited_told_s,
                blocked=blocked.since(self._blocked_told),
                records=records if self._rank == 0 else [],
                samples=self._samples - self._samples_told,
                samples_per_s=so_far.samples_per_s,
                au=so_far.au,
            ),
        )
        self._told, self._waited_told_s, self._blocked_told = time.monotonic(), waited_s, blocked
        self._samples_told = self._samples
