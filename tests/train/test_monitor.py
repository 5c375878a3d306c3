"""What the monitor makes of what it is told, without a Ray around it."""

from __future__ import annotations

import collections

import pytest
from tensorboardX.proto.event_pb2 import Event as TensorBoardEvent

from ingest.stores import open_store
from ingest.tally import Work
from train.gauges import METRICS
from train.lease import take
from train.monitor import Pulse, RunMonitor
from train.records import StepRecord, read_events, read_steps
from train.waits import Blocked


class Board:
    """Stands for Ray's metrics: keeps sums and last values, and knows only the names there are."""

    def __init__(self) -> None:
        self.sums: collections.Counter[tuple[str, str]] = collections.Counter()
        self.values: dict[tuple[str, str], float] = {}

    def count(self, name: str, value: float, label: str = "") -> None:
        assert METRICS[name].kind == "counter"
        assert bool(METRICS[name].label) == bool(label)
        self.sums[name, label] += value

    def set(self, name: str, value: float | None, label: str = "") -> None:
        assert METRICS[name].kind == "gauge"
        assert bool(METRICS[name].label) == bool(label)
        if value is not None:
            self.values[name, label] = value


def steps(first: int, last: int, epoch: int = 0) -> list[StepRecord]:
    return [
        StepRecord(
            epoch=epoch,
            step=step,
            ended_unix_s=1000.0 + step,
            wait_s=0.25,
            compute_s=0.5,
            loss=1 / step,
            learning_rate=0.1,
            samples=4,
        )
        for step in range(first, last + 1)
    ]


def pulse(records: list[StepRecord], *, rank: int = 0, epoch: int = 0, waited_s: float = 1.0) -> Pulse:
    return Pulse(
        rank=rank,
        ranks=2,
        epoch=epoch,
        step=records[-1].step,
        steps_of_epoch=3,
        steps_per_epoch=6,
        started_unix_s=1000.0,
        first_batch_s=0.5,
        waited_s=waited_s,
        blocked=Blocked(production_s=waited_s),
        records=records if rank == 0 else [],
        samples=4 * len(records),
        samples_per_s=10.0,
        au=0.5,
    )


def work(epoch: int = 0, **changes) -> Work:
    return Work(epoch=epoch, started_unix_s=1000.1, **{"fetch_s": 3.0, "transform_s": 1.0, "samples": 8} | changes)


def test_the_waits_of_all_ranks_are_counted_by_cause_also_those_told_before_the_workers_told(tmp_path) -> None:
    board = Board()
    monitor = RunMonitor(str(tmp_path), gauges=board)
    monitor.begin("a", 2, 0, 0, None)
    monitor.pulse(pulse(steps(1, 3)))
    monitor.pulse(pulse(steps(1, 3), rank=1))
    assert not any(name == "voxflux_stall_seconds" for name, _ in board.sums)
    monitor.work(work())
    monitor.pulse(pulse(steps(4, 6)))
    monitor.pulse(pulse(steps(4, 6), rank=1))
    stall = {label: seconds for (name, label), seconds in board.sums.items() if name == "voxflux_stall_seconds"}
    assert sum(stall.values()) == pytest.approx(2.0)  # 1 s twice on each of two ranks, mean over them
    assert stall["starting"] == pytest.approx(0.1)
    assert stall["fetching"] == pytest.approx(3 * stall["transforming"])
    assert board.sums["voxflux_trained_samples", ""] == 48
    assert board.values["voxflux_samples_per_second", ""] == 20.0
    assert monitor.progress().steps_of_epoch == 3


def test_work_is_counted_with_its_retries_by_status(tmp_path) -> None:
    board = Board()
    monitor = RunMonitor(str(tmp_path), gauges=board)
    monitor.work(work(bytes_read=7, composites=2, retries={"status-503": 3}))
    monitor.work(work(bytes_read=7, retries={"status-503": 1, "reset": 1}))
    assert board.sums["voxflux_bytes", ""] == 14
    assert board.sums["voxflux_composites", ""] == 2
    assert board.sums["voxflux_retries", "status-503"] == 4
    assert monitor.retries_of(0) == {"status-503": 4, "reset": 1}
    assert [event.kind for event in monitor._events] == ["retry"]  # one event for what came together


def test_what_was_read_beyond_the_epoch_that_a_new_start_begins_with_is_forgotten(tmp_path) -> None:
    monitor = RunMonitor(str(tmp_path), gauges=Board())
    for epoch in range(4):
        monitor.work(work(epoch, retries={"reset": 1}))
    monitor.begin("b", 2, 1, 10, "checkpoint")
    assert [monitor.work_of(epoch).fetch_s for epoch in range(4)] == [3.0, 3.0, 0.0, 0.0]
    assert [monitor.retries_of(epoch) for epoch in range(4)] == [{"reset": 1}, {"reset": 1}, {}, {}]


