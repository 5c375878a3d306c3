"""A run's folder with each file damaged in turn: it is named before Ray starts, and the page is made of the rest."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from ingest.errors import ConfigError, ManifestError
from ingest.manifest import Manifest
from ingest.pairing import Case
from ingest.stores import open_store
from ingest.stores.base import ObjectMeta
from tests.train.test_checkpoint import indices, save
from tests.train.test_page import row, whole_run
from train import launch
from train.audit import audit
from train.best import keep_best
from train.check_folder import check_run_folder
from train.checkpoint import name_latest
from train.config import Recipe, TrainerConfig
from train.holdout import load_held_out
from train.lease import LEASE_FILE, Holder
from train.page import page_of
from train.weights import find_state, load_trained

NEEDED = [
    "recipe.json",
    "manifest.parquet",
    "held_out.parquet",
    "quarantine.parquet",
    "metrics.json",
    "events.json",
    "best.json",
    "latest.json",
]
OF_THE_PAGE = ["slices.npz", "steps/00001-a-00000.parquet"]
DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "binary": lambda _: b"\xff\xfe\x00\x80" * 9,
    "list": lambda _: b"[1, 2]",
    "number": lambda _: b"7",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    whole_run(folder, epochs=2)
    metas = [ObjectMeta(f"{role}.npy", 10, 1, 1) for role in ("x", "y")]
    manifest = Manifest.from_cases([Case("case", *metas)], images_uri="gs://b/i/", labels_uri="gs://b/l/")
    for name in ("manifest", "held_out"):
        manifest.save(f"{folder}/{name}.parquet")
    for name in ("checkpoint_1", "checkpoint_2"):
        save(folder, name, epoch=1, step=5, parts=[indices(1)])
    name_latest(str(folder), "checkpoint_2")
    keep_best(str(folder), "checkpoint_2", row(1))
    killed = dataclasses.replace(Holder.here(), process_start="of another process")
    (folder / LEASE_FILE).write_bytes(killed.to_bytes())
    return folder


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def spoil(run_dir: Path, name: str, damage: str) -> None:
    file = run_dir / name
    file.write_bytes(DAMAGES[damage](file.read_bytes()))


def test_a_whole_folder_passes_and_so_does_none(run_dir):
    assert check_run_folder(str(run_dir)) == []
    assert check_run_folder(str(run_dir / "nowhere")) == []


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", NEEDED)
def test_a_damaged_file_that_the_run_goes_by_is_named_with_the_checkpoints_there_are(run_dir, name, damage):
    spoil(run_dir, name, damage)
    with pytest.raises(ConfigError) as caught:
        check_run_folder(str(run_dir))
    assert name in str(caught.value)
    assert "found 1 that cannot be read (whole checkpoints there: checkpoint_1, checkpoint_2)" in str(caught.value)
    assert "put back a copy" in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", OF_THE_PAGE)
def test_a_damaged_file_of_the_page_is_told_of_and_the_run_goes_on(run_dir, name, damage):
    spoil(run_dir, name, damage)
    (words,) = check_run_folder(str(run_dir))
    assert name in words


def test_all_damaged_files_are_named_at_once(run_dir):
    for name in NEEDED:
        spoil(run_dir, name, "cut")
    with pytest.raises(ConfigError) as caught:
        check_run_folder(str(run_dir))
    assert all(name in str(caught.value) for name in NEEDED)


def test_a_resumed_run_checks_its_folder_before_anything_else_of_it(run_dir):
    spoil(run_dir, "metrics.json", "cut")
    with pytest.raises(ConfigError, match=r"metrics\.json"):
        launch.run(Recipe(trainer=TrainerConfig(resume=str(run_dir))), "x", Console())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["recipe.json", "metrics.json", "events.json", "quarantine.parquet", *OF_THE_PAGE])
def test_a_page_is_made_of_the_whole_files_and_names_the_damaged_one(run_dir, name, damage):
    assert "Files that cannot be read" not in page_of(str(run_dir))
    spoil(run_dir, name, damage)
    html = page_of(str(run_dir))
    assert f"{name}: expected" in html
    assert ("not-npy" in html) == (name != "quarantine.parquet")


@pytest.mark.parametrize("damage", DAMAGES)
def test_evaluate_predict_and_audit_name_the_damaged_file(run_dir, damage):
    spoil(run_dir, "best.json", damage)
    with pytest.raises(ConfigError, match=r"best\.json: expected the name of a checkpoint"):
        find_state(str(run_dir))
    spoil(run_dir, "held_out.parquet", damage)
    with pytest.raises(ManifestError, match=r"held_out\.parquet, found a damaged file"):
        load_held_out(str(run_dir))
    spoil(run_dir, "recipe.json", damage)
    with pytest.raises(ConfigError, match=r"recipe\.json: expected a saved recipe"):
        audit(str(run_dir), "ledger")


def test_a_recipe_whose_part_is_no_tree_is_refused(run_dir):
    (run_dir / "recipe.json").write_text('{"trainer": 5}')
    with pytest.raises(ConfigError, match="TrainerConfig is no tree of settings"):
        check_run_folder(str(run_dir))


def test_the_best_checkpoint_does_not_give_way_to_a_lower_score_when_rows_are_missing(run_dir):
    before = (run_dir / "best" / "state.pt").read_bytes()
    save(run_dir, "checkpoint_3", epoch=2, step=9, parts=[indices(1)])
    keep_best(str(run_dir), "checkpoint_3", row(2, mean_dice=0.01))
    assert (run_dir / "best" / "state.pt").read_bytes() == before
    keep_best(str(run_dir), "checkpoint_3", row(2, mean_dice=0.99))
    assert json.loads((run_dir / "best.json").read_text())["epoch"] == 2


def test_a_best_of_an_earlier_version_without_a_score_gives_way_to_the_last_checkpoint(run_dir):
    about = '{"checkpoint": "best", "epoch": 0, "step": 1, "mean_dice": NaN}'
    open_store(str(run_dir)).put("best.json", about.encode())
    assert find_state(str(run_dir))[0] == f"{run_dir}/checkpoint_2"


@pytest.mark.parametrize("folder", ["best", "checkpoint_2"])
def test_weights_with_four_flipped_bytes_are_refused_by_name(run_dir, folder):
    file = Path(run_dir) / folder / "state.pt"
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4] = bytes(255 - value for value in data[middle : middle + 4])
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"{folder}/state\.pt: expected the weights .* found damage"):
        load_trained(f"{run_dir}/{folder}")
