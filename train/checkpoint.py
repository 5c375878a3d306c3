"""What a checkpoint holds, how it is written, and which one a run goes on from.

A checkpoint is a folder: `state.pt` (model, optimiser, loss scale, random states) and `position.json` by rank 0, and
`progress-RANK.npz` by every rank: the cases it trained on in the epoch under way. Ray Train stores the folder and then
tells the controller, which only then names it in RUN_DIR/latest.json, in one step. Data and model both go on from
what latest.json names, so they cannot disagree, and a crash at any instant leaves the last whole checkpoint named.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ingest.errors import ConfigError
from ingest.progress import EpochPart, join
from ingest.stores import ObjectMeta, Store, open_store

from .plain_json import of_json, to_json

logger = logging.getLogger(__name__)

LATEST_FILE = "latest.json"
STATE_FILE = "state.pt"
POSITION_FILE = "position.json"
PROGRESS_PREFIX = "progress-"
FOLDER_PREFIX = "checkpoint_"  # of the folders that Ray Train makes


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimiser steps taken so far, on each rank.
        before: what was trained on already in the epoch to train next.
        checkpoint: the name of the checkpoint in the run's folder; None at the very start.
        instead_of: what is wrong with the checkpoint that is named; None where the run goes on from the named one.
    """

    step: int
    before: EpochPart
    checkpoint: str | None = None
    instead_of: str | None = None

    @property
    def epoch(self) -> int:
        """The epoch to train next, or to go on with."""
        return self.before.epoch

    def skip_finished(self, train_cases: int, multiple: int) -> Position:
        """The same, or the start of the next epoch where what is left of this one makes no step.

        Args:
            train_cases: cases of an epoch, quarantined ones not counted.
            multiple: cases of one step over all ranks.
        """
        if len(self.before.indices) and train_cases - len(self.before.indices) < multiple:
            following = EpochPart(self.epoch + 1, np.zeros(0, dtype=np.int64))
            return dataclasses.replace(self, before=following)
        return self


START = Position(0, EpochPart(0, np.zeros(0, dtype=np.int64)))


