"""A demo's cases are served by a server of the run's own: a run that goes on finds them again, and no other ones."""

import dataclasses
import io
import shutil

import pytest
from rich.console import Console

from ingest.crop import CropConfig
from ingest.errors import ManifestError
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig
from train import preflight
from train.config import DemoConfig, Recipe
from train.launch import data_of, open_data

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return Recipe(
        data=DataConfig(crop=CropConfig(patch=(8, 8, 8))),
        demo=DemoConfig(cases=4, shape=(16, 16, 16), data_dir=str(tmp_path_factory.mktemp("demo"))),
    )


@pytest.fixture(scope="module")
def saved(demo, tmp_path_factory):
    """Where the manifest of a run's beginning lies."""
    uri = f"{tmp_path_factory.mktemp('run')}/manifest.parquet"
    with data_of(demo, QUIET) as recipe:
        open_data(recipe, None, QUIET, served=True)[0].save(uri)
    return uri


def test_a_run_that_goes_on_reads_the_cases_of_a_server_that_was_started_again(demo, saved):
    with data_of(demo, QUIET) as recipe:
        manifest, recipe = open_data(recipe, saved, QUIET, served=True)
        preflight.check_smallest(recipe, manifest)
    before, generations = Manifest.load(saved), ["image_generation", "label_generation"]
    assert manifest.table.drop_columns(generations).equals(before.table.drop_columns(generations))


def test_a_run_does_not_go_on_with_other_bytes_of_the_same_length(demo, saved, tmp_path):
    shutil.copytree(demo.demo.data_dir, tmp_path, dirs_exist_ok=True)
    label = next(tmp_path.rglob("labels/*.npy"))
    body = bytearray(label.read_bytes())
    body[-1] ^= 1
    label.write_bytes(body)
    demo = dataclasses.replace(demo, demo=dataclasses.replace(demo.demo, data_dir=str(tmp_path)))
    with (
        data_of(demo, QUIET) as recipe,
        pytest.raises(ManifestError, match=r"expected the 4 cases .* found other ones.*begin a new run"),
    ):
        open_data(recipe, saved, QUIET, served=True)
