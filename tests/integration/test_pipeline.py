"""The pipeline on a real Ray: fused, ordered, and the same samples from any place and on any topology."""

import concurrent.futures
import dataclasses

import numpy as np
import pytest
import ray
import ray.data

from ingest.crop import CropConfig
from ingest.digest import combine, digest_batches
from ingest.errors import ConfigError, DecodeError, ObjectNotFoundError, StaleManifestError
from ingest.index import index_cases
from ingest.pipeline import DataConfig, training_dataset
from ingest.plan import ShardConfig, epoch_order
from ingest.quarantine import BadCaseConfig
from ingest.quarantine_actor import start_quarantine
from ingest.stores import StoreConfig, open_store
from ingest.unwrap import own_error
from tests.needs import COMPOSE

pytestmark = pytest.mark.usefixtures("ray_here")

PATCH = (8, 8, 8)


def configure(root: str, *, transport="direct", shard_cases=6, blocks_in_flight=None) -> DataConfig:
    return DataConfig(
        images=f"{root}images/",
        labels=f"{root}labels/",
        seed=7,
        holdout_fraction=0.0,
        task_cpus=0.5,
        crop=CropConfig(patch=PATCH),
        shards=ShardConfig(shard_cases=shard_cases),
        blocks_in_flight=blocks_in_flight,
        store=StoreConfig(transport=transport),
    )


def dataset(config: DataConfig, **options) -> ray.data.Dataset:
    manifest = index_cases(config.images, config.labels, config.store, config.pairing).manifest
    return training_dataset(manifest, config, **options)


def fingerprint(config: DataConfig, epochs: int = 2, **options) -> tuple[str, int]:
    samples = dataset(config, **options)
    found = {}
    for _ in range(epochs):
        found |= digest_batches(samples.iter_batches(batch_size=None, batch_format="numpy"))
    return combine(found), len(found)


@pytest.fixture(scope="module")
def expected(places) -> tuple[str, int]:
    return fingerprint(configure(places.local))


@pytest.mark.parametrize("transport", [COMPOSE, "direct"])
def test_a_bucket_gives_the_same_samples_as_local_files(places, expected, transport):
    assert expected[1] == 2 * 65
    assert fingerprint(configure(places.gs, transport=transport)) == expected


@pytest.mark.parametrize(
    ("blocks_in_flight", "shard_cases", "batch", "shards"),
    [(1, 10, 1, 9), (3, 10, 1, 9), (3, 1, 16, 4), (None, 64, 32, 2)],
)
def test_the_samples_do_not_depend_on_blocks_in_flight_or_on_shards(
    places, blocks_in_flight, shard_cases, batch, shards
):
    config = configure(places.local, blocks_in_flight=blocks_in_flight, shard_cases=shard_cases)
    samples = dataset(config, multiple=64, batch=batch)
    assert samples.materialize().stats().count(f"{shards} tasks executed") == 1
    assert fingerprint(config, multiple=64, batch=batch) == fingerprint(configure(places.local), multiple=64)


def test_two_ranks_together_get_the_samples_of_one_and_equally_many(places):
    config = configure(places.gs)
    one = fingerprint_of_ranks(config, 1)
    two = fingerprint_of_ranks(config, 2)
    assert one == two
    assert one[1] == 2 * 64


def fingerprint_of_ranks(config: DataConfig, ranks: int) -> tuple[str, int]:
    """Both epochs, read by as many iterators at once, as trainers do."""
    splits = dataset(config, multiple=4).streaming_split(ranks, equal=True)

    def read(split):
        found, counts = {}, []
        for _ in range(2):
            before = len(found)
            found |= digest_batches(split.iter_batches(batch_size=5, batch_format="numpy"))
            counts.append(len(found) - before)
        return found, counts

    with concurrent.futures.ThreadPoolExecutor(ranks) as pool:
        results = list(pool.map(read, splits))
    assert all(counts == results[0][1] for _, counts in results), "ranks must run equal steps"
    merged = {key: value for found, _ in results for key, value in found.items()}
    return combine(merged), sum(len(found) for found, _ in results)


