"""Ends a run whose disk is full, with the path and the room that it needs: a restart would only meet it again."""

from __future__ import annotations

import errno
import math
import os
import shutil
import socket
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from ingest.disk_full import FULL, free_bytes, full_disk
from ingest.errors import DiskFullError
from ingest.unwrap import own_error, wrapped

from .preflight import checkpoint_bytes, run_folder_bytes
from .ray_compat import session_folder

if TYPE_CHECKING:
    from .loop import LoopJob

SPILLS_UNTIL = 0.95  # share of a disk that is in use, above which Ray spills nothing more to it
BYTES_PER_CASE = 10  # of a line of the ledger
# torch's writer says no more than that what it wrote is not there. Where the disk has room, it was something else.
TORCH_WRITER = ("inline_container", "PytorchStreamWriter")


class Place(NamedTuple):
    """A local folder that a run writes to.

    Attributes:
        path: of it.
        needed_bytes: free room that the run needs there.
        purpose: what for.
        instead: what else to do than to free room; empty where there is nothing.
    """

    path: str
    needed_bytes: int
    purpose: str
    instead: str = ""


def places_of(job: LoopJob) -> list[Place]:
    """The local folders that a run writes to, from this process."""
    trainer = job.recipe.trainer
    places = []
    if "://" not in job.run_dir:
        places.append(Place(job.run_dir, run_folder_bytes(job.recipe, job.run_dir), "its checkpoints"))
    if trainer.ledger is not None and "://" not in trainer.ledger:
        lines = max(1, trainer.epochs * job.train_cases * BYTES_PER_CASE)
        places.append(Place(trainer.ledger, lines, "the ledger", "give another --trainer.ledger"))
    one = checkpoint_bytes(job.recipe)
    temporary = tempfile.gettempdir()
    places.append(Place(temporary, one, "a checkpoint in the making", "set TMPDIR to a folder on another disk"))
    session = session_folder()
    if session is not None:
        places.append(_of_ray(session))
    return places


def disk_full(error: BaseException, job: LoopJob) -> DiskFullError | None:
    """What to end the run with where a disk is full; None where something else is wrong.

    To be called where the error was raised, on the machine of that disk. An error that has been through here already
    stays as it is.
    """
    found = full_disk(error)
    if isinstance(found, DiskFullError) and found.needed_bytes is not None:
        return found
    places = places_of(job)
    left = {place: free_bytes(place.path) / place.needed_bytes for place in places}
    short = sorted((place for place in places if left[place] < 1), key=lambda place: left[place])
    if found is None:
        torch_failed = any(words in str(each) for each in wrapped(error) for words in TORCH_WRITER)
        if own_error(error) is not None or not torch_failed or not short:
            return None
        return _ended(short[0].path, short[0], "torch could not write its file", job)
    reason = _reason(found)
    path = getattr(found, "place", None) or getattr(found, "filename", None)
    if path is not None:
        around = [place for place in places if str(path).startswith(place.path.rstrip("/") + "/")]
        place = max(around, key=lambda each: len(each.path), default=places[0])
        return _ended(str(path), place, reason, job)
    spilled = type(found).__name__ == "OutOfDiskError" or "over capacity" in str(found)
    session = session_folder()
    if spilled and session is not None:
        return _ended(session, _of_ray(session), "Ray's object store and its disk full", job)
    if short:
        return _ended(short[0].path, short[0], reason, job)
    # A quota, or room that was freed since.
    every = " or ".join(f"{place.path} ({free_bytes(place.path) / 2**20:.0f} MiB free)" for place in places)
    return DiskFullError(
        f"expected room on the disks of {socket.gethostname()}, found {reason} in one of {every}; free "
        f"{_mib(places[0].needed_bytes)} there, look at your quota, then go on with --trainer.resume {job.run_dir}",
        None,
        places[0].needed_bytes,
    )


def _reason(found: BaseException) -> str:
    """In the system's own words: what has wrapped them has words of its own."""
    for error in (found, found.__cause__):
        if isinstance(error, OSError) and error.errno in FULL:
            return os.strerror(error.errno)
    if isinstance(found, DiskFullError):
        return os.strerror(errno.ENOSPC)
    words = str(found).strip().splitlines()
    return words[-1] if words else type(found).__name__


def _of_ray(session: str) -> Place:
    free = math.ceil(shutil.disk_usage(session).total * (1 - SPILLS_UNTIL))
    return Place(session, free, "objects that Ray spills there", "start Ray with another --temp-dir, or set RAY_TMPDIR")


def _ended(path: str, place: Place, reason: str, job: LoopJob) -> DiskFullError:
    free = free_bytes(path)
    instead = f", or {place.instead}" if place.instead else ""
    return DiskFullError(
        f"expected room to write {path} on {socket.gethostname()}, found {reason}, with {free / 2**20:.0f} MiB free; "
        f"the run needs {_mib(place.needed_bytes)} there for {place.purpose}: free as much{instead}, then go on with "
        f"--trainer.resume {job.run_dir}",
        path,
        place.needed_bytes,
    )


def _mib(size_bytes: int) -> str:
    return f"{max(1, math.ceil(size_bytes / 2**20))} MiB"
