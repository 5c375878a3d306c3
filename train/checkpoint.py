"""Checkpoints: their files, how they are written, and which one a run goes on from.

A checkpoint is a folder. Rank 0 writes `state.pt` (model, optimiser, loss scale, random states) and `position.json`;
every rank writes `progress-RANK.npz`, the cases it trained on in the epoch under way. Each rank reports the sizes and
checksums of its files. Ray Train stores the files, and then the controller writes them all into `manifest.json`, and
names the checkpoint in RUN_DIR/latest.json. So a crash at any instant leaves the last whole checkpoint named, and a
checkpoint without a manifest is one that was not finished.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import google_crc32c
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
CHECKPOINT_MANIFEST = "manifest.json"
FOLDER_PREFIX = "checkpoint_"  # of the folders that Ray Train makes

Files: TypeAlias = dict[str, tuple[int, int]]
"""By file of a checkpoint: its size in bytes, and its CRC-32C as an unsigned number."""


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands.

    A run is either in the midst of an epoch, or between two, or it has trained an epoch that is yet to be scored.

    Attributes:
        step: optimiser steps taken so far, on each rank.
        before: what was trained on already in the epoch to train next.
        checkpoint: the name of the checkpoint in the run's folder; None at the very start.
        unscored: the row of the epoch before. That epoch is trained; its scores, if it is to be scored, and the report
            of its row are still to come. None where nothing of it is to come.
        instead_of: why the run does not go on from the checkpoint that latest.json names; None where it does.
    """

    step: int
    before: EpochPart
    checkpoint: str | None = None
    unscored: dict[str, Any] | None = None
    instead_of: str | None = None

    @property
    def epoch(self) -> int:
        """The epoch to train next, or to go on with."""
        return self.before.epoch

    @property
    def phase(self) -> str:
        """`score` while scores or the row of the epoch before are still to come, else `train`."""
        return "train" if self.unscored is None else "score"

    def first_read(self, train_cases: int, multiple: int) -> int:
        """The first epoch whose data are read: `epoch`, or the next one if the cases left of `epoch` make no step.

        Args:
            train_cases: cases of an epoch, quarantined ones not counted.
            multiple: cases of one step over all ranks.
        """
        trained = len(self.before.indices)
        return self.epoch + 1 if trained and train_cases - trained < multiple else self.epoch


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
    unscored: Mapping[str, Any] | None = None,
) -> Files:
    """Write this rank's share of a checkpoint.

    Args:
        folder: to write it to; it exists.
        rank: of this process.
        ranks: how many there are.
        part: what this rank trained on in the epoch under way.
        step: optimiser steps taken so far.
        network: its weights are kept, by rank 0.
        optimizer: its state is kept, by rank 0.
        recipe_json: the run's recipe.
        scaler: its loss scale is kept; None where there is none.
        unscored: see `Position`.

    Returns:
        The files it wrote.
    """
    (folder / f"{PROGRESS_PREFIX}{rank:05d}.npz").write_bytes(part.to_bytes())
    if rank == 0:
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
        position = {
            "epoch": part.epoch,
            "step": step,
            "ranks": ranks,
            "phase": "train" if unscored is None else "score",
        }
        (folder / POSITION_FILE).write_text(to_json(position | ({} if unscored is None else {"unscored": unscored})))
    mine = [folder / f"{PROGRESS_PREFIX}{rank:05d}.npz"] + [folder / STATE_FILE, folder / POSITION_FILE] * (rank == 0)
    return {file.name: (file.stat().st_size, _crc32c(file)) for file in mine}


def _crc32c(file: Path) -> int:
    found = 0
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            found = google_crc32c.extend(found, block)
    return found


def seal(run_dir: str, checkpoint: str, files: Mapping[str, Sequence[int]]) -> None:
    """Write a checkpoint's manifest, after all of its files: only then does the checkpoint count.

    Args:
        run_dir: the run's folder or gs:// place.
        checkpoint: the name of its folder there.
        files: of all ranks, as `write` returned them.
    """
    sizes = {name: {"size": size, "crc32c": crc32c} for name, (size, crc32c) in sorted(files.items())}
    open_store(run_dir).put(f"{checkpoint}/{CHECKPOINT_MANIFEST}", to_json({"files": sizes}).encode())


