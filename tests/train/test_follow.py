"""The lines that a run shows of itself."""

from __future__ import annotations

import io
import threading
import types

import pytest
from ray.exceptions import ActorDiedError
from rich.console import Console

from tests.train.test_monitor import Board
from train import follow, launch
from train.follow import EventLines, epoch_line, following, progress_text
from train.monitor import Progress, RunMonitor
from train.stop import Stopped

ROW = {"epoch": 1, "train_loss": 0.5, "mean_dice": 0.75, "samples_per_s": 20.0, "stall_share": 0.25}


def test_an_epochs_line_says_what_it_waited_for_most() -> None:
    causes = {"listing": 9.0, "fetching": 3.0, "transforming": 1.0}
    assert epoch_line({**ROW, "stall_by_cause_s": causes}, 8) == (
        "epoch 2/8: loss 0.5000, mean Dice 0.7500, 20.0 samples/s, stall 25.0% (fetching 75% of it)"
    )
    assert epoch_line({**ROW, "mean_dice": None}, 8) == "epoch 2/8: loss 0.5000, 20.0 samples/s, stall 25.0%"


def test_progress_shows_what_is_known_and_leaves_out_what_is_not() -> None:
    assert progress_text(Progress(), 8) == "starting"
    now = Progress(epoch=0, step=3, steps_per_epoch=30, steps_of_epoch=3, loss=0.61, samples_per_s=16.9, quarantined=2)
    assert progress_text(now, 8) == "epoch 1/8  step 3/30  loss 0.6100  samples/s 16.9  quarantined 2"


class Answering:
    """A run's monitor in this process, which can be dead, and started again."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self.monitor: RunMonitor | None = None
        self.died: ActorDiedError | None = None
        self.start()

    def start(self) -> None:
        self.monitor = RunMonitor(self.run_dir, gauges=Board())

    def ask(self, method: str, *arguments: object) -> object:
        return None if self.monitor is None else getattr(self.monitor, method)(*arguments)

    def death(self) -> ActorDiedError | None:
        return self.died

    def tell(self, method: str, *arguments: object) -> None:
        self.ask(method, *arguments)


class Printed(io.StringIO):
    """What a console prints; waits for words."""

    def __init__(self) -> None:
        super().__init__()
        self.more = threading.Condition()

    def write(self, text: str) -> int:
        with self.more:
            written = super().write(text)
            self.more.notify_all()
        return written

    def has(self, words: str) -> bool:
        with self.more:
            return self.more.wait_for(lambda: words in self.getvalue(), timeout=240)


@pytest.mark.parametrize("terminal", [False, True])
def test_starts_and_failures_are_printed_as_they_happen_in_a_terminal_and_in_a_log(tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(follow, "POLL_S", 0.01)
    before = RunMonitor(str(tmp_path), gauges=Board())
    before.begin("00001-a", 2, 0, 0, None)  # an earlier start of the run, which nobody need be told of now
    monitor = Answering(str(tmp_path))
    trainer = types.SimpleNamespace(epochs=3)
    job = types.SimpleNamespace(
        monitor=monitor, run_dir=str(tmp_path), quarantine=None, recipe=types.SimpleNamespace(trainer=trainer)
    )
    printed = Printed()
    with following(job, Console(file=printed, force_terminal=terminal, width=300, color_system=None)):
        monitor.tell("begin", "00002-b", 1, 1, 30, "checkpoint_1")
        assert printed.has("1 rank begins epoch 2 at step 30, from checkpoint_1")
        monitor.tell("event", "fault", "rank 0 failed: [x] no;\n restarting from step 40, 1 of 2")
        assert printed.has("rank 0 failed: [x] no; restarting from step 40, 1 of 2\n")
        monitor.tell("event", "setting", "not for the eye")
        monitor.monitor = None  # it dies
        monitor.start()
        monitor.tell("event", "fault", "rank 0 failed: yes")
        assert printed.has("rank 0 failed: yes")
        monitor.tell("event", "fault", "the last one")  # is printed though the run ends at once
    text = printed.getvalue()
    assert [text.count(words) for words in ("1 rank begins", "2 ranks begin", "[x] no", "yes", "the last one")] == [
        *(1, 0, 1, 1, 1)
    ]
    assert "not for the eye" not in text


class UnmadeError(ActorDiedError):
    """As of an actor that could not be made."""

    def __str__(self) -> str:
        return "The actor died because of an error raised in its creation task, ray::RunMonitor.__init__()\nOSError: no"


def test_a_monitor_that_is_not_started_again_is_told_of_once(tmp_path):
    monitor, printed = Answering(str(tmp_path)), Printed()
    lines = EventLines(monitor, Console(file=printed, width=300, color_system=None))
    monitor.monitor = None
    lines.show()
    assert printed.getvalue() == ""  # it may be busy, or on its way
    monitor.died = UnmadeError()
    lines.show()
    lines.show()
    assert printed.getvalue() == (
        "the process of RunMonitor died: OSError: no; the run goes on, but no start or failure is printed or kept from "
        "now on\n"
    )


class Flag:
    """A stop flag that has died and forgotten since it was set."""

    def __init__(self) -> None:
        self.again = threading.Event()
        self.set = types.SimpleNamespace(remote=self.again.set)


def test_a_stop_flag_is_set_anew_for_as_long_as_the_run_is_to_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "POLL_S", 0.01)
    flag, stopped = Flag(), Stopped()
    trainer = types.SimpleNamespace(epochs=3)
    recipe = types.SimpleNamespace(trainer=trainer)
    job = types.SimpleNamespace(monitor=None, run_dir=str(tmp_path), quarantine=None, recipe=recipe, stop_flag=flag)
    with following(job, Console(quiet=True), stopped=stopped):
        stopped.signal_number = 15
        assert flag.again.wait(60)
        flag.again.clear()
        assert flag.again.wait(60)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (None, "asked to stop: saving after this step; a second signal ends at once"),
        ("it was deleted", "the lease of the run folder is lost: it was deleted: saving after this step, then ending"),
    ],
)
def test_a_run_that_is_asked_to_stop_tells_its_ranks_and_who_follows_it(lost, said):
    printed, calls = io.StringIO(), []
    flag = types.SimpleNamespace(set=types.SimpleNamespace(remote=lambda: calls.append("set")))
    job = types.SimpleNamespace(stop_flag=flag, monitor=types.SimpleNamespace(tell=lambda *event: calls.append(event)))
    launch.ask_to_stop(job, Console(file=printed, width=200), lost)
    assert printed.getvalue().strip() == said
    assert calls == ["set", ("event", "stop", said.partition(": saving")[0])]


class Silent:
    """A quarantine of a Ray that ended: it never answers."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.test_is_over = threading.Event()

    def indices(self) -> list[int]:
        self.asked.set()
        self.test_is_over.wait(100)
        return []


def test_a_run_whose_ray_ended_does_not_wait_for_an_answer_that_is_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "POLL_S", 0.01)
    silent = Silent()
    recipe = types.SimpleNamespace(trainer=types.SimpleNamespace(epochs=3))
    monitor = Answering(str(tmp_path))
    job = types.SimpleNamespace(monitor=monitor, run_dir=str(tmp_path), quarantine=silent, recipe=recipe)
    with following(job, Console(quiet=True)):
        assert silent.asked.wait(60)
        monkeypatch.setattr(follow, "own_ray_ended", lambda: True)
    assert not silent.test_is_over.is_set()
    silent.test_is_over.set()
