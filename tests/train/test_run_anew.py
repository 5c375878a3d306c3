"""A run that begins where another got to no checkpoint takes none of its lists of cases for its own."""

import dataclasses
import io

import pytest
from pyarrow.fs import LocalFileSystem
from ray.train import Checkpoint, Result
from rich.console import Console

from ingest.quarantine import QUARANTINE_FILE, QuarantineBook, QuarantineEntry, load_entries
from train import launch
from train.holdout import HELD_OUT_FILE
from train.recipes import RECIPES

DEMO = RECIPES["demo"][1]


class BegunError(Exception):
    """The run has looked at its folder."""


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """The folder of a run that ended since too many of its cases were bad, before its first checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.json").write_text(DEMO.to_json())
    (folder / HELD_OUT_FILE).write_bytes(b"cases of that run")
    QuarantineBook(str(folder), 5).report(QuarantineEntry(3, "case_3", "gs://wrong/case_3", "not-npy", "no NPY", 0))

    def begun(*_: object) -> None:
        raise BegunError

    monkeypatch.setattr(launch.preflight, "check_space", begun)
    return folder


def test_a_new_run_in_the_folder_of_one_without_a_checkpoint_leaves_out_none_of_its_bad_cases(run_dir):
    console = Console(record=True, width=1000, file=io.StringIO())
    with pytest.raises(BegunError):
        launch.run(dataclasses.replace(DEMO, run_dir=str(run_dir)), "demo", console)
    assert load_entries(str(run_dir)) == []
    assert {file.name for file in run_dir.iterdir()} == {"recipe.json"}
    words = console.export_text()
    assert f"removed {run_dir / QUARANTINE_FILE}, of an earlier run that got to no checkpoint" in words
    assert f"removed {run_dir / HELD_OUT_FILE}" in words


def test_the_same_run_resumed_keeps_them(run_dir, monkeypatch):
    monkeypatch.setattr(launch, "check_run_folder", lambda _: [])
    resumed = dataclasses.replace(DEMO.trainer, resume=str(run_dir))
    with pytest.raises(BegunError):
        launch.run(dataclasses.replace(DEMO, trainer=resumed), "demo", Console(quiet=True))
    assert [entry.index for entry in load_entries(str(run_dir))] == [3]
    assert (run_dir / HELD_OUT_FILE).exists()


@pytest.mark.parametrize("run_dir", ["gs://bucket/runs/one", "/data/runs/one"])
def test_the_newest_checkpoint_is_named_with_its_scheme_so_that_it_can_be_given_to_a_command(run_dir):
    newest = Checkpoint(f"{run_dir.removeprefix('gs://')}/checkpoint_2026", filesystem=LocalFileSystem())
    result = Result(metrics=None, checkpoint=newest, error=None, path=run_dir)
    assert launch.newest_place(run_dir, result) == f"{run_dir}/checkpoint_2026"
