"""What a run leaves behind when it ends, however it ends: pictures, slices, and its page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import ray.train
from rich.console import Console

from ingest.errors import IngestError
from ingest.stores import open_store
from ingest.unwrap import own_error

from .checkpoint import STATE_FILE
from .loop import LoopJob
from .metrics import Row
from .monitor import Monitor
from .page import write_page
from .pictures import predict_some
from .report import plot_case, plot_curves
from .slices import save_slices


@contextlib.contextmanager
def ending(run_dir: str, monitor: Monitor, console: Console) -> Iterator[None]:
    """Note why a run failed, and leave its page even so; the error goes on. A second signal ends at once, without."""
    try:
        yield
    except Exception as error:
        ours = own_error(error)
        words = str(ours or error).strip().splitlines() or [type(error).__name__]
        monitor.ask("close", "fault", words[0][:500])
        page = try_page(run_dir, console)
        if page is not None:
            console.print(f"page:       {page}")
        raise


def leave_behind(
    job: LoopJob, rows: list[Row], result: ray.train.Result, console: Console, *, ended: bool
) -> tuple[list[str], str | None]:
    """Pictures of a local run that came to its end, and the page of any.

    Returns:
        The pictures' files, and the page's place, None where it could not be written.
    """
    run_dir = job.run_dir
    if job.monitor is not None:
        job.monitor.ask("close", "end" if ended else "stop", "the run is done" if ended else "stopped and saved")
    pictures: list[str] = []
    try:
        if ended:
            _draw(job, rows, result, pictures)
    except (IngestError, OSError) as error:  # the run is done, whatever becomes of its pictures
        console.print(f"not all pictures were made: {error}", markup=False)
    return pictures, try_page(run_dir, console)


def _draw(job: LoopJob, rows: list[Row], result: ray.train.Result, pictures: list[str]) -> None:
    """Make the pictures and slices of a run that came to its end, and add the files of the pictures."""
    run_dir = job.run_dir
    local = "://" not in run_dir
    if local:
        curves = Path(run_dir) / "curves.png"
        plot_curves(rows, curves)
        pictures.append(str(curves))
    if result.checkpoint is not None and len(job.holdout.rows):
        with result.checkpoint.as_directory() as folder:
            cases = predict_some(job, Path(folder) / STATE_FILE)
        if cases:
            save_slices(open_store(run_dir), cases)
        if cases and local:
            first, picture = cases[0], Path(run_dir) / "prediction.png"
            title = f"held-out case {first.case_id}"
            plot_case(first.image, first.truth, first.prediction, picture, title=title)
            pictures.append(str(picture))


def try_page(run_dir: str, console: Console) -> str | None:
    """Write the run's page; a page that cannot be written is said, and ends nothing."""
    try:
        return write_page(run_dir)
    except Exception as error:  # noqa: BLE001  a run is not lost for its page
        console.print(f"no page was written: {error}; try `voxflux report {run_dir}`", markup=False)
        return None
