"""Slabs on a real Ray: the digests of whole reads from any place and topology, and what the commands write."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import ray.data

from ingest.__main__ import main
from ingest.crop import CropConfig
from ingest.digest import combine, digest_batches
from ingest.errors import DecodeError
from ingest.fetch import FetchConfig
from ingest.index import index_cases
from ingest.layout import known_of
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig, training_dataset
from ingest.plan import ShardConfig
from ingest.quarantine import BadCaseConfig
from ingest.quarantine_actor import start_quarantine
from ingest.stores import StoreConfig
from ingest.unwrap import own_error
from tests.needs import COMPOSE
from tests.ruined import AFTER_LISTING, REASONS, make_set, ruin

pytestmark = pytest.mark.usefixtures("ray_here")


def configure(root: str, slabs: str = "auto", **settings) -> DataConfig:
    return DataConfig(
        images=f"{root}images/",
        labels=f"{root}labels/",
        seed=7,
        holdout_fraction=0.0,
        task_cpus=0.5,
        crop=CropConfig(patch=(8, 8, 8)),
        shards=ShardConfig(shard_cases=12),
        fetch=FetchConfig(slabs=slabs, slab_image_bytes=1),
        store=StoreConfig(transport="direct"),
        **settings,
    )


def fingerprint(config: DataConfig, manifest: Manifest | None = None, **options) -> tuple[str, int]:
    manifest = manifest or index_cases(config.images, config.labels, config.store).manifest
    samples = training_dataset(manifest, config, **options)
    found = {}
    for _ in range(2):
        found |= digest_batches(samples.iter_batches(batch_size=None, batch_format="numpy"))
    return combine(found), len(found)


@pytest.fixture(scope="module")
def expected(places) -> tuple[str, int]:
    return fingerprint(configure(places.local, "never"))


@pytest.mark.parametrize("transport", [COMPOSE, "direct"])
def test_slabs_of_a_bucket_and_of_files_give_the_samples_of_whole_reads(places, expected, transport):
    config = configure(places.gs)
    config = dataclasses.replace(config, store=StoreConfig(transport=transport))
    assert fingerprint(config) == fingerprint(configure(places.local)) == expected


def test_a_manifest_with_boxes_changes_no_sample(places, expected, tmp_path, capsys):
    saved = f"{tmp_path}/boxes.parquet"
    roots = ["--images", f"{places.local}images", "--labels", f"{places.local}labels"]
    assert main(["index", *roots, "--output", saved, "--boxes"]) == 0
    assert "of 65 cases; 0 are compressed or in Fortran order" in " ".join(capsys.readouterr().out.split())
    manifest = Manifest.load(saved)
    assert None not in known_of(manifest.table)
    for slabs in ("auto", "never"):
        assert fingerprint(configure(places.local, slabs), manifest) == expected


def test_two_ranks_get_the_samples_of_one(places, expected):
    config = configure(places.gs)
    manifest = index_cases(config.images, config.labels, config.store).manifest
    splits = training_dataset(manifest, config, multiple=4, batch=2, ranks=2).streaming_split(2, equal=True)

    def read(split: ray.data.DataIterator) -> dict:
        return digest_batches(split.iter_batches(batch_size=None, batch_format="numpy"))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(read, splits)
    whole = training_dataset(manifest, configure(places.gs, "never"), multiple=4, batch=2)
    wanted = digest_batches(whole.iter_batches(batch_size=None, batch_format="numpy"))
    assert first | second == wanted
    assert len(first) == len(second) == 32


@pytest.mark.parametrize("batch", [1, 4])
def test_a_block_is_whole_batches_of_the_plan(places, batch):
    config = configure(places.local)
    manifest = index_cases(config.images, config.labels).manifest
    sizes = [
        [len(found["index"]) for found in each.iter_batches(batch_size=None, batch_format="numpy")]
        for each in (
            training_dataset(manifest, setting, multiple=batch, batch=batch)
            for setting in (config, configure(places.local, "never"))
        )
    ]
    assert sizes[0] == sizes[1]
    assert all(size % batch == 0 for size in sizes[0])


def test_read_tasks_of_slabs_take_more_cases_than_those_of_whole_volumes(places):
    tasks = {}
    for slabs in ("auto", "never"):
        config = dataclasses.replace(
            configure(places.local, slabs), shards=ShardConfig(shard_bytes=20_000, block_bytes=1)
        )
        samples = training_dataset(index_cases(config.images, config.labels).manifest, config, batch=1)
        assert sum(len(found["index"]) for found in samples.iter_batches(batch_size=None)) == 65
        tasks[slabs] = int(re.search(r"(\d+) tasks executed", samples.stats())[1])
    assert 0 < 2 * tasks["auto"] < tasks["never"]


def test_bad_cases_are_named_and_left_out_as_when_read_whole(tmp_path):
    kinds = {2: "gone", 5: "wrong-dtype", 7: "shape-mismatch", 9: "label-seven", 11: "overwritten", 13: "not-npy"}
    make_set(tmp_path, 24)
    for number, kind in kinds.items():
        if kind not in AFTER_LISTING:
            ruin(tmp_path, number, kind)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    for number, kind in kinds.items():
        if kind in AFTER_LISTING:
            ruin(tmp_path, number, kind)
    bad = BadCaseConfig(on_bad="quarantine", on_stale="quarantine", budget_cases=len(kinds))
    config = configure(f"{tmp_path}/", bad=bad)
    # Every patch of it is around the foreground, so that the label is read whole and looked at in full.
    config = dataclasses.replace(config, crop=CropConfig(patch=(4, 4, 4), foreground_probability=1.0))
    handle = start_quarantine(str(tmp_path / "run"), bad, len(manifest))
    samples = training_dataset(manifest, config, batch=4, quarantine=handle)
    for _ in range(2):
        found = [int(i) for b in samples.iter_batches(batch_size=None, batch_format="numpy") for i in b["index"]]
        assert sorted(found) == [number for number in range(24) if number not in kinds]
    assert {entry.index: entry.reason for entry in handle.entries()} == {n: REASONS[kind] for n, kind in kinds.items()}
    assert {Path(entry.uri).name for entry in handle.entries() if entry.index == 9} == {"case_00009_y.npy"}


def test_an_error_of_a_case_that_is_cut_comes_out_of_ray_as_it_was_raised(tmp_path):
    make_set(tmp_path, 4)
    ruin(tmp_path, 2, "wrong-dtype")
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    config = dataclasses.replace(configure(f"{tmp_path}/"), crop=CropConfig(patch=(4, 4, 4)))
    with pytest.raises(Exception) as caught:  # noqa: PT011  Ray's class depends on where it broke
        training_dataset(manifest, config).materialize()
    ours = own_error(caught.value)
    assert isinstance(ours, DecodeError)
    assert ours.reason == "dtype"
    assert "case_00002_x.npy: expected dtype float32" in str(ours)


def test_inspect_and_prepare_write_manifests_with_boxes(places, tmp_path, capsys):
    roots = ["--images", f"{places.gs}images", "--labels", f"{places.gs}labels"]
    saved = f"{tmp_path}/inspected.parquet"
    picture = str(tmp_path / "overlay.png")
    assert main(["inspect", *roots, "--sample", "2", "--picture", picture, "--boxes", saved]) == 0
    capsys.readouterr()
    assert None not in known_of(Manifest.load(saved).table)
    prepared = f"{tmp_path}/prepared.parquet"
    options = ["--source", "mni152", "--cases", "2", "--shape", "16", "16", "16", "--workers", "0"]
    assert main(["prepare", *options, "--output", f"{tmp_path}/set", "--manifest", prepared]) == 0
    known = known_of(Manifest.load(prepared).table)
    assert [each.layout.shape for each in known if each is not None] == [(16, 16, 16)] * 2
    assert all(each.boxes for each in known if each is not None)


def test_index_says_how_many_cases_are_always_read_whole(tmp_path, capsys):
    make_set(tmp_path, 5)
    ruin(tmp_path, 1, "not-npy")
    image = tmp_path / "images" / "case_00003_x.npy"
    np.save(image, np.asfortranarray(np.load(image)))
    roots = ["--images", f"{tmp_path}/images", "--labels", f"{tmp_path}/labels"]
    policy = ["--on-bad", "quarantine", "--budget-cases", "1"]
    assert main(["index", *roots, "--output", f"{tmp_path}/m.parquet", "--boxes", *policy]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "of 3 cases; 1 are compressed or in Fortran order, and are always read whole" in said
    known = known_of(Manifest.load(f"{tmp_path}/m.parquet").table)
    assert [each is None for each in known] == [False, True, False, True, False]