def test_steps_and_events_are_kept_by_start_and_go_on_in_another_process(tmp_path) -> None:
    first = RunMonitor(str(tmp_path), gauges=Board())
    first.begin("00001-a", 2, 0, 0, None)
    first.pulse(pulse(steps(1, 3)))
    first.pulse(pulse(steps(4, 5)))
    first.begin("00002-b", 1, 0, 3, "checkpoint_1")  # the ranks were killed
    first.pulse(pulse(steps(4, 6)))
    first.epoch_done({"epoch": 0, "step": 6, "mean_dice": None})
    first.pulse(pulse(steps(7, 8, epoch=1), epoch=1))
    first.close("stop", "stopped and saved")
    second = RunMonitor(str(tmp_path), gauges=Board())
    second.begin("00003-c", 1, 1, 8, "checkpoint_2")
    kept = read_steps(str(tmp_path))
    assert {start: [record.step for record in records] for start, records in kept.items()} == {
        "00001-a": [1, 2, 3, 4, 5],
        "00002-b": [4, 5, 6, 7, 8],
    }
    assert kept["00001-a"][0].loss == 1.0
    assert [event.kind for event in read_events(str(tmp_path))] == ["start", "start", "stop", "start"]


def test_steps_that_cannot_be_written_are_told_of_and_written_with_the_next(tmp_path, caplog) -> None:
    monitor = RunMonitor(str(tmp_path), gauges=Board())
    (tmp_path / "steps").write_text("in the way of the folder")
    monitor.begin("00001-a", 1, 0, 0, None)
    monitor.pulse(pulse(steps(1, 3)))
    monitor.epoch_done({"epoch": 0})
    assert "could not write the run's records of steps, kept to be written with the next" in caplog.text
    monitor.epoch_done({"epoch": 0})
    _, told = monitor.told_since(None)  # by those who follow the run, once, since nobody sees an actor's log
    assert [event.kind for event in told] == ["start", "warning"]
    assert "could not write the run's records of steps" in told[1].text
    (tmp_path / "steps").unlink()
    monitor.pulse(pulse(steps(4, 6, epoch=1), epoch=1))
    monitor.close("end", "done")
    kept = read_steps(str(tmp_path))
    assert [record.step for record in kept["00001-a"]] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_logs_hold_every_step_and_epoch(tmp_path) -> None:
    monitor = RunMonitor(str(tmp_path), tensorboard=True, gauges=Board())
    monitor.pulse(pulse(steps(1, 3)))
    monitor.epoch_done({"epoch": 0, "step": 3, "train_loss": 0.5, "dice_by_class": [0.25, 0.75], "mean_dice": 0.5})
    monitor.pulse(pulse(steps(4, 4, epoch=1), epoch=1))
    monitor.close("end", "done")
    (file,) = (tmp_path / "tensorboard").iterdir()
    found: dict[str, list[tuple[int, float]]] = {}
    body = file.read_bytes()
    while body:  # TFRecord: length, its checksum, the record, its checksum
        length = int.from_bytes(body[:8], "little")
        event = TensorBoardEvent.FromString(body[12 : 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
        body = body[12 + length + 4 :]
    assert [step for step, _ in found["step/loss"]] == [1, 2, 3, 4]
    assert found["epoch/train_loss"] == [(3, 0.5)]
    assert found["dice/class_2"] == [(3, 0.75)]
    assert "epoch/au" not in found


def test_a_run_that_wakes_up_in_a_folder_of_another_run_does_not_replace_its_events(tmp_path) -> None:
    store = open_store(str(tmp_path))
    slept = take(store, say=print)
    first = RunMonitor(str(tmp_path), gauges=Board(), holder=slept.holder.holder)
    first.begin("00001-a", 2, 0, 0, None)
    other = take(store, say=print, alive=lambda _: False)
    second = RunMonitor(str(tmp_path), gauges=Board(), holder=other.holder.holder)
    second.begin("00002-b", 1, 0, 3, "checkpoint_1")
    kept = read_events(str(tmp_path))
    assert len(kept) == 2
    first.event("fault", "the controller of the run failed: its lease is lost")
    first.close("fault", "the lease is lost")
    assert read_events(str(tmp_path)) == kept
    assert any("it was taken over by pid" in event.text for event in first.told_since(None)[1])
