"""A run's folder: where it is, and whether a run may go on in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from ingest.errors import ConfigError, PlaceNotFoundError, StoreError
from ingest.home import expanded
from ingest.quarantine import QUARANTINE_FILE
from ingest.stores import Store, open_store
from ingest.stores.local import LocalStore

from .checkpoint import read_position
from .config import Recipe, from_json
from .derive import derive
from .holdout import HELD_OUT_FILE
from .passwords import recipe_without_password
from .resume_rules import Change, changes_of
from .run_storage import check_ray_can_have

RECIPE_FILE = "recipe.json"


def _has_recipe(store: Store) -> bool:
    with contextlib.suppress(PlaceNotFoundError):
        return any(entry.name == RECIPE_FILE for entry in store.list(RECIPE_FILE))
    return False


def saved_recipe(run_dir: str) -> Recipe | None:
    """The recipe that a run's folder holds; None where there is no run.

    Raises:
        ConfigError: it is no recipe.
    """
    store = open_store(run_dir)
    with contextlib.suppress(PlaceNotFoundError):
        for entry in store.list(RECIPE_FILE):
            if entry.name == RECIPE_FILE:
                return from_json(store.fetch([entry])[0].decode())
    return None


def checks_of_run_dir(recipe: Recipe, run_dir: str) -> list[Change] | None:
    """Check that a run may begin in its folder, or go on there.

    Returns:
        The settings in which a resumed run differs from the recipe that its folder holds; None for a new run.

    Raises:
        ConfigError: the folder holds a run that is not asked for, or none where one is, or one with a setting that
            may not change (see `resume_rules`).
    """
    saved = saved_recipe(run_dir)
    if saved is not None:  # earlier versions kept a password
        saved = recipe_without_password(saved)
    if recipe.trainer.resume is None:
        # A run that ended before its first checkpoint has nothing to go on from: its folder is free.
        if saved is not None and read_position(run_dir).checkpoint is not None:
            raise ConfigError(
                f"expected no run in {run_dir}, found one; go on with it by --trainer.resume {run_dir}, or choose "
                "another --run-dir"
            )
        return None
    if saved is None:
        raise _no_run(run_dir)
    return changes_of(derive(saved), derive(recipe), run_dir)


def _no_run(run_dir: str) -> ConfigError:
    return ConfigError(f"expected a run in {run_dir}, found no {RECIPE_FILE}; check --trainer.resume")


def drop_cases_of_before(run_dir: str) -> list[str]:
    """Remove the lists of cases that a run without a checkpoint left in a folder, before another run begins there.

    They name cases by their numbers in that run's manifest. The new run would take them for its own, and leave out, or
    call held out, other cases of its data.

    Returns:
        What was removed, in words.

    Raises:
        StoreError: the folder cannot be read or written.
    """
    store = open_store(run_dir)
    removed = []
    for name in (QUARANTINE_FILE, HELD_OUT_FILE):
        with contextlib.suppress(PlaceNotFoundError):
            for entry in store.list(name):
                if entry.name == name:
                    store.delete(name, entry.generation)
                    removed.append(f"removed {store.uri_of(name)}, of an earlier run that got to no checkpoint")
    return removed


@contextlib.contextmanager
def run_folder(recipe: Recipe, name: str) -> Iterator[str]:
    """A run's folder, as `resolve_run_dir` says. A local default one is made here, with a suffix if its name is taken.

    Folders that are missing at the start and empty at the end are removed: a run that is refused leaves none behind.

    Raises:
        ConfigError: the folder cannot be used, or holds no run where one is to be resumed.
        StoreError: a default folder cannot be made, or the place cannot be read.
    """
    run_dir = resolve_run_dir(recipe, name)
    store = open_store(run_dir)
    if recipe.trainer.resume is not None and not _has_recipe(store):
        raise _no_run(run_dir)
    if not isinstance(store, LocalStore):
        yield run_dir
        return
    wanted = Path(store.root)
    made = [folder for folder in wanted.parents if not folder.exists()]
    if recipe.trainer.resume is None and recipe.run_dir is None:
        folder = make_folder(wanted)
        run_dir = str(folder)
        made.insert(0, folder)
    elif not wanted.exists():
        made.insert(0, wanted)
    try:
        yield run_dir
    finally:
        with contextlib.suppress(OSError):  # it is not empty, or another process has removed it
            for folder in made:
                folder.rmdir()


def make_folder(wanted: Path) -> Path:
    """Make a folder of that name or, where it is taken, with the first of the suffixes -2, -3, … that is free.

    Raises:
        StoreError: it cannot be made.
    """
    folder, number = wanted, 1
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
    except OSError as error:
        raise StoreError(
            f"expected to make the run folder {folder}, found {error}; give another place by --run-dir"
        ) from error


def resolve_run_dir(recipe: Recipe, name: str) -> str:
    """An absolute folder or a gs:// place, without a trailing slash; a new one where none was given."""
    given = recipe.trainer.resume or recipe.run_dir or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}"
    run_dir = given.rstrip("/") if "://" in given else str(Path(expanded(given)).resolve())
    check_ray_can_have(run_dir)
    if not run_dir.rpartition("/")[2].isascii():
        raise ConfigError(
            f"expected a --run-dir whose last part is plain ASCII, since Ray makes names of it, found {run_dir!r}; "
            "choose another"
        )
    return run_dir