def write(
    folder: Path,
    *,
    rank: int,
    ranks: int,
    part: EpochPart,
    step: int,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe_json: str,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Write this rank's share of a checkpoint."""
    (folder / f"{PROGRESS_PREFIX}{rank:05d}.npz").write_bytes(part.to_bytes())
    if rank != 0:
        return
    state = {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else {},
        "torch_random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "recipe": recipe_json,
    }
    with (folder / STATE_FILE).open("wb") as file:  # torch's own writer does not say that a disk is full
        torch.save(state, file)
    (folder / POSITION_FILE).write_text(json.dumps({"epoch": part.epoch, "step": step, "ranks": ranks}))


def name_latest(run_dir: str, checkpoint: str, rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Make `checkpoint` the one to go on from, and keep rows that metrics.json does not hold yet, in one write.

    Args:
        run_dir: the run's folder or gs:// place.
        checkpoint: the name of its folder there.
        rows: of epochs that are done; see `metrics.read_metrics`.
    """
    named = {"checkpoint": checkpoint} | ({"rows": list(rows)} if rows else {})
    open_store(run_dir).put(LATEST_FILE, to_json(named).encode())


def read_position(run_dir: str) -> Position:
    """Where the run stands, by its last named checkpoint; its start where there is none.

    If the named checkpoint is not whole, or none is named, this is the newest whole checkpoint in the folder, and
    `Position.instead_of` says so.

    Raises:
        ConfigError: the named checkpoint is not whole, and no other one is.
    """
    store = open_store(run_dir)
    name = _latest(store)
    found = None if name is None else _position_of(store, name)
    if isinstance(found, Position):
        return found
    other = _newest_whole(store, name)
    if other is not None:
        reason = found or f"expected {store.uri_of(LATEST_FILE)}, found none"
        logger.warning("%s; going on from %s, the newest whole checkpoint there", reason, other.checkpoint)
        return dataclasses.replace(other, instead_of=reason)
    if found is None:
        return START
    raise ConfigError(
        f"{found}, and no other whole checkpoint beside it; put back a copy of its files, or begin a new run in "
        "another --run-dir"
    )


def _position_of(store: Store, name: str) -> Position | str:
    """The position that a checkpoint holds; in words what is wrong with one that is not whole."""
    place = store.uri_of(name)
    files = {entry.name.rpartition("/")[2]: entry for entry in store.list(f"{name}/")}
    parts = [meta for file, meta in sorted(files.items()) if file.startswith(PROGRESS_PREFIX)]
    if POSITION_FILE not in files or STATE_FILE not in files or not parts:
        return (
            f"expected {STATE_FILE}, {POSITION_FILE} and {PROGRESS_PREFIX}*.npz in {place}, found "
            f"{sorted(files) or 'nothing'}"
        )
    try:
        position: dict[str, int] = json.loads(store.fetch([files[POSITION_FILE]])[0])
        step, ranks = int(position["step"]), int(position.get("ranks", len(parts)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"expected a step and a number of ranks in {place}/{POSITION_FILE}, found something else ({error})"
    if len(parts) != ranks:
        return f"expected the {PROGRESS_PREFIX}*.npz of {ranks} ranks in {place}, found {len(parts)}"
    try:
        before = join(EpochPart.from_bytes(data) for data in store.fetch(parts))
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        return f"expected what the ranks trained on in {place}/{PROGRESS_PREFIX}*.npz, found damage ({error})"
    return Position(step, before, name)


def _newest_whole(store: Store, named: str | None) -> Position | None:
    """The position of the checkpoint that took the most steps, of those that are whole; None where none is."""
    names = {entry.name.partition("/")[0] for entry in store.list(FOLDER_PREFIX) if "/" in entry.name}
    found = [_position_of(store, name) for name in sorted(names - {named})]
    whole = [position for position in found if isinstance(position, Position) and position.checkpoint is not None]
    for position in sorted(whole, key=lambda each: each.step, reverse=True):
        data = store.fetch([_entry(store, f"{position.checkpoint}/{STATE_FILE}")])[0]
        # torch writes a ZIP archive, whose directory stands at its end: one that was cut off in writing has none.
        if zipfile.is_zipfile(io.BytesIO(data)):
            return position
    return None


def load_state(run_dir: str, checkpoint: str) -> dict[str, Any]:
    """The `state.pt` of a checkpoint, in the host's memory; nothing but tensors and plain values is loaded.

    Loading a state into an optimiser copies its tensors to the weights' device, but for the counts of steps, which
    AdamW wants on the host: on a GPU each of them would be waited for twice a step.
    """
    store = open_store(run_dir)
    data = store.fetch([_entry(store, f"{checkpoint}/{STATE_FILE}")])[0]
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def unwritten_rows(run_dir: str) -> list[dict[str, Any]]:
    """Rows of epochs that were named with their checkpoint; metrics.json may lack them.

    Raises:
        ConfigError: RUN_DIR/latest.json is damaged.
    """
    rows: list[dict[str, Any]] = _named(open_store(run_dir)).get("rows", [])
    return rows


def _latest(store: Store) -> str | None:
    name: str | None = _named(store).get("checkpoint")
    return name


def _named(store: Store) -> dict[str, Any]:
    """What latest.json holds; nothing where there is none."""
    for entry in store.list(LATEST_FILE):
        if entry.name != LATEST_FILE:
            continue
        try:
            named: dict[str, Any] = of_json(store.fetch([entry])[0])
            if not isinstance(named["checkpoint"], str) or not isinstance(named.get("rows", []), list):
                raise TypeError("no name")
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{store.uri_of(LATEST_FILE)}: expected the name of a checkpoint, found something else ({error}); "
                'have it name one of the whole checkpoints beside it: {"checkpoint": "NAME"}'
            ) from error
        return named
    return {}


def _entry(store: Store, name: str) -> ObjectMeta:
    for entry in store.list(name):
        if entry.name == name:
            return entry
    raise ConfigError(f"expected {store.uri_of(name)}, found none; choose a whole checkpoint")
