"""Tells a full disk from other failures, through the errors that Ray, Arrow and torch wrap around it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from .errors import DiskFullError, IngestError
from .unwrap import wrapped

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# For errors that crossed processes as text: the words of the C library, and those of Ray's OutOfDiskError.
WORDS = (
    os.strerror(errno.ENOSPC),
    os.strerror(errno.EDQUOT),
    "Local disk is full",
    "local disk's utilization is over capacity",
)


def full_disk(error: BaseException) -> BaseException | None:
    """Return the error of a full disk or quota among an error and its causes; None if there is none.

    An error that names the path is preferred to one that does not. The text of an error counts only if no IngestError
    is among the errors, because an IngestError may quote a server, and the server's disk is not one of this machine.
    """
    found: list[tuple[int, BaseException]] = []
    by_text: BaseException | None = None
    ours = False
    for each in wrapped(error):
        if isinstance(getattr(each, "cause", None), BaseException):  # Ray's wrapper: its cause comes by itself
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
    """Return the free bytes on the disk of a path. The path need not exist yet."""
    path = Path(place)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def no_room_for(path: str, error: OSError) -> DiskFullError:
    """Return the error of a file that was not written because the disk is full."""
    return DiskFullError(
        f"expected room to write {path}, found {error.strerror} with {free_bytes(path) / 2**20:.0f} MiB free on its "
        "disk; free some space there, or choose a place on another disk",
        path,
    )
