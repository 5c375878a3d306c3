"""Ray begins where its own record of checkpoints is whole, or is not there: a damaged one is removed and told of."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray.train
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

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
    assert drop_damaged_record(str(record.parent)) is None
    assert record.read_text() == text
    assert len(rays_own(record.parent).best_checkpoint_results) == 1


@pytest.mark.parametrize("size", [0, 100])
def test_a_run_whose_disk_filled_up_while_ray_wrote_its_record_can_be_resumed(record, size):
    record.write_bytes(record.read_bytes()[:size])
    with pytest.raises(CheckpointManagerInitializationError):
        rays_own(record.parent)
    words = drop_damaged_record(str(record.parent))
    assert f"{record}: expected Ray's record of checkpoints, found damage" in words
    assert not record.exists()
    assert (record.parent / "checkpoint_a" / "state.pt").exists()
    rays_own(record.parent)


def test_a_record_of_a_checkpoint_that_is_gone_is_removed_with_a_word(record):
    (record.parent / "checkpoint_a" / "state.pt").unlink()
    (record.parent / "checkpoint_a").rmdir()
    with pytest.raises(CheckpointManagerInitializationError):
        rays_own(record.parent)
    assert "found no checkpoint_a; it was removed" in drop_damaged_record(str(record.parent))
    rays_own(record.parent)


def test_a_new_run_has_no_record(tmp_path):
    assert drop_damaged_record(str(tmp_path)) is None
    assert drop_damaged_record(str(tmp_path / "none")) is None
