"""A disk that fills up in mid-run ends the run, with the path and the room that it needs."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import ray.exceptions
import torch
from rich.console import Console

from ingest.errors import ConfigError, DiskFullError, StoreError
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig
from ingest.progress import EpochPart
from train import checkpoint, disk_full, finish, loop, preflight
from train.config import Recipe, TrainerConfig
from train.holdout import Holdout
from train.ledger import Ledger
from train.loop import LoopJob

MIB = 2**20
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def job(tmp_path: Path) -> LoopJob:
    data = DataConfig(images="images", labels="labels")
    indices = np.zeros(0, dtype=np.int64)
    return LoopJob(
        recipe=Recipe(data=data, trainer=TrainerConfig(ledger=str(tmp_path / "ledger"), epochs=10)),
        run_dir=str(tmp_path / "run"),
        holdout=Holdout(Manifest.from_cases([], images_uri="", labels_uri=""), indices, data),
        train_cases=100_000,
        total_cases=100_000,
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch, job: LoopJob, tmp_path: Path) -> dict[str, int]:
    """Bytes free by folder, to be changed; checkpoints of 100 MiB; Ray's session lies in a folder of its own."""
    room = {f"{tmp_path}/run": 10**12, f"{tmp_path}/ledger": 10**12, tempfile.gettempdir(): 10**12, "/ray": 10**12}

    def free_bytes(path: str) -> int:
        return next(room[folder] for folder in sorted(room, key=len, reverse=True) if path.startswith(folder))

    of_ray = disk_full.Place("/ray/session_1", 5 * MIB, "objects that Ray spills there", "give --temp-dir")
    monkeypatch.setattr(disk_full, "free_bytes", free_bytes)
    monkeypatch.setattr(disk_full, "session_folder", lambda: of_ray.path)
    monkeypatch.setattr(disk_full, "_of_ray", lambda session: of_ray)
    for module in (disk_full, preflight):
        monkeypatch.setattr(module, "checkpoint_bytes", lambda recipe: 100 * MIB)
    return room


@pytest.mark.parametrize(
    ("folder", "bytes_left", "words"),
    [
        ("{root}/run", 3 * MIB, "with 3 MiB free; the run needs 400 MiB there for its checkpoints: free as much, then"),
        (
            "{root}/ledger",
            0,
            "with 0 MiB free; the run needs 10 MiB there for the ledger: free as much, or give another ",
        ),
        (
            tempfile.gettempdir(),
            MIB,
            "the run needs 100 MiB there for a checkpoint in the making: free as much, or set ",
        ),
        ("/ray", 0, "the run needs 5 MiB there for objects that Ray spills there: free as much, or give --temp-dir"),
    ],
)
def test_of_the_folders_that_a_run_writes_to_the_one_without_room_is_named(
    job, free, tmp_path, folder, bytes_left, words
):
    folder = folder.format(root=tmp_path)
    free[folder] = bytes_left
    ended = disk_full.disk_full(NO_SPACE, job)
    assert f"expected room to write {folder}" in str(ended)
    assert "found No space left on device" in str(ended)
    assert words in str(ended)
    assert f"--trainer.resume {job.run_dir}" in str(ended)
    assert disk_full.disk_full(ended, job) is ended  # also on another machine, whose disks have room


def test_a_path_that_the_error_names_comes_before_what_is_measured(job, free, tmp_path):
    free[f"{tmp_path}/ledger"] = 0
    named = OSError(errno.ENOSPC, "No space left on device", f"{job.run_dir}/best/state.pt")
    ended = disk_full.disk_full(named, job)
    assert ended.place == f"{job.run_dir}/best/state.pt"
    assert ended.needed_bytes == 400 * MIB
    stored = DiskFullError("expected room to write it", f"{job.run_dir}/metrics.json")
    stored.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    ended = disk_full.disk_full(stored, job)
    assert ended.place == f"{job.run_dir}/metrics.json"
    assert "found Disk quota exceeded, with" in str(ended)


def test_where_every_disk_has_room_by_now_all_are_named(job, free, tmp_path):
    ended = disk_full.disk_full(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), job)
    assert ended.place is None
    for folder in (job.run_dir, tempfile.gettempdir(), "/ray/session_1"):
        assert f"{folder} (" in str(ended)
    assert "look at your quota" in str(ended)


def test_an_object_store_that_cannot_spill_is_put_down_to_rays_folder(job, free):
    ended = disk_full.disk_full(ray.exceptions.OutOfDiskError("block"), job)
    assert ended.place == "/ray/session_1"


