"""Shows a run as it goes: a line that moves in a terminal, and a line for each epoch everywhere."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ingest.errors import IngestError
from ingest.ray_compat import own_ray_ended

from .loop import LoopJob
from .metrics import Row, read_metrics
from .monitor import Mark, Monitor
from .monitor import Progress as RunProgress
from .plain_json import is_figure
from .restarts import in_words
from .stop import Stopped
from .tracking import MlflowRun

POLL_S = 1.0


def epoch_line(row: Row, epochs: int) -> str:
    """One epoch in one line, as the run goes."""
    dice = f", mean Dice {row['mean_dice']:.4f}" if is_figure(row["mean_dice"]) else ""
    loss = f"{row['train_loss']:.4f}" if is_figure(row["train_loss"]) else "not known"
    return (
        f"epoch {row['epoch'] + 1}/{epochs}: loss {loss}{dice}, "
        f"{row['samples_per_s']:.1f} samples/s, stall {row['stall_share']:.1%}{main_cause(row)}"
    )


def main_cause(row: Mapping[str, Any]) -> str:
    """What an epoch waited for most, in brackets; nothing where that is not known."""
    causes = {cause: seconds for cause, seconds in (row.get("stall_by_cause_s") or {}).items() if cause != "listing"}
    if not causes or sum(causes.values()) <= 0:
        return ""
    cause = max(causes, key=lambda name: causes[name])
    return f" ({cause} {causes[cause] / sum(causes.values()):.0%} of it)"


def progress_text(now: RunProgress, epochs: int) -> str:
    """Where a run stands, in one line; what is not known yet is left out."""
    if now.epoch is None:
        return "starting"
    parts = [
        f"epoch {now.epoch + 1}/{epochs}",
        f"step {now.steps_of_epoch}/{now.steps_per_epoch}",
        *(
            f"{name} {value:{form}}"
            for name, value, form in (
                ("loss", now.loss, ".4f"),
                ("Dice", now.mean_dice, ".4f"),
                ("samples/s", now.samples_per_s, ".1f"),
                ("AU", now.au, ".1%"),
            )
            if value is not None
        ),
        f"quarantined {now.quarantined}",
    ]
    return "  ".join(parts)


@contextlib.contextmanager
def following(
    job: LoopJob, console: Console, tracked: MlflowRun | None = None, stopped: Stopped | None = None
) -> Iterator[None]:
    """Print a line for each start, failure and epoch as it happens; in a terminal, show the progress below them.

    Args:
        job: the run.
        console: is printed to.
        tracked: takes the rows too; when this ends, it has been given all.
        stopped: once it has a signal, the stop flag is set again and again: one that died has forgotten it.
    """
    done = threading.Event()
    epochs = job.recipe.trainer.epochs
    columns = TextColumn("{task.description}", markup=False), BarColumn(24), TimeElapsedColumn()
    bar = Progress(*columns, console=console, transient=True)
    shown = 0
    told = EventLines(job.monitor, console)

    def follow(task: TaskID | None) -> None:
        nonlocal shown
        finished = False
        while not finished:
            finished = done.wait(POLL_S)
            told.show()
            if stopped is not None and stopped.signal_number is not None and not finished:
                job.stop_flag.set.remote()
            with contextlib.suppress(IngestError):  # a place that does not answer now is asked again
                rows = read_metrics(job.run_dir)
                for row in rows[shown:]:
                    console.print(epoch_line(row, epochs), markup=False, highlight=False)
                shown = len(rows)
                if tracked is not None:
                    tracked.rows(rows, now=finished)
            note_quarantine(job)
            now = job.monitor.ask("progress") if job.monitor is not None and task is not None else None
            if task is not None and isinstance(now, RunProgress):
                steps = now.steps_per_epoch or 1
                finished_steps = (now.epoch or 0) * steps + min(now.steps_of_epoch, steps)
                bar.update(task, description=progress_text(now, epochs), completed=finished_steps, total=epochs * steps)

    with bar if console.is_terminal else contextlib.nullcontext():
        task = bar.add_task("starting", total=None) if console.is_terminal else None
        thread = threading.Thread(target=follow, args=(task,), name="follow-metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            while thread.is_alive() and not own_ray_ended():  # a question to a Ray that ended has no answer
                thread.join(POLL_S)


class EventLines:
    """Prints the starts and failures of a run, each once, in a terminal and in a job's log."""

    def __init__(self, monitor: Monitor | None, console: Console) -> None:
        """Take the run's monitor and the console to print to."""
        self._monitor, self._console = monitor, console
        self._mark: Mark | None = None

    def show(self) -> None:
        """Print what is new; a monitor that does not answer now is asked again, and one that is dead is told of."""
        if self._monitor is None:
            return
        answer = self._monitor.ask("told_since", self._mark)
        if answer is None:
            if (error := self._monitor.death()) is not None:
                self._monitor = None
                self._console.print(
                    f"{in_words(error)}; the run goes on, but no start or failure is printed or kept from now on",
                    markup=False,
                    highlight=False,
                )
            return
        self._mark, events = answer
        for event in events:
            line = " ".join(event.text.split())
            self._console.print(line, markup=False, highlight=False, style="red" if event.kind == "fault" else None)


def note_quarantine(job: LoopJob) -> None:
    """Tell the monitor how many cases are in quarantine."""
    if job.quarantine is None or job.monitor is None or own_ray_ended():
        return
    with contextlib.suppress(IngestError):  # a book that is just being started anew is asked again
        job.monitor.tell("quarantined", len(job.quarantine.indices()))
