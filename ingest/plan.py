"""What is read of an epoch, or of several on end: cases, in which order, in which shards. Pure functions, no I/O."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .errors import ConfigError

Indices = npt.NDArray[np.int64]

# Philox takes a key of two 64-bit words and a counter of four. What a stream is for is the counter's third word,
# the case its second: every (seed, epoch, purpose, case) is a stream of its own, 2**64 draws from the next.
ORDER, TRANSFORM, HOLDOUT = range(3)


def stream(seed: int, epoch: int, case: int, purpose: int) -> np.random.Generator:
    """A random generator that is a function of its arguments alone.

    Counter-based (Philox 4x64, Salmon et al., SC 2011), so streams of different arguments never overlap.
    """
    bit_generator = np.random.Philox(
        key=np.array([seed, epoch], dtype=np.uint64),
        counter=np.array([0, case, purpose, 0], dtype=np.uint64),
    )
    return np.random.Generator(bit_generator)


def epoch_order(seed: int, epoch: int, cases: int) -> Indices:
    """A permutation of 0 to cases - 1: (cases,) int64, a function of the arguments alone."""
    return stream(seed, epoch, 0, ORDER).permutation(cases).astype(np.int64, copy=False)


def split_holdout(seed: int, subjects: Indices, fraction: float) -> tuple[Indices, Indices]:
    """Split all cases into training and held-out ones, each ascending; a subject's cases stay together.

    The held-out part is a function of (seed, subjects) and of at least one subject where `fraction` is above 0.

    Args:
        seed: which subjects are held out.
        subjects: (N,) int64, for each case the number of its subject, from 0 without a gap.
        fraction: share of the subjects.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"the held-out fraction must be from 0 to below 1; got {fraction}")
    total = int(subjects.max()) + 1
    held = 0 if fraction == 0 else max(1, round(total * fraction))
    if held >= total:
        raise ConfigError(
            f"expected subjects to train on, found {total} of which {held} would be held out; "
            "add cases or lower --data.holdout-fraction"
        )
    chosen = np.zeros(total, dtype=bool)
    chosen[stream(seed, 0, 0, HOLDOUT).permutation(total)[:held]] = True
    held_out = chosen[subjects]
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


