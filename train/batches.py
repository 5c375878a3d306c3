"""A rank's batches of one execution of Ray Data, as tensors in the host's memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy.typing as npt
import torch
from ray.data import DataIterator
from ray.data.collate_fn import NumpyBatchCollateFn

Batch = dict[str, torch.Tensor]
_HOOK = "_create_batch_iterator"


class ToTensors(NumpyBatchCollateFn):
    """Views a batch's columns as tensors. They lie in the object store and are not to be written to."""

    def __init__(self) -> None:
        """Silence torch, which warns of memory that may not be written to; nothing of ours writes to a batch."""
        super().__init__()
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> Any:
        """`image` (N, C, D, H, W) float32, `label` (N, 1, D, H, W) uint8, `index` and `epoch` (N,) int64."""
        return {name: torch.from_numpy(batch[name]) for name in ("image", "label", "index", "epoch")}


def tensor_batches(
    shard: DataIterator, batch_size: int, *, pin_memory: bool = False, drop_last: bool = True
) -> Iterator[Batch]:
    """One execution of a data set, a step's batch each; to be taken ahead of the steps, by `ahead.ReadAhead`.

    Ray's own prefetching is off: it hands a block on only when the one after it has come. At an execution's start, when
    blocks come slowly, ranks then wait for one that they do not need yet.

    Args:
        shard: of this rank.
        batch_size: samples of a batch.
        pin_memory: copies batches to memory that a GPU can copy from by itself.
        drop_last: leaves out a last batch that is smaller.

    Yields:
        Columns as `ToTensors` has them.
    """
    # Without prefetching Ray 2.60 never ends the thread that it makes for it, one an execution. Its iterator is
    # private, and so is this hook; a test counts threads.
    made: list[Any] = []

    def kept(*args: Any, **kwargs: Any) -> Any:
        made.append(type(shard)._create_batch_iterator(shard, *args, **kwargs))
        return made[-1]

    vars(shard)[_HOOK] = kept
    try:
        yield from shard.iter_torch_batches(
            batch_size=batch_size,
            prefetch_batches=0,
            collate_fn=ToTensors(),
            drop_last=drop_last,
            device="cpu",
            pin_memory=pin_memory,
        )
    finally:
        vars(shard).pop(_HOOK, None)  # for this execution only: it holds on to what the iterator does
        for iterator in made:
            iterator._prefetcher.stop()


def step_batches(
    shard: DataIterator, batch_size: int, *, pin_memory: bool = False
) -> Iterator[tuple[Batch, list[int]]]:
    """As `tensor_batches`, and with each batch its epochs, so that the steps need not look them up."""
    for batch in tensor_batches(shard, batch_size, pin_memory=pin_memory):
        yield batch, epochs_of(batch)


def epochs_of(batch: Batch) -> list[int]:
    """The epochs of a batch's samples, ascending: one, unless Ray does not do as it should."""
    return sorted(set(batch["epoch"].tolist()))
