"""What a data worker has done is handed on whole, and seldom."""

from __future__ import annotations

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
    tally.fetched(bytes_read=100, waited_s=0.5)
    tally.fetched(bytes_read=20, waited_s=0.25)
    tally.transformed(samples=4, seconds=2.0)
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


def test_what_nobody_asks_for_is_not_told_to_the_next_who_does() -> None:
    told: list[Work] = []
    tally = Tally()
    tally.fetched(bytes_read=100, waited_s=0.5)
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
        epoch=5,
        block=3,
        rows=manifest.table,
        indices=manifest.case_bytes() * 0 + range(9),
        record=told.append,
    )
    assert sum(table.num_rows for table in read_shard(spec)) == 9
    assert len(told) == 1
    assert (told[0].epoch, told[0].bytes_read) == (5, int(manifest.case_bytes().sum()))
    assert told[0].fetch_s > 0
