"""What a data worker has done is handed on whole, and seldom."""

from __future__ import annotations

import time
import types

import numpy as np
import pytest

from ingest.fetch import FetchConfig, ShardSpec, read_shard
from ingest.index import index_cases
from ingest.stores import open_store
from ingest.stores.base import StoreConfig
from ingest.stores.retry import COMPOSITES, RETRIES
from ingest.tally import Tally, Work
from ingest.testing import make_cases


def test_work_is_added_up_and_told_once() -> None:
    told: list[Work] = []
    tally = Tally()
    tally.begin(3)
    tally.fetched(3, bytes_read=100, waited_s=0.5)
    tally.fetched(3, bytes_read=20, waited_s=0.25)
    tally.transformed(np.full(4, 3), 2.0)
    RETRIES.add("status-503")
    COMPOSITES.add("composed")
    tally.tell(told.append)  # too soon
    assert told == []
    tally.tell(told.append, now=True)
    tally.tell(told.append, now=True)
    first, second = told
    assert (first.epoch, first.bytes_read, first.fetch_s, first.samples, first.transform_s) == (3, 120, 0.75, 4, 2.0)
    assert (first.retries, first.composites) == ({"status-503": 1}, 1)
    assert (second.bytes_read, second.samples, second.fetch_s, second.retries, second.composites) == (0, 0, 0.0, {}, 0)


def test_work_is_told_by_epoch_where_a_task_has_several_and_nothing_of_it_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ingest.tally.time", types.SimpleNamespace(time=lambda: 1000.0, monotonic=time.monotonic))
    told: list[Work] = []
    tally = Tally()
    tally.begin(3)
    tally.fetched(3, bytes_read=100, waited_s=0.5)
    tally.fetched(4, bytes_read=20, waited_s=100.0)
    tally.transformed(np.array([3, 3, 3, 4]), 2.0)  # one block
    RETRIES.add("status-503")
    tally.tell(told.append, now=True)
    assert [(w.epoch, w.bytes_read, w.fetch_s, w.samples, w.transform_s) for w in told] == [
        (3, 100, 0.5, 3, 1.5),
        (4, 20, 100.0, 1, 0.5),
    ]
    assert [work.retries for work in told] == [{}, {"status-503": 1}]
    assert [work.started_unix_s for work in told] == [1000.0, 900.0]  # with what it waited for first
    tally.transformed(np.array([4, 4]), 1.0)
    tally.transformed(np.zeros(0, dtype=np.int64), 0.25)  # a block whose cases are all left out
    tally.tell(told.append, now=True)
    assert [(w.epoch, w.bytes_read, w.samples, w.transform_s) for w in told[2:]] == [(4, 0, 2, 1.25)]


def test_what_nobody_asks_for_is_not_told_to_the_next_who_does() -> None:
    told: list[Work] = []
    tally = Tally()
    tally.fetched(0, bytes_read=100, waited_s=0.5)
    tally.tell(None, now=True)
    tally.begin(0)
    tally.tell(told.append, now=True)
    assert told[0].bytes_read == 0


def test_reading_a_shard_tells_its_bytes_once_however_many_blocks_it_has(tmp_path) -> None:
    images, labels = open_store(f"{tmp_path}/images/"), open_store(f"{tmp_path}/labels/")
    make_cases(images, labels, 9, shape=(8, 8, 8), seed=1)
    manifest = index_cases(images.uri, labels.uri).manifest
    told: list[Work] = []
    spec = ShardSpec(
        images_uri=images.uri,
        labels_uri=labels.uri,
        store=StoreConfig(),
        fetch=FetchConfig(chunk_cases=2),
        epochs=np.full(9, 5),
        block=3,
        rows=manifest.table,
        indices=manifest.case_bytes() * 0 + range(9),
        record=told.append,
    )
    assert sum(table.num_rows for table in read_shard(spec)) == 9
    assert len(told) == 1
    assert (told[0].epoch, told[0].bytes_read) == (5, int(manifest.case_bytes().sum()))
    assert told[0].fetch_s > 0


def test_a_shard_of_several_epochs_reads_each_case_for_each_and_tells_of_both(tmp_path) -> None:
    images, labels = open_store(f"{tmp_path}/images/"), open_store(f"{tmp_path}/labels/")
    make_cases(images, labels, 5, shape=(8, 8, 8), seed=1)
    manifest = index_cases(images.uri, labels.uri).manifest
    told: list[Work] = []
    order = np.array([4, 0, 1, 3, 2, 2, 3, 0])
    spec = ShardSpec(
        images_uri=images.uri,
        labels_uri=labels.uri,
        store=StoreConfig(),
        fetch=FetchConfig(),
        epochs=np.array([6, 6, 6, 6, 6, 7, 7, 7]),
        block=4,
        rows=manifest.take(order),
        indices=order,
        record=told.append,
    )
    reading = read_shard(spec)
    tables = [next(reading)]
    assert told == []
    tables.append(next(reading))
    assert [work.epoch for work in told] == [6]  # whoever has trained it asks for it now, and not when the task ends
    tables += reading
    assert [table.num_rows for table in tables] == [4, 4]
    assert [row for table in tables for row in table["epoch"].to_pylist()] == spec.epochs.tolist()
    assert [row for table in tables for row in table["index"].to_pylist()] == order.tolist()
    bodies = {}
    for table in tables:
        for index, image in zip(table["index"].to_pylist(), table["image_npy"].to_pylist(), strict=True):
            assert bodies.setdefault(index, image) == image
    assert len(set(bodies.values())) == 5
    sizes = manifest.case_bytes()
    assert [(w.epoch, w.bytes_read) for w in told] == [(6, int(sizes.sum())), (7, int(sizes[[2, 3, 0]].sum()))]
