"""Checks what Ray needs of this machine before it starts here: a folder for its session, room, memory, file handles."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path

from .errors import ConfigError, DiskFullError

SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""The longest path of a Unix socket."""

SESSION_BYTES = 100 * 2**20
"""Room for the session of one run on one node: Ray's logs and state files."""

FILES = 256
"""Open files that a process may have at the least: a demo on 2 CPUs runs with so many."""

MANY_FILES = 4096
"""Below so many Ray advises against it: its raylet has several connections to each worker."""

_LOG = logging.getLogger(__name__)
_SAID: set[str] = set()


def check_machine() -> None:
    """Check that Ray can start on this machine, and warn of what would make it slow, once a process.

    Raises:
        ConfigError: a path is too long, a folder may not be written, or too few files may be open.
        DiskFullError: the disk of Ray's session has too little room.
    """
    folder = session_root()
    _check_folder(folder)
    raise_file_limit()
    free = shutil.disk_usage(folder).free
    if free < SESSION_BYTES:
        raise DiskFullError(
            f"expected {_mib(SESSION_BYTES)} free for Ray's session in {folder}, found {_mib(free)}; free some room "
            "there, or set RAY_TMPDIR to a folder on another disk",
            str(folder),
            SESSION_BYTES,
        )
    _check_object_store(folder, free)


def session_root() -> Path:
    """The folder in which Ray makes a folder for each session: where Ray looks too, but absolute.

    Ray's processes run in other folders, so that a relative one would be another one to each of them.
    """
    return (Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray").absolute()


def _variable() -> str:
    return next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "RAY_TMPDIR")


def longest_socket(folder: Path) -> int:
    """The length in bytes of the longest path of a socket that Ray makes in the session of this process."""
    session = f"session_2000-01-01_00-00-00_000000_{os.getpid()}"
    return len(os.fsencode(folder / session / "sockets" / "plasma_store"))


def _check_folder(folder: Path) -> None:
    variable, given = _variable(), folder.parent
    over = longest_socket(folder) - SOCKET_BYTES
    if over > 0:
        length = len(os.fsencode(given))
        raise ConfigError(
            f"expected a path of at most {length - over} bytes in {variable}, because Ray makes sockets below it and "
            f"the system allows them {SOCKET_BYTES} bytes; found {length} bytes, {given}; set RAY_TMPDIR to a folder "
            "with a shorter path"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"expected a folder at {folder} that Ray can write its session to, found: {error.strerror}; set RAY_TMPDIR "
            f"to a folder that user {os.geteuid()} can write"
        ) from error


def raise_file_limit() -> None:
    """Raise the limit of open files as far as this process may, which its children inherit.

    Raises:
        ConfigError: Ray needs more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 65536 and soft != resource.RLIM_INFINITY:
        most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if most > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    advice = (
        "raise it by `ulimit -Hn 65536`, by nofile in /etc/security/limits.conf, or by `docker run --ulimit "
        "nofile=65536`"
    )
    if soft != resource.RLIM_INFINITY and soft < FILES:
        raise ConfigError(
            f"expected that a process may open {FILES} files, as Ray's do, found a hard limit of {hard}; {advice}"
        )
    if soft != resource.RLIM_INFINITY and soft < MANY_FILES:
        _warn(
            "files",
            f"a process may open {soft} files here, which is few for Ray where it has many workers: connections may "
            f"fail; {advice}",
        )


def _check_object_store(folder: Path, free: int) -> None:
    """Ray puts its object store on disk, without a word at our log level, where /dev/shm is too small for it."""
    if sys.platform != "linux":
        return
    from .ray_compat import object_store_bytes, shared_memory_bytes  # Ray loads here, after the cheap checks

    try:
        shared = shared_memory_bytes()
    except OSError as error:
        raise ConfigError(
            f"expected a folder /dev/shm, where Ray keeps its objects, found: {error.strerror}; mount a tmpfs there"
        ) from error
    store = object_store_bytes()
    if shared >= store:
        return
    advice = f"give the machine a larger /dev/shm, in a container by `docker run --shm-size={-(-store // 2**30)}g`"
    if free < store + SESSION_BYTES:
        raise DiskFullError(
            f"expected {_mib(store)} in /dev/shm for Ray's objects, or {_mib(store + SESSION_BYTES)} in {folder}, "
            f"found {_mib(shared)} and {_mib(free)}; {advice}, or set RAY_TMPDIR to a folder on another disk",
            "/dev/shm",
            store,
        )
    _warn(
        "/dev/shm",
        f"/dev/shm has {_mib(shared)}, and Ray wants {_mib(store)} for its objects: it keeps them in {folder}, on "
        f"disk, which is slower; {advice}",
    )


def _warn(subject: str, words: str) -> None:
    """Say it once a process: the figures may be others at the next look."""
    if subject not in _SAID:
        _SAID.add(subject)
        _LOG.warning(words)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
