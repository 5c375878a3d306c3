"""What has been trained on in an epoch: recorded by each rank, kept in each checkpoint, joined on a restart."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable

import numpy as np

from .plan import Indices


@dataclasses.dataclass(frozen=True)
class EpochPart:
    """One rank's part of one epoch, or several joined.

    Attributes:
        epoch: which one.
        indices: (n,) int64, the cases trained on, each once.
        loss_sum: sum of the cases' losses.
        steps: optimiser steps that took part.
    """

    epoch: int
    indices: Indices
    loss_sum: float = 0.0
    steps: int = 0

    def to_bytes(self) -> bytes:
        """The part as an `.npz` whose cases are a bitmap; `from_bytes` reads it, with the cases in ascending order."""
        trained = np.zeros(int(self.indices.max()) + 1 if len(self.indices) else 0, dtype=bool)
        trained[self.indices] = True
        file = io.BytesIO()
        np.savez_compressed(
            file, epoch=self.epoch, bitmap=np.packbits(trained), loss_sum=np.float64(self.loss_sum), steps=self.steps
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> EpochPart:
        """Read what `to_bytes` made, in this version or in earlier ones, which kept indices; nothing is unpickled.

        Raises:
            ValueError, KeyError, zipfile.BadZipFile: `data` is something else, or damaged.
        """
        with np.load(io.BytesIO(data), allow_pickle=False) as saved:
            indices = saved["indices"] if "indices" in saved else np.flatnonzero(np.unpackbits(saved["bitmap"]))
            return cls(
                int(saved["epoch"]),
                indices.astype(np.int64, copy=False),
                float(saved["loss_sum"]),
                int(saved["steps"]),
            )

    def __reduce__(self) -> tuple[Callable[[bytes], EpochPart], tuple[bytes]]:
        return EpochPart.from_bytes, (self.to_bytes(),)  # a bit a case between ranks, where an index is eight bytes


def join(parts: Iterable[EpochPart]) -> EpochPart:
    """All ranks' parts of one epoch as one.

    Raises:
        ValueError: the parts are of different epochs, or a case is in two of them.
    """
    listed = list(parts)
    epochs = {part.epoch for part in listed}
    if len(epochs) != 1:
        raise ValueError(f"expected parts of one epoch, found {[epoch + 1 for epoch in sorted(epochs)]}")
    indices = np.concatenate([part.indices for part in listed])
    unique, counts = np.unique(indices, return_counts=True)
    if len(unique) != len(indices):
        raise ValueError(f"expected each case once, found twice: {unique[counts > 1][:5].tolist()}")
    return EpochPart(epochs.pop(), indices, sum(part.loss_sum for part in listed), sum(part.steps for part in listed))


class EpochRecorder:
    """Records what this rank trains on in one epoch, and refuses what was trained on before."""

    def __init__(self, epoch: int, cases: int, before: EpochPart | None = None, *, keeps_before: bool = False) -> None:
        """Begin, or go on with, an epoch.

        Args:
            epoch: which one.
            cases: of the whole manifest.
            before: what all ranks had trained on when the checkpoint was written that this run goes on from.
            keeps_before: whether this rank's part includes `before`: one rank's does, so that none is lost.
        """
        self.epoch = epoch
        self._seen = np.zeros(cases, dtype=bool)  # by any rank before, or by this one
        self._mine = np.zeros(cases, dtype=bool)  # a byte a case, where an index is eight
        self._loss_sum, self._steps = 0.0, 0
        if before is not None:
            self._seen[before.indices] = True
            if keeps_before:
                self._mine[before.indices] = True
                self._loss_sum, self._steps = before.loss_sum, before.steps

    def add(self, indices: Indices, loss: float) -> None:
        """Record one step; `loss` is the sum of its cases' losses. Nothing is kept of `indices`, which view a block.

        Raises:
            RuntimeError: a case was trained on already in this epoch.
        """
        again = indices[self._seen[indices]]
        if len(again) or len(np.unique(indices)) != len(indices):
            raise RuntimeError(
                f"expected each case once in epoch {self.epoch + 1}, found {again[:5].tolist()} again: the checkpoint "
                "that the data were planned from is not the one that the model was restored from; report this with the "
                "log"
            )
        self._seen[indices] = True
        self._mine[indices] = True
        self._loss_sum += loss
        self._steps += 1

    def part(self) -> EpochPart:
        """This rank's part so far, its cases in ascending order."""
        indices = np.flatnonzero(self._mine).astype(np.int64, copy=False)
        return EpochPart(self.epoch, indices, self._loss_sum, self._steps)
