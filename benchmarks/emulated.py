"""What a rank of an emulated job does: it sleeps through each step, and meets the others."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray.data
import ray.train
import torch

from ingest.stall import StallMeter, StallReport
from train.ahead import EpochBatches, executions_of
from train.batches import Batch, step_batches
from train.loop import check_epoch
from train.validate import gather

from .meeting import Meeting


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmulatedJob:
    """What every rank is given: plain values.

    Attributes:
        step_s: seconds of one step's emulated compute; 0 computes nothing.
        epochs: passes over the cases.
        together: epochs that one execution of Ray Data reads.
        steps_per_epoch: of each rank.
        batch: samples a step.
        prefetch_batches: as `train.config` has it.
        in_memory: whether every step takes the same batch out of memory, and nothing is read.
    """

    step_s: float
    epochs: int
    together: int
    steps_per_epoch: int
    batch: int
    prefetch_batches: int
    in_memory: bool = False

    def executions(self) -> list[range]:
        """The epochs of each; nothing is scored between them."""
        return executions_of(range(self.epochs), self.together, lambda _: False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankReport:
    """One rank's run.

    Attributes:
        whole: all epochs on end.
        by_epoch: each epoch by itself, as DLIO has it.
    """

    whole: StallReport
    by_epoch: list[StallReport]


def emulated_loop(config: Mapping[str, Any]) -> list[RankReport]:
    """What each rank runs; Ray hands back the answer of rank 0, which is every rank's."""
    torch.set_num_threads(1)
    meeting = Meeting(ray.train.get_context().get_world_rank())
    reports = gather(EmulatedRank(config["job"], meeting).run())
    meeting.close()
    return reports


class EmulatedRank:
    """One rank's epochs, timed as one run and each by itself."""

    def __init__(
        self,
        job: EmulatedJob,
        meeting: Meeting,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Start timing the whole run.

        Args:
            job: the steps to emulate.
            meeting: joins the ranks after each step.
            clock: gives seconds; tests hand in one that they move themselves.
            sleep: takes the seconds of a step's compute.
        """
        self.job, self.meeting = job, meeting
        self.clock, self.sleep = clock, sleep
        self.by_epoch: list[StallReport] = []
        self.whole = StallMeter(clock)
        self.epoch = self.whole

    def run(self) -> RankReport:
        """Sleep through every step."""
        samples = 0
        for batch in self.whole.steps(self._steps()):
            if self.job.step_s:
                self.sleep(self.job.step_s)
            samples += len(batch["index"])
            with self.whole.aside(), self.epoch.aside():
                self.meeting.wait()
        return RankReport(whole=self.whole.result(samples=samples), by_epoch=self.by_epoch)

    def _steps(self) -> Iterator[Batch]:
        epochs: EpochBatches[tuple[Batch, list[int]]] | _InMemory = _InMemory(self.job.batch)
        if not self.job.in_memory:
            epochs = EpochBatches(
                ray.train.get_dataset_shard,
                functools.partial(step_batches, batch_size=self.job.batch),
                executions=self.job.executions(),
                ahead=self.job.prefetch_batches,
            )
        for number in range(self.job.epochs):
            samples = 0
            self.epoch = StallMeter(self.clock)
            for batch, found in self.epoch.steps(epochs.of(number, self.job.steps_per_epoch)):
                check_epoch(found, number)
                samples += len(batch["index"])
                yield batch
            self.by_epoch.append(self.epoch.result(samples=samples))


@dataclasses.dataclass(frozen=True)
class _InMemory:
    """Epochs whose batches hold nothing but the numbers that the loop looks at."""

    batch: int

    def of(self, epoch: int, steps: int) -> Iterator[tuple[Batch, list[int]]]:
        """So many batches of an epoch."""
        yield from itertools.repeat(({"index": torch.arange(self.batch)}, [epoch]), times=steps)
