"""The run's controller names each checkpoint before anything else can fail, and no row is lost."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ingest.errors import StoreError
from train import metrics
from train.metrics import MetricsWriter, read_metrics


class Told:
    """A monitor that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def tell(self, method: str, *arguments: object) -> None:
        self.events.append((method, *arguments))

    def ask(self, *_: object) -> None:
        return None


def report(epoch: int, dice: float) -> dict:
    row = {"epoch": epoch, "step": epoch + 1, "mean_dice": dice, "train_loss": 1.0, "samples": 4, "samples_per_s": 1.0}
    row |= {"first_batch_s": 0.1, "stall_share": 0.0, "au": None, "wall_s": 1.0, "stall_s": 0.0}
    causes = dict.fromkeys(metrics.CAUSES, 0.0)
    return {"row": row | {"stall_by_cause_s": causes}, "step": epoch + 1}


def saved(run_dir: Path, name: str) -> SimpleNamespace:
    (run_dir / name).mkdir()
    (run_dir / name / "state.pt").write_bytes(b"weights of " + name.encode())
    return SimpleNamespace(path=str(run_dir / name))


def named(run_dir: Path) -> str:
    return json.loads((run_dir / "latest.json").read_text())["checkpoint"]


def test_a_best_checkpoint_that_cannot_be_kept_is_told_of_and_the_new_one_is_named(tmp_path):
    monitor = Told()
    writer = MetricsWriter(str(tmp_path), monitor)
    (tmp_path / "best").write_bytes(b"")  # a file where a folder is to be: writing there fails
    for epoch, name in enumerate(("checkpoint_a", "checkpoint_b", "checkpoint_c")):
        writer.after_report(None, [report(epoch, 0.1 * epoch + 0.1)], saved(tmp_path, name))
        assert named(tmp_path) == name
    assert [row["epoch"] for row in read_metrics(str(tmp_path))] == [0, 1, 2]
    assert sum(event[:2] == ("event", "fault") and "best" in event[2] for event in monitor.events) == 3
    (tmp_path / "best").unlink()
    writer.after_report(None, [report(3, 0.9)], saved(tmp_path, "checkpoint_d"))
    assert (tmp_path / "best" / "state.pt").read_bytes() == b"weights of checkpoint_d"


def test_a_row_that_could_not_be_written_is_read_from_where_the_checkpoint_is_named_and_written_next(tmp_path):
    writer = MetricsWriter(str(tmp_path), Told())
    writer.after_report(None, [report(0, 0.5)], saved(tmp_path, "checkpoint_a"))
    kept = (tmp_path / "metrics.json").read_bytes()

    class Full:
        def put(self, name: str, data: bytes) -> None:
            raise StoreError(f"{name}: {OSError(errno.ENOSPC, 'no space')}")

    real = metrics.open_store
    with pytest.MonkeyPatch.context() as patched:
        reads = iter([real, real])  # two reads of metrics.json, then the write
        patched.setattr(metrics, "open_store", lambda uri: next(reads, lambda _: Full())(uri))
        writer.after_report(None, [report(1, 0.4)], saved(tmp_path, "checkpoint_b"))
    assert (tmp_path / "metrics.json").read_bytes() == kept
    assert named(tmp_path) == "checkpoint_b"
    assert [row["epoch"] for row in read_metrics(str(tmp_path))] == [0, 1]
    # Another start of the controller writes both.
    MetricsWriter(str(tmp_path), Told()).after_report(None, [report(2, 0.3)], saved(tmp_path, "checkpoint_c"))
    assert [row["epoch"] for row in json.loads((tmp_path / "metrics.json").read_text())] == [0, 1, 2]


def test_metrics_that_cannot_be_read_are_not_replaced_and_the_checkpoint_is_named(tmp_path):
    (tmp_path / "metrics.json").write_text("{damaged")
    monitor = Told()
    writer = MetricsWriter(str(tmp_path), monitor)
    for epoch, name in enumerate(("checkpoint_a", "checkpoint_b")):
        writer.after_report(None, [report(epoch, 0.5)], saved(tmp_path, name))
    assert named(tmp_path) == "checkpoint_b"
    assert (tmp_path / "metrics.json").read_text() == "{damaged"
    assert [row["epoch"] for row in json.loads((tmp_path / "latest.json").read_text())["rows"]] == [0, 1]
    assert any("metrics.json" in event[2] for event in monitor.events if event[0] == "event")
