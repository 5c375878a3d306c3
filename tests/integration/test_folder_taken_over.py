"""A run whose folder another run takes over ends in an error, and leaves the folder to the other."""

import dataclasses
import io
import threading
import time
from pathlib import Path

import pytest
from ray.train import UserCallback
from rich.console import Console

from ingest.stores import open_store
from tests.integration.test_train import quiet, tiny
from train import launch
from train.lease import LEASE_FILE, Holder, LeaseLostError, read_lease
from train.metrics import read_metrics
from train.records import read_events

pytestmark = pytest.mark.usefixtures("ray_here")


class Other(threading.Thread):
    """Takes the folder over, as a run on another machine, once there is a first epoch."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self.run_dir = run_dir
        self.holder = dataclasses.replace(Holder.here(), host="elsewhere", machine="another boot")
        self.rows = 0

    def run(self) -> None:
        while not (self.run_dir / "metrics.json").exists():
            time.sleep(0.05)
        open_store(str(self.run_dir)).put(LEASE_FILE, self.holder.to_bytes())
        self.rows = len(read_metrics(str(self.run_dir)))


def lose(recipe, console: Console | None = None) -> Other:
    other = Other(Path(recipe.run_dir))
    other.start()
    with pytest.raises(LeaseLostError, match=r"taken over by pid \d+ on elsewhere"):
        launch.run(recipe, "tiny", console or quiet())
    assert read_lease(open_store(recipe.run_dir)).holder == other.holder
    return other


@pytest.mark.crash
def test_a_run_names_no_checkpoint_in_a_folder_that_was_taken_over(places, tmp_path):
    recipe = tiny(places.local, tmp_path / "run", num_workers=1, epochs=1000, evaluate_every=0)
    other = lose(recipe)
    # The row that was being written while the other run took over may have come after it.
    assert other.rows <= len(read_metrics(recipe.run_dir)) <= other.rows + 1


@pytest.mark.crash
def test_a_run_that_cannot_renew_its_lease_saves_and_ends(places, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "LeaseGuard", lambda *_: UserCallback())  # which would end the run before
    recipe = tiny(places.local, tmp_path / "run", num_workers=1, epochs=1000, evaluate_every=0)
    console = Console(file=io.StringIO(), width=1000)
    lose(recipe, console)
    assert len(read_metrics(recipe.run_dir)) < 1000
    assert "the lease of the run folder is lost: it was taken over by pid" in console.file.getvalue()
    # The events there are the other run's by now.
    assert not any("lease of the run folder is lost" in event.text for event in read_events(recipe.run_dir))
