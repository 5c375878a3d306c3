"""Reads every file that a resumed run or its page goes by, before Ray starts, and names all that are damaged."""

from __future__ import annotations

import zipfile
from collections.abc import Callable

import pyarrow as pa

from ingest.errors import ConfigError, IngestError, PlaceNotFoundError, StoreError
from ingest.manifest import Manifest
from ingest.quarantine import QUARANTINE_FILE, load_entries
from ingest.stores import open_store

from .best import BEST_FILE, BEST_FOLDER, read_best
from .checkpoint import CHECKPOINT_MANIFEST, LATEST_FILE, POSITION_FILE, STATE_FILE, read_position
from .config import from_json
from .holdout import HELD_OUT_FILE
from .metrics import METRICS_FILE, written_rows
from .records import EVENTS_FILE, STEPS, read_events, read_steps
from .slices import SLICES_FILE, load_slices

RECIPE_FILE = "recipe.json"
MANIFEST_FILE = "manifest.parquet"

DAMAGE = (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile, pa.ArrowException)
"""What Python's and NumPy's and Arrow's readers raise of bytes that are not theirs."""

_COPY = "put back a copy of it; without one begin a new run"
_ASIDE = "put back a copy of it, or move it out of the folder"

ADVICE = {
    RECIPE_FILE: "put back a copy of it: each checkpoint's state.pt, loaded by torch.load, holds its text as 'recipe'",
    MANIFEST_FILE: f"{_COPY}: a new listing may number the cases otherwise",
    HELD_OUT_FILE: f"{_COPY}: with other cases held out the scores could not be compared",
    QUARANTINE_FILE: f"{_ASIDE}: its cases are then tried again",
    METRICS_FILE: f"{_ASIDE}: the weights are not in it, and the run then goes on without the rows of earlier epochs",
    EVENTS_FILE: f"{_ASIDE}: only the page goes by it",
    BEST_FILE: f"{_ASIDE}: evaluate and predict then take the last checkpoint until an epoch scores higher than all",
    LATEST_FILE: "or put back a copy of it",
    SLICES_FILE: f"{_ASIDE}: the page goes without",
    STEPS: f"{_ASIDE}: the page goes without these steps",
}
"""By file, or folder: what to do where it is damaged."""

NEEDED = (RECIPE_FILE, MANIFEST_FILE, HELD_OUT_FILE, QUARANTINE_FILE, METRICS_FILE, EVENTS_FILE, BEST_FILE, LATEST_FILE)
"""A run is not resumed while one of these is damaged; without the others it only lacks a part of its page."""


def check_run_folder(run_dir: str) -> list[str]:
    """Check the files of a run that is to be resumed.

    Args:
        run_dir: the run's folder, or gs:// place.

    Returns:
        What is damaged that only the run's page goes by, in words.

    Raises:
        ConfigError: all that is damaged of what the run goes by, and the whole checkpoints that there are.
        StoreError: the folder cannot be read.
    """
    store = open_store(run_dir)
    try:
        there = {entry.name for entry in store.list()}
    except PlaceNotFoundError:
        return []  # that there is a run is checked elsewhere
    root = run_dir.rstrip("/")
    readers: dict[str, Callable[[], object]] = {
        RECIPE_FILE: lambda: from_json(_body(run_dir, RECIPE_FILE)),
        MANIFEST_FILE: lambda: Manifest.load(f"{root}/{MANIFEST_FILE}"),
        HELD_OUT_FILE: lambda: Manifest.load(f"{root}/{HELD_OUT_FILE}"),
        QUARANTINE_FILE: lambda: load_entries(run_dir),
        METRICS_FILE: lambda: written_rows(run_dir),
        EVENTS_FILE: lambda: read_events(run_dir),
        BEST_FILE: lambda: read_best(run_dir),
        LATEST_FILE: lambda: read_position(run_dir),
        SLICES_FILE: lambda: load_slices(run_dir),
        STEPS: lambda: read_steps(run_dir),
    }
    found: dict[str, str] = {}
    for name, read in readers.items():
        if name in there or name in (STEPS, LATEST_FILE):  # checkpoints that nothing names are checked too
            try:
                read()
            except StoreError:
                raise  # a place that does not answer is no damaged file
            except (*DAMAGE, IngestError) as error:
                found[name] = describe(store.uri_of(name), error)
    worse = [f"{found[name]}; {ADVICE[name]}" for name in NEEDED if name in found]
    if worse:
        whole = whole_checkpoints(there)
        left = f"whole checkpoints there: {', '.join(whole)}" if whole else "there is no whole checkpoint there"
        raise ConfigError(
            f"expected whole files of a run in {run_dir}, found {len(worse)} that cannot be read ({left}):\n"
            + "\n".join(f"- {words}" for words in worse)
        )
    return [f"{words}; {ADVICE[name]}" for name, words in found.items()]


def describe(place: str, error: BaseException) -> str:
    """A damaged file and how it was found, in one line."""
    if isinstance(error, IngestError):
        words = str(error)
        return words if place.rpartition("/")[2] in words else f"{place}: {words}"
    words = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{place}: expected a file that a run wrote, found something else ({type(error).__name__}: {words})"


def whole_checkpoints(names: set[str]) -> list[str]:
    """The folders that hold a finished checkpoint, newest last; best has no position, and is not among them.

    Args:
        names: of all objects in the run's folder.
    """
    folders = {name.partition("/")[0] for name in names if name.count("/") == 1} - {BEST_FOLDER}
    return sorted(
        folder
        for folder in folders
        if {f"{folder}/{STATE_FILE}", f"{folder}/{POSITION_FILE}", f"{folder}/{CHECKPOINT_MANIFEST}"} <= names
    )


def _body(run_dir: str, name: str) -> bytes:
    store = open_store(run_dir)
    return store.fetch([next(entry for entry in store.list(name) if entry.name == name)])[0]
