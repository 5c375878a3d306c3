"""Checkpoints: whole or not used, and never ahead of the data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ingest.errors import ConfigError
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig
from ingest.progress import EpochPart
from ingest.quarantine import QuarantineBook, QuarantineEntry
from train import checkpoint
from train.checkpoint import START, Position
from train.config import Recipe, TrainerConfig
from train.holdout import Holdout
from train.loop import LoopJob, bad_on_all, remainder


def indices(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def save(
    run_dir: Path,
    name: str,
    *,
    epoch: int,
    step: int,
    parts: list[np.ndarray],
    sealed: bool = True,
    unscored: dict | None = None,
) -> torch.nn.Module:
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    folder = run_dir / name
    folder.mkdir(parents=True)
    files: checkpoint.Files = {}
    for rank, mine in enumerate(parts):
        files |= checkpoint.write(
            folder,
            rank=rank,
            ranks=len(parts),
            part=EpochPart(epoch, mine, 1.0, 1),
            step=step,
            network=network,
            optimizer=optimizer,
            recipe_json="{}",
            unscored=unscored,
        )
    if sealed:
        checkpoint.seal(str(run_dir), name, files)
    return network


def test_a_run_without_a_checkpoint_starts_at_the_start(tmp_path):
    assert checkpoint.read_position(str(tmp_path)) == START


def test_the_named_checkpoint_counts_and_not_a_newer_one_that_is_not_named_yet(tmp_path):
    network = save(tmp_path, "checkpoint_a", epoch=1, step=5, parts=[indices(1, 2), indices(3)])
    checkpoint.name_latest(str(tmp_path), "checkpoint_a")
    save(tmp_path, "checkpoint_b", epoch=2, step=9, parts=[indices()])
    position = checkpoint.read_position(str(tmp_path))
    assert (position.checkpoint, position.epoch, position.step) == ("checkpoint_a", 1, 5)
    assert position.before.indices.tolist() == [1, 2, 3]
    state = checkpoint.load_state(str(tmp_path), "checkpoint_a")
    assert torch.equal(state["model"]["weight"], network.weight)


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path):
    save(tmp_path, "checkpoint_a", epoch=1, step=5, parts=[indices(1)])
    checkpoint.name_latest(str(tmp_path), "checkpoint_a")
    (tmp_path / "checkpoint_a" / "state.pt").unlink()
    with pytest.raises(ConfigError, match=r"expected state\.pt in .*checkpoint_a, found manifest\.json"):
        checkpoint.read_position(str(tmp_path))


@pytest.mark.parametrize(
    "damage",
    ["gone", "no state", "a rank's progress is missing", "position cut", "progress cut", "four bytes", "not finished"],
)
def test_a_run_goes_on_from_the_newest_whole_checkpoint_if_the_named_one_is_not_and_says_so(tmp_path, damage):
    save(tmp_path, "checkpoint_a", epoch=0, step=3, parts=[indices(1), indices(2)])
    save(tmp_path, "checkpoint_b", epoch=1, step=5, parts=[indices(4), indices(5)])
    save(tmp_path, "checkpoint_c", epoch=2, step=9, parts=[indices(7), indices(8)])
    checkpoint.name_latest(str(tmp_path), "checkpoint_c")
    named = tmp_path / "checkpoint_c"
    if damage == "gone":
        shutil.rmtree(named)
    elif damage == "no state":
        (named / "state.pt").unlink()
    elif damage == "a rank's progress is missing":
        (named / "progress-00001.npz").unlink()
    elif damage == "not finished":
        (named / "manifest.json").unlink()
    elif damage == "four bytes":  # of the weights, of the same length
        file = named / "state.pt"
        data = bytearray(file.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 4] = bytes(255 - value for value in data[len(data) // 2 :][:4])
        file.write_bytes(data)
    else:
        file = named / ("position.json" if damage == "position cut" else "progress-00000.npz")
        file.write_bytes(file.read_bytes()[:9])
    position = checkpoint.read_position(str(tmp_path))
    assert (position.checkpoint, position.step) == ("checkpoint_b", 5)
    assert str(named) in position.instead_of
    assert ("bytes in" in position.instead_of) == (damage in ("position cut", "progress cut"))


def test_without_latest_json_a_run_goes_on_from_the_newest_whole_checkpoint_and_does_not_train_again(tmp_path):
    save(tmp_path, "checkpoint_a", epoch=1, step=5, parts=[indices(1)])
    save(tmp_path, "checkpoint_b", epoch=2, step=9, parts=[indices(2)])
    state = tmp_path / "checkpoint_b" / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])  # cut off while it was written
    position = checkpoint.read_position(str(tmp_path))
    assert (position.checkpoint, position.epoch) == ("checkpoint_a", 1)
    assert "latest.json, found none" in position.instead_of


def test_a_run_that_was_killed_in_its_first_checkpoint_starts_at_the_start_and_says_so(tmp_path):
    save(tmp_path, "checkpoint_a", epoch=0, step=3, parts=[indices(1)], sealed=False)
    position = checkpoint.read_position(str(tmp_path))
    assert (position.checkpoint, position.step, position.epoch) == (None, 0, 0)
    assert "no finished checkpoint among checkpoint_a" in position.instead_of


def test_finished_checkpoints_that_are_all_damaged_are_refused_by_name_though_none_is_named(tmp_path):
    save(tmp_path, "checkpoint_a", epoch=0, step=3, parts=[indices(1)])
    (tmp_path / "checkpoint_a" / "progress-00000.npz").unlink()
    save(tmp_path, "checkpoint_b", epoch=0, step=6, parts=[indices(1)], sealed=False)
    with pytest.raises(ConfigError, match=r"expected progress-00000\.npz in .*checkpoint_a.*manifest\.json in .*_b"):
        checkpoint.read_position(str(tmp_path))


@pytest.mark.parametrize("manifest", ["", "[]", '{"files": {}}', '{"files": {"state.pt": {"size": 1}}}'])
def test_a_damaged_manifest_of_a_checkpoint_is_named(tmp_path, manifest):
    save(tmp_path, "checkpoint_a", epoch=0, step=3, parts=[indices(1)])
    checkpoint.name_latest(str(tmp_path), "checkpoint_a")
    (tmp_path / "checkpoint_a" / "manifest.json").write_text(manifest)
    with pytest.raises(ConfigError, match=r"checkpoint_a/manifest\.json, found"):
        checkpoint.read_position(str(tmp_path))


def test_an_epoch_that_is_trained_and_not_scored_stays_so_until_it_is_said_to_be_scored(tmp_path):
    row = {"epoch": 1, "train_loss": 0.5}
    save(tmp_path, "checkpoint_a", epoch=2, step=5, parts=[indices()], unscored=row)
    checkpoint.name_latest(str(tmp_path), "checkpoint_a")
    position = checkpoint.read_position(str(tmp_path))
    assert (position.phase, position.unscored, position.epoch) == ("score", row, 2)
    checkpoint.name_latest(str(tmp_path), "checkpoint_a", scored=True)
    position = checkpoint.read_position(str(tmp_path))
    assert (position.phase, position.unscored, position.epoch) == ("train", None, 2)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checkpoint": 3}', '{"checkpoint": "a", "rows": 1}'])
def test_a_damaged_latest_json_is_named(tmp_path, text):
    save(tmp_path, "checkpoint_a", epoch=1, step=5, parts=[indices(1)])
    (tmp_path / "latest.json").write_text(text)
    with pytest.raises(ConfigError, match=r"latest\.json: expected the name of a checkpoint"):
        checkpoint.read_position(str(tmp_path))


def test_an_epoch_that_leaves_out_a_step_beyond_its_quarantine_is_an_error():
    assert remainder(cases=41, trained=36, quarantined=2, step_cases=4, epoch=0) == 3
    with pytest.raises(RuntimeError, match="found 4: 41 to train on, 36 trained on, 1 in quarantine"):
        remainder(cases=41, trained=36, quarantined=1, step_cases=4, epoch=0)


def test_the_data_of_an_epoch_are_not_read_when_what_is_left_of_it_makes_no_step():
    near_end = Position(4, EpochPart(2, indices(*range(7))), "c")
    assert near_end.first_read(train_cases=10, multiple=3) == 2
    assert near_end.first_read(train_cases=10, multiple=4) == 3
    assert near_end.epoch == 2  # its row and its scores are outstanding
    assert START.first_read(train_cases=2, multiple=4) == 0


def test_a_case_that_one_rank_trained_on_before_it_turned_bad_is_not_counted_as_quarantined():
    assert bad_on_all([indices(3, 8), indices(8)]) == 1  # the second rank trained on 3
    assert bad_on_all([indices(3, 8), indices(3, 8)]) == 2
    assert bad_on_all([indices(3), indices(8)]) == 0


@pytest.mark.parametrize(("bad", "epoch"), [([], 2), ([3], 2), ([3, 8], 3), ([9], 2), ([8, 9], 3)])
def test_a_case_that_turned_bad_after_it_was_trained_on_does_not_count_as_left(tmp_path, bad, epoch):
    save(tmp_path, "checkpoint_a", epoch=2, step=4, parts=[indices(*range(7))])
    checkpoint.name_latest(str(tmp_path), "checkpoint_a")
    book = QuarantineBook(None, 5)
    for index in bad:
        book.report(QuarantineEntry(index, f"case {index}", "", "stale", "", 3))
    data = DataConfig(images="images", labels="labels")
    recipe = Recipe(data=data, trainer=TrainerConfig(num_workers=1, batch_size=2))
    job = LoopJob(
        recipe=recipe,
        run_dir=str(tmp_path),
        holdout=Holdout(Manifest.from_cases([], images_uri="", labels_uri=""), indices(9), data),
        train_cases=9,
        total_cases=10,
        quarantine=book,
    )
    position, plan = job.planned()
    assert position.epoch == 2
    assert plan[:2] == ("checkpoint_a", epoch)  # seven of nine are trained on, and a step takes two


def test_a_checkpoint_holds_nothing_that_runs_when_it_is_loaded(tmp_path):
    save(tmp_path, "checkpoint_a", epoch=0, step=1, parts=[indices(1)])
    assert json.loads((tmp_path / "checkpoint_a" / "position.json").read_text()) == {
        "epoch": 0, "step": 1, "ranks": 1, "phase": "train"
    }  # fmt: skip
    torch.load(tmp_path / "checkpoint_a" / "state.pt", weights_only=True)
    np.load(tmp_path / "checkpoint_a" / "progress-00000.npz", allow_pickle=False).close()


def test_of_two_checkpoints_of_one_step_the_one_whose_epoch_is_trained_is_newer(tmp_path):
    # Under a quarantine a checkpoint may be due after the last step of an epoch, and the end of the epoch is the next.
    save(tmp_path, "checkpoint_a", epoch=0, step=4, parts=[indices(0, 1, 2, 3)])
    save(tmp_path, "checkpoint_b", epoch=1, step=4, parts=[indices()], unscored={"epoch": 0, "samples": 4})
    position = checkpoint.read_position(str(tmp_path))
    assert (position.checkpoint, position.phase, position.unscored) == (
        "checkpoint_b",
        "score",
        {"epoch": 0, "samples": 4},
    )
