"""The real pipeline, consumed as Ray Train's ranks do, without a trainer: for what a sample costs."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time

import ray.data
import torch

from ingest.manifest import Manifest
from ingest.pipeline import DataConfig, training_dataset, warm_reader
from ingest.plan import epochs_together
from train.ahead import ReadAhead
from train.batches import tensor_batches
from train.config import TrainerConfig

from .tree import TreeMeter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """One execution of Ray Data over all ranks: an epoch, or as many as a run reads on end between two scorings.

    Attributes:
        epochs: of it.
        samples: delivered as tensors.
        wall_s: from asking for it to its last batch.
        first_batch_s: until the last of the ranks had its first batch; in the first one from making the data set on.
        cpu_s: of the whole process tree.
        cpu_s_by_role: the same, as `tree.ROLES` has them.
    """

    epochs: int
    samples: int
    wall_s: float
    first_batch_s: float
    cpu_s: float
    cpu_s_by_role: dict[str, float]


def run_executions(
    manifest: Manifest,
    data: DataConfig,
    *,
    ranks: int,
    batch: int,
    executions: int,
    meter: TreeMeter,
) -> list[Timing]:
    """Train nothing on so many executions, with the ranks as threads of this process; Ray must be up.

    Args:
        manifest: the cases.
        data: its store's transport is resolved.
        ranks: consumers that share each epoch equally, as Ray Train splits it.
        batch: samples a step and rank.
        executions: how many.
        meter: of this process tree.
    """
    torch.set_num_threads(1)
    asked = time.perf_counter()
    warm_reader(data.label_selector)
    together = epochs_together(manifest.case_bytes(), data.shards)
    epochs = [range(number * together, (number + 1) * together) for number in range(executions)]
    samples = training_dataset(manifest, data, executions=epochs, multiple=ranks * batch, batch=batch, ranks=ranks)
    iterators = samples.streaming_split(ranks, equal=True)
    timings: list[Timing] = []
    for execution in range(executions):
        before_s, started = meter.cpu_s_by_role(), time.perf_counter()
        found: list[tuple[int, float]] = []
        consume = _Consumer(batch, started if execution else asked, found)
        threads = [threading.Thread(target=consume, args=(iterator,)) for iterator in iterators[1:]]
        for thread in threads:
            thread.start()
        consume(iterators[0])
        for thread in threads:
            thread.join()
        if len(found) != ranks:
            raise RuntimeError(f"expected {ranks} ranks to end the execution, found {len(found)}; see the error above")
        spent_s = {role: used_s - before_s[role] for role, used_s in meter.cpu_s_by_role().items()}
        timings.append(
            Timing(
                epochs=together,
                samples=sum(count for count, _ in found),
                wall_s=time.perf_counter() - started,
                first_batch_s=max(first_s for _, first_s in found),
                cpu_s=sum(spent_s.values()),
                cpu_s_by_role=spent_s,
            )
        )
    return timings


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """What one rank does in one execution: takes its batches as tensors, and counts."""

    batch: int
    started: float
    found: list[tuple[int, float]]

    def __call__(self, iterator: ray.data.DataIterator) -> None:
        count, first_s = 0, 0.0
        ahead = TrainerConfig().prefetch_batches
        for tensors in ReadAhead(functools.partial(tensor_batches, iterator, self.batch), ahead):
            if count == 0:
                first_s = time.perf_counter() - self.started
            count += len(tensors["index"])
        self.found.append((count, first_s))
