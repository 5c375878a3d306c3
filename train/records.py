"""What a run keeps of its steps and of what befell it, beside metrics.json: for the run page, and for anyone's eyes.

RUN_DIR/steps/START-EPOCH.parquet: rank 0's steps of one epoch of one start of the ranks. RUN_DIR/events.json: starts,
faults, retries and stops, by when they were.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.errors import ConfigError
from ingest.stores import open_store
from ingest.stores.base import Store

from .plain_json import of_json, to_json

STEPS = "steps/"
EVENTS_FILE = "events.json"

STEPS_SCHEMA = pa.schema(
    [
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("ended_unix_s", pa.float64(), nullable=False),
        pa.field("wait_s", pa.float32(), nullable=False),
        pa.field("compute_s", pa.float32(), nullable=False),
        pa.field("loss", pa.float32(), nullable=False),
        pa.field("learning_rate", pa.float32(), nullable=False),
        pa.field("samples", pa.int32(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One step of one rank: when it ended, how long it waited for its batch and computed on it, and what came out."""

    epoch: int
    step: int
    ended_unix_s: float
    wait_s: float
    compute_s: float
    loss: float
    learning_rate: float
    samples: int


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that befell the run.

    Attributes:
        at_unix_s: when, in seconds since 1970.
        kind: start, fault, warning, retry, quarantine, setting, data, stop or end.
        text: in words.
    """

    at_unix_s: float
    kind: str
    text: str


def write_steps(store: Store, start: str, records: Sequence[StepRecord]) -> None:
    """Keep one start's steps of one epoch, in place of what was kept of them before."""
    file = io.BytesIO()
    table = pa.Table.from_pylist([dataclasses.asdict(record) for record in records], schema=STEPS_SCHEMA)
    pq.write_table(table, file, compression="zstd")
    store.put(f"{STEPS}{start}-{records[0].epoch:05d}.parquet", file.getvalue())


def read_steps(run_dir: str) -> dict[str, list[StepRecord]]:
    """Every start's steps, by its name, which sorts by when it was; empty of a run that kept none.

    Raises:
        ConfigError: a file of them is damaged.
    """
    found, damaged = whole_steps(run_dir)
    if damaged:
        raise ConfigError("; ".join(damaged))
    return found


def whole_steps(run_dir: str) -> tuple[dict[str, list[StepRecord]], list[str]]:
    """As `read_steps`, of the files that are whole; and what is wrong with each other one, in words."""
    damaged: list[str] = []
    found: dict[str, list[StepRecord]] = {}
    store = open_store(run_dir)
    entries = [entry for entry in store.list(STEPS) if entry.name.endswith(".parquet")]
    for entry, body in zip(entries, store.fetch(entries), strict=True):
        start = entry.name.removeprefix(STEPS).rpartition("-")[0]
        try:
            table = pq.read_table(io.BytesIO(body), schema=STEPS_SCHEMA)
            records = [StepRecord(**row) for row in table.to_pylist()]
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            words = (str(error).splitlines() or [""])[0]
            damaged.append(
                f"{store.uri_of(entry.name)}: expected a Parquet file of steps, found something else ({words})"
            )
            continue
        found.setdefault(start, []).extend(records)
    return {start: found[start] for start in sorted(found)}, damaged


def write_events(store: Store, events: Sequence[Event]) -> None:
    """Keep the run's events, in place of what was kept before."""
    store.put(EVENTS_FILE, to_json([dataclasses.asdict(event) for event in events]).encode())


def read_events(run_dir: str) -> list[Event]:
    """The run's events, oldest first; none of a run that kept none.

    Raises:
        ConfigError: RUN_DIR/events.json is no list of events.
    """
    store = open_store(run_dir)
    for entry in store.list(EVENTS_FILE):
        if entry.name == EVENTS_FILE:
            try:
                saved: list[dict[str, Any]] = of_json(store.fetch([entry])[0])
                return [Event(float(event["at_unix_s"]), str(event["kind"]), str(event["text"])) for event in saved]
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(
                    f"{store.uri_of(EVENTS_FILE)}: expected a list of events, found something else ({error})"
                ) from error
    return []
