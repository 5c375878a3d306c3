"""Epochs of the real pipeline, consumed as Ray Train's ranks do, without a trainer: for what a sample costs."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

import ray.data
import torch

from ingest.manifest import Manifest
from ingest.pipeline import DataConfig, training_dataset, warm_reader
from train.loop import ToTensors

from .tree import TreeMeter


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochTiming:
    """One epoch over all ranks.

    Attributes:
        samples: delivered as tensors.
        wall_s: from asking for it to its last batch.
        first_batch_s: until the last of the ranks had its first batch; in the first epoch from making the data set on.
        cpu_s: of the whole process tree.
    """

    samples: int
    wall_s: float
    first_batch_s: float
    cpu_s: float


def run_epochs(
    manifest: Manifest,
    data: DataConfig,
    *,
    ranks: int,
    batch: int,
    epochs: int,
    prefetch_batches: int = 1,
    meter: TreeMeter,
) -> list[EpochTiming]:
    """Train nothing on so many epochs, with the ranks as threads of this process; Ray must be up.

    Args:
        manifest: the cases.
        data: its store's transport is resolved.
        ranks: consumers that share each epoch equally, as Ray Train splits it.
        batch: samples a step and rank.
        epochs: how many.
        prefetch_batches: as `train.config` has it.
        meter: of this process tree.
    """
    torch.set_num_threads(1)
    asked = time.perf_counter()
    warm_reader(data.label_selector)
    samples = training_dataset(manifest, data, multiple=ranks * batch, batch=batch, ranks=ranks)
    iterators = samples.streaming_split(ranks, equal=True)
    timings: list[EpochTiming] = []
    for epoch in range(epochs):
        cpu_s, started = meter.cpu_s(), time.perf_counter()
        found: list[tuple[int, float]] = []
        consume = _Consumer(batch, prefetch_batches, started if epoch else asked, found)
        threads = [threading.Thread(target=consume, args=(iterator,)) for iterator in iterators[1:]]
        for thread in threads:
            thread.start()
        consume(iterators[0])
        for thread in threads:
            thread.join()
        if len(found) != ranks:
            raise RuntimeError(f"expected {ranks} ranks to end the epoch, found {len(found)}; the error stands above")
        timings.append(
            EpochTiming(
                samples=sum(count for count, _ in found),
                wall_s=time.perf_counter() - started,
                first_batch_s=max(first_s for _, first_s in found),
                cpu_s=meter.cpu_s() - cpu_s,
            )
        )
    return timings


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """What one rank does in one epoch: takes its batches as tensors, and counts."""

    batch: int
    prefetch_batches: int
    started: float
    found: list[tuple[int, float]]

    def __call__(self, iterator: ray.data.DataIterator) -> None:
        count, first_s = 0, 0.0
        batches: Any = iterator.iter_torch_batches(
            batch_size=self.batch,
            prefetch_batches=self.prefetch_batches,
            drop_last=True,
            collate_fn=ToTensors(),
        )
        for tensors in batches:
            if count == 0:
                first_s = time.perf_counter() - self.started
            count += len(tensors["index"])
        self.found.append((count, first_s))