LEAST_SHARDS = 8
LEAST_BLOCKS = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardConfig:
    """How large one read task is, and what it hands on at a time."""

    shard_cases: int = 768
    """Cases in one shard at the most; an eighth of a smaller epoch, so that several workers have something to do. A
    task costs Ray about as much CPU as 40 cases of 160 KB; where more than some 30 CPUs read, or few cases are
    transformed at length, take fewer cases."""

    shard_bytes: int = 128 * 2**20
    """Bytes of one shard's objects at the most; a case larger than that is a shard of its own. Of a case whose
    patch is cut as it is read (`--data.fetch.slabs`) the patch counts, or a third of what is read if that is more."""

    block_bytes: int = 32 * 2**20
    """Bytes of samples that go through Ray's object store together, in whole batches: each such block costs Ray about
    10 ms of CPU. An eighth of a smaller epoch's batches."""

    execution_cases: int = 32_768
    """Epochs of fewer cases are read several in one execution of Ray Data, until it has this many: each costs about
    0.4 s of CPU and a pause, and what is said above of small epochs then goes for all of them together. Held-out
    cases are scored between executions, so that nothing changes where each epoch is scored. A run that is stopped has
    read ahead as much as Ray's object store holds. 1 reads every epoch by itself, as quarantines and elastic runs
    always do."""

    execution_bytes: int = 5 * 2**30
    """As `execution_cases`, bytes of the objects, whole though they may be read in part."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name} must be 1 or more; got {getattr(self, field.name)}")


@dataclasses.dataclass(frozen=True, slots=True)
class ReadPlan:
    """What is read in one execution: an epoch, or several on end.

    Attributes:
        epochs: (n,) int64, from 0: the epoch in which each of `order` is trained on.
        order: (n,) int64, the indices to train on, in order.
        bounds: (shards + 1,) int64: shard i is order[bounds[i] : bounds[i + 1]].
        tail: (t,) int64, indices left out so that every rank gets the same number of whole batches; of all epochs.
    """

    epochs: Indices
    order: Indices
    bounds: Indices
    tail: Indices

    @property
    def num_shards(self) -> int:
        """Read tasks of this plan."""
        return len(self.bounds) - 1

    def shard(self, number: int) -> Indices:
        """The indices of one shard, in order."""
        return self.order[self.bounds[number] : self.bounds[number + 1]]


def epochs_together(case_bytes: Indices, config: ShardConfig) -> int:
    """How many epochs of these cases (bytes of each) are read in one execution, at the most."""
    by_cases = -(-config.execution_cases // max(1, len(case_bytes)))
    by_bytes = -(-config.execution_bytes // max(1, int(case_bytes.sum())))
    return min(by_cases, by_bytes)


def shard_bounds(sizes: Indices, config: ShardConfig, unit: int = 1) -> Indices:
    """Cut a sequence of cases of these sizes (bytes) into shards: greedy, in order, none over a limit.

    Args:
        sizes: (n,) int64, bytes of each case.
        config: the limits.
        unit: shards end at multiples of this many cases, so that no block spans two of them; one block is a
            shard though it may be over a limit.

    Returns:
        (shards + 1,) int64, from 0 to len(sizes), strictly increasing.
    """
    ends = np.cumsum(sizes)
    eighth = -(-len(sizes) // LEAST_SHARDS)
    most = min(config.shard_cases, eighth + -eighth % unit)
    bounds = [0]
    while bounds[-1] < len(sizes):
        start = bounds[-1]
        before = int(ends[start - 1]) if start else 0
        by_bytes = int(np.searchsorted(ends, before + config.shard_bytes, side="right"))
        taken = min(by_bytes - start, most)
        bounds.append(min(start + max(unit, taken - taken % unit), len(sizes)))
    return np.asarray(bounds, dtype=np.int64)


def block_batches(cases: int, batch: int, ranks: int, batch_bytes: int, config: ShardConfig) -> int:
    """Batches of one block: as many as `block_bytes` holds, and so few that every rank gets some blocks of `cases`."""
    steps = cases // (batch * ranks)
    return max(1, min(config.block_bytes // max(1, batch_bytes), steps // LEAST_BLOCKS))


def in_blocks(order: Indices, batch: int, ranks: int, batches: int) -> tuple[Indices, list[int], int]:
    """Arrange an execution so that ranks which are dealt blocks in turn take its steps in order.

    Step s is order[s * ranks * batch : (s + 1) * ranks * batch], a batch for each rank. A rank's block holds its
    batches of some steps on end; so at each step all that was trained on is a prefix of `order`, whatever the blocks.
    Each rank's first block of an execution is half as large, so that the first step comes soon, and still lasts while
    the next are read: smaller ones are tasks that take longer to start than the steps that they are for.

    Args:
        order: (n,) int64, by steps; n is a multiple of batch times ranks, unless `ranks` is 1.
        batch: cases of a rank's batch.
        ranks: that blocks are dealt to.
        batches: of a block.

    Returns:
        (n,) int64, `order` by blocks; where each of the smaller blocks at its beginning ends; and where the blocks of
        full size end. What comes after that is one smaller block a rank.
    """
    step = batch * ranks
    steps = len(order) // step
    parts: list[Indices] = []
    ends: list[int] = []
    at = 0
    if batches > 1 and steps >= LEAST_BLOCKS * batches:
        half = batches // 2
        parts.append(_dealt(order[: half * step], batch, ranks, half))
        ends = [(rank + 1) * half * batch for rank in range(ranks)]
        at = half * step
    full = at + (len(order) - at) // (step * batches) * (step * batches)
    parts.append(_dealt(order[at:full], batch, ranks, batches))
    rest = order[full:]
    parts.append(_dealt(rest, batch, ranks, len(rest) // step) if ranks > 1 and len(rest) else rest)
    return np.concatenate(parts), ends, full


def _dealt(order: Indices, batch: int, ranks: int, batches: int) -> Indices:
    return order.reshape(-1, batches, ranks, batch).transpose(0, 2, 1, 3).ravel()


def plan_epochs(
    *,
    case_bytes: Indices,
    seed: int,
    epochs: Sequence[int],
    shards: ShardConfig,
    candidates: Indices | None = None,
    consumed: Indices | None = None,
    multiple: int = 1,
    batch: int = 1,
    ranks: int = 1,
    batches: int = 1,
    shuffle: bool = True,
) -> ReadPlan:
    """Plan epochs that are read in one execution: each as if it were alone, one after the other.

    Blocks and shards may reach from one epoch into the next; a rank's batches do not.

    Args:
        case_bytes: (N,) int64, bytes of each case by index, as `ShardConfig.shard_bytes` counts them.
        seed: of the order.
        epochs: one or more, from 0, ascending.
        shards: limits of a shard.
        candidates: the indices that take part; None for all. The order of the others is not touched by it.
        consumed: indices already trained on in the first epoch, left out of it.
        multiple: the number of an epoch's cases is cut to a multiple of this (world size times batch size), from the
            end of the order: what is cut is the plan's `tail`.
        batch: cases of a rank's batch.
        ranks: that blocks are dealt to in turn, where that is known; then, and where there are several epochs,
            `multiple` is a multiple of ranks times batch.
        batches: of a block, or fewer where there is less to read than `block_batches` goes by; no shard cuts a block,
            and blocks that are smaller than this are shards of their own.
        shuffle: False keeps the order of the manifest, as validation wants it.

    Raises:
        ValueError: several epochs, and one may end within a batch.
    """
    if len(epochs) > 1 and multiple % (batch * ranks):
        raise ValueError(
            f"expected epochs that end with a whole batch of {batch} for each of {ranks} ranks, since {len(epochs)} of "
            f"them are read on end, found multiples of {multiple}; cut them to such a multiple, or read one at a time"
        )
    total = len(case_bytes)
    takes_part = np.ones(total, dtype=bool)
    if candidates is not None:
        takes_part[:] = False
        takes_part[candidates] = True
    parts: list[Indices] = []
    tails: list[Indices] = []
    for epoch in epochs:
        order = epoch_order(seed, epoch, total) if shuffle else np.arange(total, dtype=np.int64)
        keep = takes_part
        if consumed is not None and epoch == epochs[0]:
            keep = takes_part.copy()
            keep[consumed] = False
        left = order[keep[order]]
        whole = len(left) - len(left) % multiple
        parts.append(left[:whole])
        tails.append(left[whole:])
    by_steps = np.concatenate(parts)
    own = max(1, min(batches, -(-len(by_steps) // (batch * ranks * LEAST_BLOCKS))))
    at, small, full = in_blocks(np.arange(len(by_steps)), batch, ranks, own)
    order = by_steps[at]
    lead = small[-1] if small else 0
    if own == batches:
        bounds = lead + shard_bounds(case_bytes[order[lead:full]], shards, batch * batches)
    else:  # within a shard, Ray gathers smaller blocks into large ones
        bounds = np.arange(lead, full + 1, batch * own)
    short = (len(order) - full) // ranks
    rest = np.arange(full + short, len(order) + 1, short) if short else np.zeros(0, dtype=np.int64)
    bounds = np.concatenate([np.asarray([0, *small[:-1]] if small else [], dtype=np.int64), bounds, rest])
    each = np.repeat(np.asarray(epochs, dtype=np.int64), [len(part) for part in parts])
    return ReadPlan(each[at], order, bounds, np.concatenate(tails))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Plans any epochs of a run: a picklable function of the epochs and of the cases to leave out.

    Attributes:
        case_bytes: (N,) int64, bytes of each case by index, as `ShardConfig.shard_bytes` counts them.
        candidates: indices to train on; None for all.
        resumed_epoch: the epoch that `consumed` speaks of.
        consumed: indices trained on already in that epoch.
        multiple: each epoch is cut to a multiple of this.
        batch: cases of a rank's batch.
        ranks: that blocks are dealt to in turn; 1 where that is not known.
        batches: of a block.
    """

    case_bytes: Indices
    seed: int
    shards: ShardConfig
    candidates: Indices | None = None
    resumed_epoch: int = 0
    consumed: Indices | None = None
    multiple: int = 1
    batch: int = 1
    ranks: int = 1
    batches: int = 1

    def __call__(self, epochs: Sequence[int], left_out: Indices) -> ReadPlan:
        """The plan of one execution without these cases."""
        candidates = self.candidates
        if len(left_out):
            everyone = np.arange(len(self.case_bytes)) if candidates is None else candidates
            candidates = np.setdiff1d(everyone, left_out)
        return plan_epochs(
            case_bytes=self.case_bytes,
            seed=self.seed,
            epochs=epochs,
            shards=self.shards,
            candidates=candidates,
            consumed=self.consumed if epochs[0] == self.resumed_epoch else None,
            multiple=self.multiple,
            batch=self.batch,
            ranks=self.ranks,
            batches=self.batches,
        )