def test_rows_come_in_the_order_of_the_plan_and_each_epoch_has_another(places):
    samples = dataset(configure(places.gs, blocks_in_flight=3))
    for epoch in range(2):
        rows = list(samples.iter_batches(batch_size=None, batch_format="numpy"))
        indices = np.concatenate([batch["index"] for batch in rows])
        assert indices.tolist() == epoch_order(7, epoch, 65).tolist()
        assert all((batch["epoch"] == epoch).all() for batch in rows)


def test_rows_have_the_promised_shapes_and_types_though_volumes_differ(places):
    samples = dataset(configure(places.gs))
    batch = next(iter(samples.iter_batches(batch_size=10, batch_format="numpy")))
    assert (batch["image"].shape, batch["image"].dtype) == ((10, 1, *PATCH), np.float32)
    assert (batch["label"].shape, batch["label"].dtype) == ((10, 1, *PATCH), np.uint8)
    assert batch["index"].dtype == np.int64
    manifest = index_cases(f"{places.gs}images/", f"{places.gs}labels/").manifest
    ids = manifest.table["case_id"].to_pylist()
    assert [ids[i] for i in batch["index"]] == list(batch["case_id"])


def test_read_and_map_are_fused_into_one_task(places):
    samples = dataset(configure(places.local)).materialize()
    assert "ReadPairedVolume->MapBatches(sample_patches)" in samples.stats()


def test_an_epoch_can_be_taken_up_where_it_was_left(places):
    config = configure(places.local)
    order = epoch_order(7, 3, 65)
    rest = dataset(config, first_epoch=3, consumed=order[:17])
    indices = [batch["index"] for batch in rest.iter_batches(batch_size=None, batch_format="numpy")]
    assert np.concatenate(indices).tolist() == order[17:].tolist()
    following = [batch["index"] for batch in rest.iter_batches(batch_size=None, batch_format="numpy")]
    assert np.concatenate(following).tolist() == epoch_order(7, 4, 65).tolist()


@pytest.mark.parametrize(
    ("batch", "shard_cases", "block"), [(4, 65, 4), (4, 3, 4), (5, 20, 5), (2, 20, 4), (1, 65, 4), (1, 1, 4)]
)
def test_a_block_is_whole_batches_and_ranks_get_the_steps_of_the_order_in_turn(places, batch, shard_cases, block):
    config = configure(places.local, shard_cases=shard_cases)
    splits = dataset(config, multiple=2 * batch, batch=batch, ranks=2).streaming_split(2, equal=True)

    def read(split):
        return [b["index"].tolist() for b in split.iter_batches(batch_size=None, batch_format="numpy")]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        blocks = list(pool.map(read, splits))
    order = epoch_order(7, 0, 65).tolist()
    steps = len(order) // (2 * batch)
    sizes = [[len(found) for found in rank] for rank in blocks]
    assert sizes[0] == sizes[1]
    assert max(sizes[0]) == block
    assert all(size % batch == 0 for size in sizes[0])
    first, second = ([index for found in rank for index in found] for rank in blocks)
    assert [(first[s * batch : (s + 1) * batch], second[s * batch : (s + 1) * batch]) for s in range(steps)] == [
        (order[2 * s * batch : (2 * s + 1) * batch], order[(2 * s + 1) * batch : (2 * s + 2) * batch])
        for s in range(steps)
    ]
    assert len(first) == len(second) == steps * batch


def test_epochs_read_on_end_give_each_rank_the_batches_of_epochs_by_themselves(places):
    config = configure(places.gs, shard_cases=20)
    together = batches_of_ranks(config, [range(1, 4), range(4, 5)], ranks=2)
    assert together == batches_of_ranks(config, [range(epoch, epoch + 1) for epoch in range(1, 5)], ranks=2)
    steps = 65 // (4 * 2)
    for rank in together:
        assert [epoch for epoch, _, _ in rank] == [epoch for epoch in range(1, 5) for _ in range(steps)]
        assert {len(indices) for _, indices, _ in rank} == {4}


