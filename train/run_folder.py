"""A run's folder: where it is, and whether a run may go on in it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from ingest.errors import ConfigError, PlaceNotFoundError
from ingest.stores import open_store

from .checkpoint import read_position
from .config import Recipe, from_json
from .run_storage import check_ray_can_have

RECIPE_FILE = "recipe.json"


def checks_of_run_dir(recipe: Recipe, run_dir: str) -> bool:
    """Whether the run goes on from an earlier one; that it may is checked first.

    Raises:
        ConfigError: the folder holds a run that is not asked for, or none where one is, or one of another recipe.
    """
    store = open_store(run_dir)
    try:
        saved = next((entry for entry in store.list(RECIPE_FILE) if entry.name == RECIPE_FILE), None)
    except PlaceNotFoundError:
        saved = None
    if recipe.trainer.resume is None:
        # A run that ended before its first checkpoint has nothing to go on from: its folder is free.
        if saved is not None and read_position(run_dir).checkpoint is not None:
            raise ConfigError(
                f"expected no run in {run_dir}, found one; go on with it by --trainer.resume {run_dir}, or choose "
                "another --run-dir"
            )
        return False
    if saved is None:
        raise ConfigError(f"expected a run in {run_dir}, found no {RECIPE_FILE}; check --trainer.resume")
    before = from_json(store.fetch([saved])[0].decode())
    for part in ("model", "optimizer"):
        if getattr(before, part) != getattr(recipe, part):
            raise ConfigError(
                f"expected the {part} of the run in {run_dir}, {getattr(before, part)}, found {getattr(recipe, part)}; "
                "resume with the recipe and overrides that it was started with"
            )
    held_out = ("holdout_fraction", "holdout_cases", "eval_images", "eval_labels")
    for field in ("seed", *held_out, "crop", "augment", "decode"):
        if getattr(before.data, field) != getattr(recipe.data, field):
            raise ConfigError(
                f"expected data.{field} of the run in {run_dir}, {getattr(before.data, field)}, found "
                f"{getattr(recipe.data, field)}; resume with the recipe and overrides that it was started with"
            )
    return True


def resolve_run_dir(recipe: Recipe, name: str) -> str:
    """An absolute folder or a gs:// place, without a trailing slash; a new one where none was given."""
    given = recipe.trainer.resume or recipe.run_dir or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}"
    run_dir = given.rstrip("/") if "://" in given else str(Path(given).expanduser().resolve())
    check_ray_can_have(run_dir)
    if not run_dir.rpartition("/")[2].isascii():
        raise ConfigError(
            f"expected a --run-dir whose last part is plain ASCII, since Ray makes names of it, found {run_dir!r}; "
            "choose another"
        )
    return run_dir