def name_latest(run_dir: str, checkpoint: str, rows: Sequence[Mapping[str, Any]] = (), *, scored: bool = False) -> None:
    """Make `checkpoint` the one to go on from, and keep rows that metrics.json does not hold yet, in one write.

    Args:
        run_dir: the run's folder or gs:// place.
        checkpoint: the name of its folder there.
        rows: of epochs that are done; see `metrics.read_metrics`.
        scored: whether the epoch that the checkpoint left unscored is scored by now.
    """
    named = {"checkpoint": checkpoint} | ({"rows": list(rows)} if rows else {}) | ({"scored": True} if scored else {})
    open_store(run_dir).put(LATEST_FILE, to_json(named).encode())


def read_position(run_dir: str) -> Position:
    """Where the run stands, by its last named checkpoint; its start where there is none.

    If the named checkpoint is not whole, or none is named, this is the newest whole checkpoint in the folder, and
    `Position.instead_of` says so. A run that ended before its first checkpoint was finished stands at its start.

    Raises:
        ConfigError: the named checkpoint is not whole, or none is named beside finished ones, and no other is whole.
    """
    store = open_store(run_dir)
    named = _named(store)
    name: str | None = named.get("checkpoint")
    found = None if name is None else _position_of(store, name)
    if isinstance(found, Position):
        return dataclasses.replace(found, unscored=None) if named.get("scored") else found
    others = {entry.name.partition("/")[0] for entry in store.list(FOLDER_PREFIX) if "/" in entry.name} - {name}
    positions = [_position_of(store, other) for other in sorted(others)]
    whole = [position for position in positions if isinstance(position, Position)]
    reason = found or f"expected {store.uri_of(LATEST_FILE)}, found none"
    if whole:
        newest = max(whole, key=lambda each: (each.step, each.epoch))
        logger.warning("%s; going on from %s, the newest whole checkpoint there", reason, newest.checkpoint)
        return dataclasses.replace(newest, instead_of=reason)
    if found is None and not any(_is_finished(store, other) for other in others):
        begun = f"{reason}, and no finished checkpoint among {', '.join(sorted(others))}: starting at the start"
        return dataclasses.replace(START, instead_of=begun) if others else START
    damaged = "".join(f"; {words}" for words in positions if isinstance(words, str))
    raise ConfigError(
        f"{reason}, and no other whole checkpoint beside it{damaged}; put back a copy of its files, or begin a new run "
        "in another --run-dir"
    )


def _is_finished(store: Store, name: str) -> bool:
    return any(entry.name == f"{name}/{CHECKPOINT_MANIFEST}" for entry in store.list(f"{name}/"))


