"""The run's controller names each checkpoint before anything else can fail, and no row is lost."""

import errno
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ingest.errors import StoreError
from train import metrics
from train.metrics import MetricsWriter, read_metrics


class Told:
    """A monitor that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def tell(self, method: str, *arguments: object) -> None:
        self.events.append((method, *arguments))

    def warn(self, text: str) -> None:
        self.tell("event", "warning", text)

    def ask(self, *_: object) -> None:
        return None


def report(epoch: int, dice: float) -> dict:
    row = {"epoch": epoch, "step": epoch + 1, "mean_dice": dice, "train_loss": 1.0, "samples": 4, "samples_per_s": 1.0}
    row |= {"first_batch_s": 0.1, "stall_share": 0.0, "au": None, "wall_s": 1.0, "stall_s": 0.0}
    causes = dict.fromkeys(metrics.CAUSES, 0.0)
    row |= {"stall_by_cause_s": causes}
    return {"row": row, "step": epoch + 1, "ranks": 1, "files": {"state.pt": (3, 7)}, "checkpoint": None}


def weights(name: str) -> bytes:
    file = io.BytesIO()
    torch.save({"weights of": name}, file)
    return file.getvalue()


def saved(run_dir: Path, name: str) -> SimpleNamespace:
    (run_dir / name).mkdir()
    (run_dir / name / "state.pt").write_bytes(weights(name))
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
    assert sum(event[:2] == ("event", "warning") and "best" in event[2] for event in monitor.events) == 3
    (tmp_path / "best").unlink()
    writer.after_report(None, [report(3, 0.9)], saved(tmp_path, "checkpoint_d"))
    assert (tmp_path / "best" / "state.pt").read_bytes() == weights("checkpoint_d")


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


def test_a_row_that_only_latest_json_holds_outlives_a_start_that_cannot_read_it(tmp_path):
    """As where a bucket takes no metrics.json in one start, and answers no read in the next."""
    (tmp_path / "metrics.json").mkdir()  # writing there fails
    MetricsWriter(str(tmp_path), Told()).after_report(None, [report(0, 0.5)], saved(tmp_path, "checkpoint_a"))
    writer = MetricsWriter(str(tmp_path), Told())

    def no_answer(_: str) -> list:
        raise StoreError("no answer")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(metrics, "read_metrics", no_answer)
        writer.after_report(None, [report(1, 0.4)], saved(tmp_path, "checkpoint_b"))
    (tmp_path / "metrics.json").rmdir()
    assert named(tmp_path) == "checkpoint_b"
    assert [row["epoch"] for row in read_metrics(str(tmp_path))] == [0, 1]


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


def test_an_epoch_that_is_scored_is_named_first_and_said_to_be_scored_when_its_row_and_the_best_are_kept(tmp_path):
    writer = MetricsWriter(str(tmp_path), Told())
    trained = report(0, 0.5) | {"row": None}
    writer.after_report(None, [trained], saved(tmp_path, "checkpoint_a"))
    assert json.loads((tmp_path / "latest.json").read_text()) == {"checkpoint": "checkpoint_a"}
    assert json.loads((tmp_path / "checkpoint_a" / "manifest.json").read_text())["files"]["state.pt"]["crc32c"] == 7
    assert not (tmp_path / "metrics.json").exists()
    writer.after_report(None, [report(0, 0.5)], None)
    assert json.loads((tmp_path / "latest.json").read_text()) == {"checkpoint": "checkpoint_a", "scored": True}
    assert [row["mean_dice"] for row in read_metrics(str(tmp_path))] == [0.5]
    assert (tmp_path / "best" / "state.pt").read_bytes() == weights("checkpoint_a")


def test_damaged_weights_do_not_become_the_best(tmp_path):
    monitor = Told()
    writer = MetricsWriter(str(tmp_path), monitor)
    writer.after_report(None, [report(0, 0.5)], saved(tmp_path, "checkpoint_a"))
    better = saved(tmp_path, "checkpoint_b")
    file = tmp_path / "checkpoint_b" / "state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    writer.after_report(None, [report(1, 0.9)], better)
    assert (tmp_path / "best" / "state.pt").read_bytes() == weights("checkpoint_a")
    assert any("found damage" in event[-1] for event in monitor.events)


def test_the_scores_of_a_resumed_run_belong_to_the_checkpoint_that_its_ranks_went_on_from(tmp_path):
    saved(tmp_path, "checkpoint_b")
    writer = MetricsWriter(str(tmp_path), Told())  # latest.json may be gone, or name a checkpoint that is not whole
    writer.after_report(None, [report(3, 0.5) | {"checkpoint": "checkpoint_b"}], None)
    assert json.loads((tmp_path / "latest.json").read_text()) == {"checkpoint": "checkpoint_b", "scored": True}
    assert (tmp_path / "best" / "state.pt").read_bytes() == weights("checkpoint_b")


def test_a_checkpoint_that_a_rank_did_not_report_is_neither_finished_nor_named(tmp_path):
    monitor = Told()
    writer = MetricsWriter(str(tmp_path), monitor)
    writer.after_report(None, [report(0, 0.5)], saved(tmp_path, "checkpoint_a"))
    writer.after_report(None, [report(1, 0.6) | {"ranks": 2}], saved(tmp_path, "checkpoint_b"))
    assert named(tmp_path) == "checkpoint_a"
    assert not (tmp_path / "checkpoint_b" / "manifest.json").exists()
    assert any("expected 2 ranks' parts of checkpoint_b, found 1" in event[-1] for event in monitor.events)
