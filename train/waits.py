"""Why training waited for data: Ray's account of a rank's blocked time, joined with what the data workers did.

Ray Data says for how long the training thread was blocked on the production of blocks, on their transfer and on cutting
batches out of them (`DatasetStats.iter_blocked_*`, in 2.60; it is what `DataIterator.stats()` prints as "Per-stage
training-thread blocked time breakdown"). That thread is the one that reads ahead of the steps, so that part of it was
hidden from training: what a rank waited itself, which is measured apart, is divided as these are. What production
waited for is known to the data workers: a read task either waits for objects or transforms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

CAUSES = {
    "listing": "listing and pairing the data set, once, before the first epoch",
    "starting": "planning an execution and starting its first read task",
    "fetching": "data workers waiting for objects",
    "transforming": "data workers decoding, cropping and augmenting",
    "transfer": "moving blocks between nodes",
    "batching": "cutting batches out of blocks",
    "other": "what none of these explains, such as the wait for the end of the data",
}
"""Cause: what it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocked:
    """Seconds for which the thread that reads a rank's batches was blocked, by what Ray says it was blocked on.

    Attributes:
        setup_s: of making the iterator, which waits for the process that plans; no part of the others.
    """

    setup_s: float = 0.0
    production_s: float = 0.0
    transfer_s: float = 0.0
    batching_s: float = 0.0

    def since(self, before: Blocked) -> Blocked:
        """What came on top."""
        return Blocked(
            setup_s=self.setup_s - before.setup_s,
            production_s=self.production_s - before.production_s,
            transfer_s=self.transfer_s - before.transfer_s,
            batching_s=self.batching_s - before.batching_s,
        )


def blocked_so_far(shard: Any) -> Blocked:
    """Ray's account of one rank's data iterator, over all epochs; nothing of an iterator that keeps none.

    The account is private to the iterator; its public form is prose, rounded, and asks another process. A test of the
    whole run holds that the parts are there.
    """
    stats = getattr(shard, "_iter_stats", None)

    def seconds(*stages: str) -> float:
        timers = (getattr(stats, f"iter_{stage}_s", None) for stage in stages)
        return float(sum(timer.get() for timer in timers if timer is not None))

    return Blocked(
        setup_s=seconds("initialize"),
        production_s=seconds("blocked_production_wait"),
        transfer_s=seconds("blocked_data_transfer", "blocked_finalize"),
        batching_s=seconds("blocked_batching", "blocked_format", "blocked_collate"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochWork:
    """What all data workers did in one epoch, so far.

    Attributes:
        first_task_unix_s: when the first read task began, in seconds since 1970; None where none has told.
    """

    fetch_s: float = 0.0
    transform_s: float = 0.0
    first_task_unix_s: float | None = None


def by_cause(wait_s: float, blocked: Blocked, work: EpochWork, starting_s: float = 0.0) -> dict[str, float]:
    """Seconds of waiting by cause; they add up to `wait_s`.

    Waiting for production, but for the start, goes to fetching and transforming as the data workers' own time does:
    the two follow each other in a read task, and objects that were fetched ahead cost it none.

    Args:
        wait_s: for which the rank waited in all.
        blocked: Ray's account of the thread that reads ahead, in the same epoch.
        work: of the data workers in the same epoch.
        starting_s: of the wait, until the first read task began.
    """
    starting_s = min(max(starting_s, blocked.setup_s), wait_s)
    production_s = max(0.0, blocked.production_s - (starting_s - blocked.setup_s))
    worked_s = work.fetch_s + work.transform_s
    known = {
        "fetching": production_s * work.fetch_s / worked_s if worked_s > 0 else 0.0,
        "transforming": production_s * work.transform_s / worked_s if worked_s > 0 else 0.0,
        "transfer": blocked.transfer_s,
        "batching": blocked.batching_s,
    }
    left_s = wait_s - starting_s
    scale = min(1.0, left_s / total) if (total := sum(known.values())) > 0 else 1.0
    known = {cause: seconds * scale for cause, seconds in known.items()}
    other_s = max(0.0, left_s - sum(known.values()))
    return {"listing": 0.0, "starting": starting_s, **known, "other": other_s}


def add_up(parts: Iterable[Mapping[str, float] | None]) -> dict[str, float]:
    """Seconds by cause, summed; in the order of `CAUSES`."""
    given = [part for part in parts if part]
    return {cause: sum(float(part.get(cause) or 0.0) for part in given) for cause in CAUSES}


def why(rows: Iterable[Mapping[str, Any]]) -> str:
    """One sentence: for how long a run waited for data, and for what; largest share first.

    Args:
        rows: of metrics.json.
    """
    listed = list(rows)
    causes = add_up(row.get("stall_by_cause_s") for row in listed)
    waited_s = sum(causes.values())
    trained_s = sum(float(row.get("wall_s") or 0.0) for row in listed) + causes["listing"]
    if waited_s <= 0 or trained_s <= 0:
        return "waited for data: not known"
    shares = sorted(((seconds / waited_s, cause) for cause, seconds in causes.items()), reverse=True)
    named = ", ".join(f"{cause} {share:.0%}" for share, cause in shares if share >= 0.005)
    return f"waited for data {waited_s:.1f} s of {trained_s:.1f} s ({waited_s / trained_s:.1%}): {named}"
