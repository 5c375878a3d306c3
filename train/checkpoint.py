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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ingest.errors import ConfigError
from ingest.progress import EpochPart, join
from ingest.stores import ObjectMeta, Store, open_store

LATEST_FILE = "latest.json"
STATE_FILE = "state.pt"
POSITION_FILE = "position.json"
PROGRESS_PREFIX = "progress-"


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimiser steps taken so far, on each rank.
        before: what was trained on already in the epoch to train next.
        checkpoint: the name of the checkpoint in the run's folder; None at the very start.
    """

    step: int
    before: EpochPart
    checkpoint: str | None = None

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
            return Position(self.step, following, self.checkpoint)
        return self


START = Position(0, EpochPart(0, np.zeros(0, dtype=np.int64)))


def write(
    folder: Path,
    *,
    rank: int,
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
    torch.save(state, folder / STATE_FILE)
    (folder / POSITION_FILE).write_text(json.dumps({"epoch": part.epoch, "step": step}))


def name_latest(run_dir: str, checkpoint: str) -> None:
    """Make `checkpoint` the one to go on from."""
    open_store(run_dir).put(LATEST_FILE, json.dumps({"checkpoint": checkpoint}).encode())


def read_position(run_dir: str) -> Position:
    """Where the run stands, by its last named checkpoint; its start where there is none.

    Raises:
        ConfigError: the named checkpoint is not whole.
    """
    store = open_store(run_dir)
    name = _latest(store)
    if name is None:
        return START
    files = {entry.name.rpartition("/")[2]: entry for entry in store.list(f"{name}/")}
    parts = [meta for file, meta in sorted(files.items()) if file.startswith(PROGRESS_PREFIX)]
    if POSITION_FILE not in files or STATE_FILE not in files or not parts:
        raise ConfigError(
            f"expected {STATE_FILE}, {POSITION_FILE} and {PROGRESS_PREFIX}*.npz in {store.uri_of(name)}, found "
            f"{sorted(files)}; name another checkpoint in {store.uri_of(LATEST_FILE)}"
        )
    position: dict[str, int] = json.loads(store.fetch([files[POSITION_FILE]])[0])
    before = join(EpochPart.from_bytes(data) for data in store.fetch(parts))
    return Position(position["step"], before, name)


def load_state(run_dir: str, checkpoint: str, device: torch.device | str) -> dict[str, Any]:
    """The `state.pt` of a checkpoint; nothing but tensors and plain values is loaded."""
    store = open_store(run_dir)
    data = store.fetch([_entry(store, f"{checkpoint}/{STATE_FILE}")])[0]
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    return state


def _latest(store: Store) -> str | None:
    for entry in store.list(LATEST_FILE):
        if entry.name == LATEST_FILE:
            name: str = json.loads(store.fetch([entry])[0])["checkpoint"]
            return name
    return None


def _entry(store: Store, name: str) -> ObjectMeta:
    for entry in store.list(name):
        if entry.name == name:
            return entry
    raise ConfigError(f"expected {store.uri_of(name)}, found none; choose a whole checkpoint")