def test_what_torch_could_not_write_is_a_full_disk_only_where_there_is_no_room(job, free):
    failed = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 768 vs 662")
    assert disk_full.disk_full(failed, job) is None
    free[tempfile.gettempdir()] = MIB
    assert disk_full.disk_full(failed, job).place == tempfile.gettempdir()


@pytest.mark.parametrize("error", [ValueError("x"), ConfigError("x"), OSError(errno.EIO, "Input/output error")])
def test_other_failures_stay_what_they_are(job, free, error):
    free[job.run_dir] = 0
    assert disk_full.disk_full(error, job) is None


def test_a_checkpoint_on_a_full_disk_fails_with_the_systems_own_error(tmp_path):
    (tmp_path / "state.pt").symlink_to("/dev/full")
    network = torch.nn.Linear(300, 300)
    with pytest.raises(OSError, match="No space left") as failed:
        checkpoint.write(
            tmp_path,
            rank=0,
            ranks=1,
            part=EpochPart(0, np.zeros(0, dtype=np.int64)),
            step=1,
            network=network,
            optimizer=torch.optim.SGD(network.parameters()),
            recipe_json="{}",
        )
    assert failed.value.errno == errno.ENOSPC


def ledger_on_a_full_disk(folder: Path) -> Ledger:
    ledger = Ledger(str(folder), attempt="a", rank=0, world_size=1, batch_size=1, step=0, checkpoint=None)
    ledger._file.close()
    ledger._file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115  the test closes it
    return ledger


class Rank:
    """A rank whose ledger's disk fills up, so that closing the ledger fails too."""

    def __init__(self, job: LoopJob) -> None:
        self.ledger = ledger_on_a_full_disk(Path(job.recipe.trainer.ledger))

    def run(self) -> None:
        self.ledger.append(epoch=0, step=1, indices=np.arange(4))

    def close(self) -> None:
        self.ledger.__exit__(None, None, None)


def test_a_rank_whose_disk_is_full_ends_the_run_for_good(job, free, tmp_path, monkeypatch):
    free[f"{tmp_path}/ledger"] = 0
    noted: list[BaseException] = []
    monkeypatch.setattr(loop, "RankLoop", Rank)
    monkeypatch.setattr(loop, "give_up", lambda flag, error: noted.append(error))
    with pytest.raises(DiskFullError, match=r"expected room to write .*/ledger on .* needs 10 MiB there") as ended:
        loop.train_loop({"job": job})
    assert noted == [ended.value]


def test_a_rank_that_cannot_even_begin_ends_the_run_for_good_where_it_is_an_error_of_ours(job, free, monkeypatch):
    noted: list[BaseException] = []

    def refused(job: LoopJob) -> None:
        raise StoreError("expected a checkpoint, found none")

    monkeypatch.setattr(loop, "RankLoop", refused)
    monkeypatch.setattr(loop, "give_up", lambda flag, error: noted.append(error))
    with pytest.raises(StoreError, match="expected a checkpoint"):
        loop.train_loop({"job": job})
    assert len(noted) == 1


def test_a_run_that_is_done_is_not_lost_for_pictures_that_the_disk_has_no_room_for(job, monkeypatch):
    def full(rows: list, file: Path) -> None:
        raise NO_SPACE

    monkeypatch.setattr(finish, "plot_curves", full)
    monkeypatch.setattr(finish, "write_page", lambda run_dir: "page")
    printed = io.StringIO()
    assert finish.leave_behind(job, [], None, Console(file=printed, width=300), ended=True) == ([], "page")
    assert "not all pictures were made: [Errno 28] No space left on device" in printed.getvalue()


def test_a_run_that_goes_on_needs_no_room_for_the_checkpoints_that_are_there(job, free, tmp_path):
    run_dir = tmp_path / "run"
    assert preflight.run_folder_bytes(job.recipe, str(run_dir)) == 400 * MIB
    for folder in ("checkpoint_a", "checkpoint_b", "best"):
        (run_dir / folder).mkdir(parents=True)
        with (run_dir / folder / "state.pt").open("wb") as file:
            file.truncate(100 * MIB)
    assert preflight.run_folder_bytes(job.recipe, str(run_dir)) == 100 * MIB
    (run_dir / "checkpoint_torn").mkdir()
    with (run_dir / "checkpoint_torn" / "state.pt").open("wb") as file:
        file.truncate(90 * MIB)
    assert preflight.run_folder_bytes(job.recipe, str(run_dir)) == 100 * MIB
    more = dataclasses.replace(job.recipe.trainer, checkpoints_kept=5)
    assert preflight.run_folder_bytes(dataclasses.replace(job.recipe, trainer=more), str(run_dir)) == 310 * MIB
