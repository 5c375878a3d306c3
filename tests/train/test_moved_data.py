"""A run is resumed on data that has moved, or has new generations, when the cases are the same, and on no other."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ingest.errors import ConfigError, ManifestError
from ingest.holdout import split_by_fraction, split_by_second
from ingest.index import index_cases
from ingest.manifest import Manifest, cases_of
from ingest.pipeline import DataConfig
from ingest.stores import open_store
from ingest.testing import make_cases
from tests.ruined import files_of, make_set
from train.config import Recipe
from train.launch import keep_changes, open_data, resumed_held_out
from train.records import read_events
from train.resume_rules import Change, changes_of

QUIET = Console(file=io.StringIO())


def resume(of_run: str, left_out: list[int] | None = None, **data: object) -> Manifest:
    """The manifest of a run that is resumed with these settings of its data."""
    recipe = Recipe(data=DataConfig(**data))
    cases = None if left_out is None else np.array(left_out)
    manifest, recipe = open_data(recipe, of_run, QUIET, left_out=cases)
    assert (recipe.data.images, recipe.data.labels) == (manifest.images_uri, manifest.labels_uri)
    return manifest


@pytest.fixture
def old(tmp_path) -> Path:
    make_set(tmp_path / "old", 5)
    return tmp_path / "old"


@pytest.fixture
def of_run(old, tmp_path) -> str:
    uri = f"{tmp_path}/run/manifest.parquet"
    index_cases(f"{old}/images", f"{old}/labels").manifest.save(uri)
    return uri


@pytest.fixture
def new(old, of_run, tmp_path) -> Path:
    """Where the data is now; the old place is gone."""
    shutil.copytree(old, tmp_path / "new", copy_function=shutil.copy)  # with new times, which are its generations
    shutil.rmtree(old)
    return tmp_path / "new"


def places(root: Path) -> dict[str, str]:
    return {"images": f"{root}/images", "labels": f"{root}/labels"}


def is_read(manifest: Manifest) -> bool:
    """Whether every object is there as the manifest has it."""
    cases = cases_of(manifest.table)
    open_store(manifest.images_uri).fetch([case.image for case in cases])
    open_store(manifest.labels_uri).fetch([case.label for case in cases])
    return True


def test_new_uris_of_the_same_cases_are_accepted_and_every_case_keeps_its_index(new, of_run):
    before, manifest = Manifest.load(of_run), resume(of_run, **places(new))
    assert manifest.table["case_id"].equals(before.table["case_id"])
    assert manifest.images_uri == open_store(f"{new}/images").uri
    assert is_read(manifest)


def test_a_manifest_of_the_new_place_is_accepted_and_that_place_is_read(new, of_run, tmp_path):
    uri = f"{tmp_path}/new.parquet"
    index_cases(**{f"{role}_uri": place for role, place in places(new).items()}).manifest.save(uri)
    manifest = resume(of_run, manifest=uri)
    assert manifest.labels_uri == open_store(f"{new}/labels").uri
    assert is_read(manifest)
    with pytest.raises(ConfigError, match="found a manifest of"):
        resume(of_run, manifest=uri, images=f"{tmp_path}/elsewhere", labels=f"{new}/labels")


def test_other_cases_are_refused_and_the_differences_are_counted_and_named(new, of_run):
    image, label = files_of(new, 1)
    image.rename(image.with_name("other_x.npy"))
    label.rename(label.with_name("other_y.npy"))
    files_of(new, 2)[0].write_bytes(b"shorter")
    with pytest.raises(ManifestError) as caught:
        resume(of_run, **places(new))
    assert "1 missing there (case_00001), 1 there and not in the run (other)" in str(caught.value)
    assert "1 of another size (case_00002)" in str(caught.value)


def test_a_quarantined_case_need_not_be_there(new, of_run):
    for file in files_of(new, 1):
        file.unlink()
    with pytest.raises(ManifestError, match=r"1 missing there \(case_00001\)"):
        resume(of_run, **places(new))
    manifest = resume(of_run, left_out=[1], **places(new))
    assert len(manifest) == 5
    assert manifest.images_uri == open_store(f"{new}/images").uri


def test_data_that_is_gone_is_named_with_the_settings_that_say_where_it_is(new, old, of_run):
    with pytest.raises(ConfigError, match=r"expected the run's images in .*--data\.images and --data\.labels"):
        resume(of_run)
    with pytest.raises(ConfigError, match=r"expected the run's images in .*--data\.images and --data\.labels"):
        resume(of_run, **places(old))
    assert is_read(resume(of_run, **places(new)))  # the advice, followed


def test_data_that_is_where_it_was_is_resumed_without_uris(old, of_run):
    manifest = resume(of_run)
    assert manifest.table.equals(Manifest.load(of_run).table)
    assert is_read(manifest)


def test_an_evaluation_set_that_moved_is_compared_and_read_where_it_is(new, of_run):
    before = split_by_second(Manifest.load(of_run), Manifest.load(of_run))
    data = DataConfig(eval_images=f"{new}/images", eval_labels=f"{new}/labels")
    split = resumed_held_out(data, before)
    assert split.indices.tolist() == before.indices.tolist()
    assert is_read(split.held_out)
    files_of(new, 3)[1].write_bytes(b"")
    with pytest.raises(ManifestError, match=r"1 of another size \(case_00003\)"):
        resumed_held_out(data, before)


def in_bucket(bucket: str, seed: int = 5) -> dict[str, str]:
    """So many cases on the server; put there again they have new generations."""
    uris = {"images": f"gs://{bucket}/images/", "labels": f"gs://{bucket}/labels/"}
    make_cases(open_store(uris["images"]), open_store(uris["labels"]), 5, shape=(10, 10, 10), seed=seed)
    return uris


def test_objects_with_new_generations_and_the_same_bytes_are_resumed_where_they_are(bucket, tmp_path):
    uris, uri = in_bucket(bucket), f"{tmp_path}/manifest.parquet"
    before = index_cases(uris["images"], uris["labels"]).manifest
    before.save(uri)
    in_bucket(bucket)  # as a server does that is started again
    for given in (uris, {}):
        manifest = resume(uri, **given)
        assert is_read(manifest)
        assert not manifest.table["image_generation"].equals(before.table["image_generation"])
        assert manifest.table["image_crc32c"].equals(before.table["image_crc32c"])


def test_an_object_with_other_bytes_keeps_its_old_generation_so_that_the_policies_decide(bucket, tmp_path):
    uris, uri = in_bucket(bucket), f"{tmp_path}/manifest.parquet"
    before = index_cases(uris["images"], uris["labels"]).manifest
    before.save(uri)
    in_bucket(bucket)
    name = before.table["image"][2].as_py()
    store = open_store(uris["images"])
    [meta] = list(store.list(name))
    body = bytearray(store.fetch([meta])[0])
    body[-1] ^= 1
    store.put(name, bytes(body))
    now, was = (found.table["image_generation"].to_pylist() for found in (resume(uri), before))
    assert [new == old for new, old in zip(now, was, strict=True)] == [False, False, True, False, False]


def test_a_bucket_with_other_bytes_of_the_same_sizes_is_refused(bucket, tmp_path):
    uris, uri = in_bucket(bucket), f"{tmp_path}/manifest.parquet"
    index_cases(uris["images"], uris["labels"]).manifest.save(uri)
    other = {role: place.replace(role, f"moved/{role}") for role, place in uris.items()}
    make_cases(open_store(other["images"]), open_store(other["labels"]), 5, shape=(10, 10, 10), seed=6)
    with pytest.raises(ManifestError, match=r"5 of another checksum \(case_00000, case_00001, case_00002 and 2 more\)"):
        resume(uri, **other)


def test_local_files_are_compared_by_size_and_keep_the_checksums_of_the_bucket_they_came_from(bucket, tmp_path):
    uris, uri = in_bucket(bucket), f"{tmp_path}/manifest.parquet"
    before = index_cases(uris["images"], uris["labels"]).manifest
    before.save(uri)
    make_cases(open_store(f"{tmp_path}/images"), open_store(f"{tmp_path}/labels"), 5, shape=(10, 10, 10), seed=5)
    manifest = resume(uri, **places(tmp_path))
    assert manifest.table["image_crc32c"].equals(before.table["image_crc32c"])
    assert is_read(manifest)


def test_a_move_is_an_event_of_the_run_and_its_folder_names_the_new_place(new, of_run):
    before = Manifest.load(of_run)
    manifest = resume(of_run, **places(new))
    run_dir = of_run.removesuffix("/manifest.parquet")
    kept = split_by_fraction(before, 0, 0.4).held_out
    split = split_by_fraction(manifest, 0, 0.4)
    lines = keep_changes(run_dir, [Change("trainer.epochs", 2, 3)], manifest, split, kept)
    assert [event.text for event in read_events(run_dir)] == lines
    assert lines == [
        "trainer.epochs 2 -> 3 at step 0",
        f"data.images {before.images_uri} -> {manifest.images_uri} at step 0",
        f"data.labels {before.labels_uri} -> {manifest.labels_uri} at step 0",
    ]
    assert is_read(Manifest.load(of_run))
    held_out = Manifest.load(f"{run_dir}/held_out.parquet")
    assert is_read(held_out)
    assert held_out.table["case_id"].equals(kept.table["case_id"])
    assert is_read(resume(of_run))  # the next start needs no URIs
    assert keep_changes(run_dir, [], manifest, split, split.held_out) == []


def test_what_a_run_resolves_by_itself_is_no_change_of_its_settings(bucket):
    recipe = Recipe(data=DataConfig(**in_bucket(bucket)))
    _, resolved = open_data(recipe, None, QUIET)
    assert resolved.data.store != recipe.data.store
    assert changes_of(resolved, recipe, "run") == []