def batches_of_ranks(config: DataConfig, executions: list[range], ranks: int) -> list[list[tuple]]:
    """Of each rank every batch's epoch, indices and what was made of its cases."""
    samples = dataset(config, executions=executions, multiple=4 * ranks, batch=4, ranks=ranks)
    splits = samples.streaming_split(ranks, equal=True)

    def read(split):
        found = []
        for _ in executions:
            for batch in split.iter_batches(batch_size=4, batch_format="numpy", drop_last=True):
                (epoch,) = set(batch["epoch"].tolist())
                found.append((epoch, batch["index"].tolist(), combine(digest_batches([batch]))))
        return found

    with concurrent.futures.ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(read, splits))


def test_epochs_read_on_end_come_in_blocks_as_large_as_those_of_one_large_epoch(places):
    config = configure(places.local, shard_cases=65)
    for executions, block in ([range(1)], 8), ([range(3)], 24), ([range(1), range(3)], 8):
        samples = dataset(config, executions=executions, multiple=2, batch=2)
        sizes = [len(batch["index"]) for batch in samples.iter_batches(batch_size=None, batch_format="numpy")]
        assert max(sizes) == block


def test_with_a_quarantine_epochs_are_not_read_on_end(places, tmp_path):
    config = dataclasses.replace(configure(places.local), bad=BadCaseConfig(on_bad="quarantine"))
    quarantine = start_quarantine(str(tmp_path), config.bad, 65)
    with pytest.raises(ConfigError, match=r"expected each epoch by itself.* executions of 3 epochs"):
        dataset(config, executions=[range(3)], multiple=4, batch=4, quarantine=quarantine)


@pytest.mark.parametrize(
    "options", [{"executions": []}, {"executions": [range(0)]}, {"executions": [range(2)], "first_epoch": 3}]
)
def test_executions_of_nothing_are_refused(places, options):
    with pytest.raises(ConfigError, match="expected executions of one epoch or more each"):
        dataset(configure(places.local), **options)


def test_an_error_of_ours_comes_out_of_ray_as_it_was_raised(places, tmp_path):
    for role in ("images", "labels"):
        source, target = open_store(f"{places.local}{role}/"), open_store(f"{tmp_path}/{role}/")
        for entry in list(source.list())[:4]:
            target.put(entry.name, source.fetch([entry])[0])
    (tmp_path / "images" / "case_00002_x.npy").write_bytes(b"this is no volume")
    samples = dataset(configure(f"{tmp_path}/"))
    with pytest.raises(Exception) as caught:  # noqa: PT011  Ray's class depends on where it broke
        samples.materialize()
    ours = own_error(caught.value)
    assert isinstance(ours, DecodeError)
    assert "case_00002_x.npy: expected an .npy file" in str(ours)
    assert "Traceback" not in str(ours)


def test_an_object_that_went_away_since_the_listing_is_named(places, tmp_path):
    for role in ("images", "labels"):
        source, target = open_store(f"{places.local}{role}/"), open_store(f"{tmp_path}/{role}/")
        for entry in list(source.list())[:3]:
            target.put(entry.name, source.fetch([entry])[0])
    samples = dataset(configure(f"{tmp_path}/"))
    (tmp_path / "labels" / "case_00001_y.npy").unlink()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        samples.materialize()
    ours = own_error(caught.value)
    assert isinstance(ours, ObjectNotFoundError)
    assert "case_00001_y.npy" in str(ours)


def test_a_manifest_that_has_gone_stale_is_detected_at_fetch(places, tmp_path):
    for role in ("images", "labels"):
        source, target = open_store(f"{places.local}{role}/"), open_store(f"{tmp_path}/{role}/")
        for entry in list(source.list())[:3]:
            target.put(entry.name, source.fetch([entry])[0])
    samples = dataset(configure(f"{tmp_path}/"))
    target = open_store(f"{tmp_path}/images/")
    body = target.fetch([next(target.list())])[0]
    target.put("case_00000_x.npy", body)  # the same bytes, written again: another generation
    with pytest.raises(Exception) as caught:  # noqa: PT011
        samples.materialize()
    ours = own_error(caught.value)
    assert isinstance(ours, StaleManifestError)
    assert "case_00000_x.npy as listed" in str(ours)