def _position_of(store: Store, name: str) -> Position | str:
    """The position that a checkpoint holds; in words what is wrong with one that is not whole."""
    place = store.uri_of(name)
    there = {entry.name.rpartition("/")[2]: entry for entry in store.list(f"{name}/")}
    if CHECKPOINT_MANIFEST not in there:
        return f"expected {CHECKPOINT_MANIFEST} in {place}, found {', '.join(sorted(there)) or 'nothing'}"
    try:
        listed = of_json(store.fetch([there[CHECKPOINT_MANIFEST]])[0])["files"]
        wanted: Files = {file: (int(about["size"]), int(about["crc32c"])) for file, about in listed.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"expected sizes and checksums in {place}/{CHECKPOINT_MANIFEST}, found something else ({error})"
    if not {STATE_FILE, POSITION_FILE} <= wanted.keys():
        return f"expected {STATE_FILE} and {POSITION_FILE} in {place}/{CHECKPOINT_MANIFEST}, found {sorted(wanted)}"
    parts = sorted(file for file in wanted if file.startswith(PROGRESS_PREFIX))
    missing = sorted(wanted.keys() - there.keys())
    if missing:
        return f"expected {', '.join(missing)} in {place}, found {', '.join(sorted(there))}"
    bodies: dict[str, bytes] = {}
    for file, (size, crc32c) in wanted.items():
        entry = there[file]
        if entry.size_bytes != size:
            return f"expected {size} bytes in {place}/{file}, found {entry.size_bytes}"
        if file != STATE_FILE or entry.crc32c is None:  # a bucket's listing says what the checksum is
            bodies[file] = store.fetch([entry])[0]
        found = google_crc32c.value(bodies[file]) if file in bodies else entry.crc32c
        if found != crc32c:
            return f"expected the checksum {crc32c} of {place}/{file}, found {found}: it is damaged"
    return _read(name, place, bodies[POSITION_FILE], [bodies[file] for file in parts])


def _read(name: str, place: str, data: bytes, parts: Sequence[bytes]) -> Position | str:
    try:
        position = of_json(data)
        step, ranks = int(position["step"]), int(position["ranks"])
        unscored: dict[str, Any] | None = position["unscored"] if position["phase"] == "score" else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"expected a step, a phase and a number of ranks in {place}/{POSITION_FILE}, found others ({error})"
    if len(parts) != ranks:
        return f"expected the {PROGRESS_PREFIX}*.npz of {ranks} ranks in {place}, found {len(parts)}"
    try:
        before = join(EpochPart.from_bytes(part) for part in parts)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        return f"expected what the ranks trained on in {place}/{PROGRESS_PREFIX}*.npz, found damage ({error})"
    return Position(step, before, name, unscored)


def load_state(run_dir: str, checkpoint: str) -> dict[str, Any]:
    """The `state.pt` of a checkpoint, in the host's memory; nothing but tensors and plain values is loaded.

    Loading a state into an optimiser copies its tensors to the weights' device, but for the counts of steps, which
    AdamW wants on the host: on a GPU each of them would be waited for twice a step.
    """
    store = open_store(run_dir)
    data = store.fetch([_entry(store, f"{checkpoint}/{STATE_FILE}")])[0]
    check_archive(data, store.uri_of(f"{checkpoint}/{STATE_FILE}"))
    return unpacked(data, store.uri_of(f"{checkpoint}/{STATE_FILE}"))


def unpacked(data: bytes, place: str) -> dict[str, Any]:
    """Unpack a `state.pt` in the host's memory.

    Args:
        data: of the file.
        place: of the file, for the message.

    Raises:
        ConfigError: it is not what `voxflux run` wrote. torch's own message is not passed on, because it advises to
            load the file with `weights_only=False`, which would run whatever code the file holds.
    """
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds {type(state).__name__}")
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        # The cause is not chained: Ray prints it with the error.
        raise ConfigError(
            f"expected a checkpoint of `voxflux run` in {place}, found something else ({_why_not(error)}); give "
            "another checkpoint"
        ) from None
    return state


def _why_not(error: Exception) -> str:
    text = str(error)
    foreign = re.search(r"(?:GLOBAL|global) ([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"it asks for the Python object {foreign.group(1)}, and not for tensors alone"
            if foreign
            else ("it does not hold tensors alone")
        )
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"


def check_archive(data: bytes, place: str) -> None:
    """Check a `state.pt` against its own checksums. It is a ZIP archive, and torch reads it without checking them.

    Args:
        data: of the file.
        place: of the file, for the message.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, KeyError) as error:
        damaged = str(error)
    if damaged is not None:
        raise ConfigError(
            f"{place}: expected the weights as torch saved them, found damage ({damaged}); put back a copy of it, or "
            "choose another checkpoint"
        )


def unwritten_rows(run_dir: str) -> list[dict[str, Any]]:
    """Rows of epochs that were named with their checkpoint; metrics.json may lack them.

    Raises:
        ConfigError: RUN_DIR/latest.json is damaged.
    """
    rows: list[dict[str, Any]] = _named(open_store(run_dir)).get("rows", [])
    return rows


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
