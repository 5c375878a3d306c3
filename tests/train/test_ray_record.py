"""Ray begins where its own record of checkpoints is whole, or is not there: a damaged one is removed and told of."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import ray.train
import torch
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from ingest.progress import EpochPart
from train import checkpoint
from train.ray_compat import RECORD_FILE
from train.ray_record import drop_damaged_record
from train.run_storage import storage_of

pytestmark = pytest.mark.filterwarnings("ignore:The `parse_obj` method is deprecated")  # Ray's own


def rays_own(run_dir: Path) -> CheckpointManager:
    """What Ray's controller begins with; it reads the record."""
    storage = storage_of(str(run_dir))
    context = StorageContext(storage.path, storage.name, storage_filesystem=storage.filesystem)
    return CheckpointManager(ray.train.CheckpointConfig(num_to_keep=2), context)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """The record of a run with one checkpoint, as Ray writes it."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoint_a").mkdir(parents=True)
    (run_dir / "checkpoint_a" / "state.pt").write_bytes(b"weights")
    manager = rays_own(run_dir)
    manager._write_state_to_storage()
    file = run_dir / RECORD_FILE
    text = file.read_text()
    assert '"checkpoint_results":[]' in text
    result = '{"version":0,"checkpoint_dir_name":"checkpoint_a","metrics":{"row":null,"step":5}}'
    text = text.replace('"checkpoint_results":[]', f'"checkpoint_results":[{result}]')
    text = text.replace('"checkpoint_report_indices":[]', '"checkpoint_report_indices":[1]')
    file.write_text(text)
    return file


def test_a_whole_record_stays(record):
    text = record.read_text()
    assert drop_damaged_record(str(record.parent), "checkpoint_a") is None
    assert record.read_text() == text
    assert len(rays_own(record.parent).best_checkpoint_results) == 1


@pytest.mark.parametrize("size", [0, 100])
def test_a_run_whose_disk_filled_up_while_ray_wrote_its_record_can_be_resumed(record, size):
    record.write_bytes(record.read_bytes()[:size])
    with pytest.raises(CheckpointManagerInitializationError):
        rays_own(record.parent)
    words = drop_damaged_record(str(record.parent), "checkpoint_a")
    assert f"{record}: expected Ray's record of checkpoints, found damage" in words
    assert not record.exists()
    assert (record.parent / "checkpoint_a" / "state.pt").exists()
    rays_own(record.parent)


def test_a_record_of_a_checkpoint_that_is_gone_is_removed_with_a_word(record):
    (record.parent / "checkpoint_a" / "state.pt").unlink()
    (record.parent / "checkpoint_a").rmdir()
    with pytest.raises(CheckpointManagerInitializationError):
        rays_own(record.parent)
    assert "found no checkpoint_a; it was removed" in drop_damaged_record(str(record.parent), "checkpoint_a")
    rays_own(record.parent)


def stored(run_dir: Path, name: str) -> checkpoint.Files:
    """Store a checkpoint as the ranks and Ray do, before our controller finishes it; Ray deletes the oldest."""
    network = torch.nn.Linear(1, 1)
    (run_dir / name).mkdir(parents=True)
    files = checkpoint.write(
        run_dir / name,
        rank=0,
        ranks=1,
        part=EpochPart(1, np.zeros(0, dtype=np.int64)),
        step=3,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        recipe_json="{}",
    )

    async def register() -> None:
        kept = ray.train.Checkpoint(str(run_dir / name), storage_of(str(run_dir)).filesystem)
        rays_own(run_dir).register_checkpoint(_TrainingReport(checkpoint=kept, metrics={}, validation=False))

    asyncio.run(register())
    return files


def test_crashes_before_checkpoints_are_finished_leave_the_whole_one_however_many_there_are(tmp_path):
    run_dir = str(tmp_path)
    checkpoint.seal(run_dir, "checkpoint_a", stored(tmp_path, "checkpoint_a"))
    checkpoint.name_latest(run_dir, "checkpoint_a")
    assert drop_damaged_record(run_dir, "checkpoint_a") is None
    for name in ("checkpoint_b", "checkpoint_c", "checkpoint_d"):
        stored(tmp_path, name)  # and the controller dies
        assert checkpoint.read_position(run_dir).checkpoint == "checkpoint_a"
        words = drop_damaged_record(run_dir, "checkpoint_a")
        assert f"expected checkpoint_a, which the run goes on from, to be the newest of {tmp_path}" in words
        assert f"found {name}; it was removed" in words


def test_a_new_run_has_no_record(tmp_path):
    assert drop_damaged_record(str(tmp_path), None) is None
    assert drop_damaged_record(str(tmp_path / "none"), None) is None
