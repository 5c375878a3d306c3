"""Tells a full disk from other failures, through the errors that Ray, Arrow and torch wrap around it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from .errors import DiskFullError, IngestError
from .unwrap import wrapped

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# Of errors that crossed processes as text: the C library's words, then those of Ray's OutOfDiskError.
WORDS = (
    os.strerror(errno.ENOSPC),
    os.strerror(errno.EDQUOT),
    "Local disk is full",
    "local disk's utilization is over capacity",
)


def full_disk(error: BaseException) -> BaseException | None:
    """The error that says that a disk or a quota is full, among this one and those that led to it.

    One that names the path comes before one that does not. The text of an error counts only where none of ours is
    among them: ours may quote a server, whose disk is not one of this machine.
    """
    found: list[tuple[int, BaseException]] = []
    by_text: BaseException | None = None
    ours = False
    for each in wrapped(error):
        if isinstance(getattr(each, "cause", None), BaseException):  # Ray's, around one that comes by itself
            continue
        ours = ours or isinstance(each, IngestError)
        if isinstance(each, DiskFullError):
            found.append((0 if each.needed_bytes is not None else 1 if each.place else 3, each))
        elif isinstance(each, OSError) and each.errno in FULL:
            found.append((2 if each.filename else 3, each))
        elif by_text is None and any(words in str(each) for words in WORDS):
            by_text = each
    if found:
        return min(found, key=lambda each: each[0])[1]
    return None if ours else by_text


def free_bytes(place: str) -> int:
    """Bytes free on the disk of a path, which need not exist yet."""
    path = Path(place)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def no_room_for(path: str, error: OSError) -> DiskFullError:
    """What to raise where a file could not be written because the disk is full."""
    return DiskFullError(
        f"expected room to write {path}, found {error.strerror} with {free_bytes(path) / 2**20:.0f} MiB free on its "
        "disk; free some space there, or choose a place on another disk",
        path,
    )
