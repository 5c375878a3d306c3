"""Local folders: plain paths and file:// URIs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from ..disk_full import FULL, no_room_for
from ..errors import (
    ConfigError,
    ObjectError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PlaceNotFoundError,
    StaleManifestError,
    StoreError,
)
from ..home import expanded
from .base import (
    BaseStore,
    Bodies,
    ObjectMeta,
    Pieces,
    RangeRequest,
    StoreConfig,
    joined,
    parted,
    precondition_failed,
)

_TEMPORARY = ".voxflux-tmp-"
_GAP_BYTES = 64 * 2**10  # a gap in a file is cheap to leave out

Parts = Sequence[tuple[int, int]]
Read: TypeAlias = list[bytes] | ObjectError  # named here, since a class with a method `list` cannot say it


class LocalStore(BaseStore):
    """A folder. Thread-safe; pickles as its URI and configuration.

    An object's generation is its modification time in ns. Symbolic links to files and folders are followed, but a
    folder that is its own ancestor is not entered again.
    """

    def __init__(self, uri: str, config: StoreConfig | None = None) -> None:
        """Note the folder; touches nothing.

        Args:
            uri: ``file:///folder``, percent-decoded, or a plain path, taken literally and made absolute.
            config: kept, for one shape of all stores.

        Raises:
            ConfigError: the URI names a host, or `~` where there is no home folder.
        """
        if uri.startswith("file://"):
            parts = urlsplit(uri)
            if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
                raise ConfigError(
                    f"expected file:///folder with %3F and %23 for ? and #, found {uri!r}; give a plain path instead"
                )
            folder = unquote(parts.path)
        else:
            folder = uri
        self.root = os.path.abspath(expanded(folder))  # noqa: PTH100  Path.resolve follows links
        self.uri = Path(self.root).as_uri().rstrip("/") + "/"
        self.config = config or StoreConfig()

    def __repr__(self) -> str:
        return f"LocalStore({self.uri!r})"

    def uri_of(self, name: str) -> str:
        """The full path of one object, for messages."""
        return f"{self.root.rstrip('/')}/{name}"

    def list(self, prefix: str = "") -> Iterator[ObjectMeta]:
        """See `Lists.list`; our own unfinished files are left out."""
        with _folder_errors(self.root):
            if not stat.S_ISDIR(os.stat(self.root).st_mode):  # noqa: PTH116  strings throughout, for speed
                raise NotADirectoryError(self.root)
        yield from self._walk("", prefix, ())

    def _walk(self, folder: str, prefix: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[ObjectMeta]:
        path = os.path.join(self.root, folder)  # noqa: PTH118
        with _folder_errors(path):
            own = os.stat(path)  # noqa: PTH116
            here = (own.st_dev, own.st_ino)
            if here in ancestors:
                return
            with os.scandir(path) as scan:
                entries = [(entry, _is_folder(entry)) for entry in scan]
        # A folder's objects sort as if its name ended in '/': GCS orders whole names by their bytes.
        entries.sort(key=lambda item: os.fsencode(item[0].name) + (b"/" if item[1] else b""))
        for entry, is_folder in entries:
            name = folder + entry.name
            if is_folder:
                inside = name + "/"
                if inside.startswith(prefix) or prefix.startswith(inside):
                    yield from self._walk(inside, prefix, (*ancestors, here))
            elif name.startswith(prefix) and not entry.name.startswith(_TEMPORARY):
                status = _status(entry)
                if status is not None and stat.S_ISREG(status.st_mode):
                    yield ObjectMeta(name, status.st_size, status.st_mtime_ns)

    def fetch_each(self, objects: Sequence[ObjectMeta]) -> Bodies:
        """See `Fetches.fetch_each`; one after the other, since a read task has several such calls under way."""
        return [self._fetch_one(meta) for meta in objects]

    def fetch_ranges(self, requests: Sequence[RangeRequest]) -> Pieces:
        """See `FetchesRanges.fetch_ranges`."""
        pieces: Pieces = []
        for run in joined(requests, sys.maxsize, sys.maxsize):
            reads = joined(run, _GAP_BYTES, sys.maxsize)
            bodies = self._read(run[0].meta, [(read[0].start, read[-1].stop) for read in reads])
            for number, read in enumerate(reads):
                pieces.extend([bodies] * len(read) if isinstance(bodies, ObjectError) else parted(read, bodies[number]))
        return pieces

    def _fetch_one(self, meta: ObjectMeta) -> bytes | ObjectError:
        bodies = self._read(meta, ((0, meta.size_bytes),))
        return bodies if isinstance(bodies, ObjectError) else bodies[0]

    def _read(self, meta: ObjectMeta, parts: Parts) -> Read:
        path = self._path(meta.name)
        try:
            # Without a file object: a third of what reading a small file costs.
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                status = os.fstat(handle)
                changed = status.st_size != meta.size_bytes or (
                    meta.generation is not None and status.st_mtime_ns != meta.generation
                )
                bodies = [] if changed else [_read_part(handle, start, stop - start) for start, stop in parts]
            finally:
                os.close(handle)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            if not Path(self.root).is_dir():
                raise _no_folder(self.root) from None
            return ObjectNotFoundError(f"expected the listed file {path}, found that it is gone; put it back")
        except PermissionError as error:
            raise _not_allowed(path, "read") from error
        except OSError as error:
            raise StoreError(f"expected to read {path}, found {error}; check the file system") from error
        if changed or any(len(body) != stop - start for body, (start, stop) in zip(bodies, parts, strict=True)):
            return StaleManifestError(
                f"expected {path} as listed ({meta.size_bytes:,} bytes, generation {meta.generation or 'unknown'}), "
                f"found {status.st_size:,} bytes, generation {status.st_mtime_ns}; it was overwritten since"
            )
        return bodies

    def put(self, name: str, data: bytes, if_generation: int | None = None) -> int:
        """See `Puts.put`: a temporary file beside it takes its place in one step.

        A new file has the permissions that the umask leaves, one that is written again keeps those that it has.

        All writes and deletes of one file exclude each other by a lock, also those without a condition. Without the
        lock, a write between the check and the write of another one would be lost unseen.

        Raises:
            ConfigError: the name leads out of the folder, or names a folder.
            PermissionDeniedError: the folder may not be written.
            DiskFullError: its disk, or a quota on it, is full.
            PreconditionError: the file is of another generation.
        """
        path = self._path(name)
        folder = os.path.dirname(path)  # noqa: PTH120
        temporary = None
        try:
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103
            handle, temporary = _new_file(folder)
            with open(handle, "wb") as file:  # noqa: PTH123
                file.write(data)
            with locked(path):
                before = _require(path, if_generation)
                if before:
                    _keep_mode(path, temporary)
                generation = _stamp_after(temporary, before)
                os.replace(temporary, path)  # noqa: PTH105
            temporary = None
            return generation
        except PermissionError as error:
            raise _not_allowed(path, "write") from error
        except OSError as error:
            if error.errno in FULL:
                raise no_room_for(path, error) from error
            raise StoreError(
                f"expected to write {path}, found {error}; check that no part of the path is a file, and that the "
                "file system is sound"
            ) from error
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def delete(self, name: str, if_generation: int | None = None) -> None:
        """See `Deletes.delete`.

        Raises:
            ConfigError: the name leads out of the folder, or names a folder.
            PermissionDeniedError: the folder may not be written.
            ObjectNotFoundError, PreconditionError: as named.
        """
        path = self._path(name)
        try:
            if not Path(path).is_file():
                raise FileNotFoundError(path)
            with locked(path):
                _require(path, if_generation)
                os.unlink(path)  # noqa: PTH108
        except (FileNotFoundError, NotADirectoryError) as error:
            if not Path(self.root).is_dir():
                raise _no_folder(self.root) from error
            raise ObjectNotFoundError(f"expected the file {path} to delete, found none; it is gone already") from error
        except PermissionError as error:
            raise _not_allowed(path, "delete") from error
        except OSError as error:
            raise StoreError(f"expected to delete {path}, found {error}; check the file system") from error

    def _path(self, name: str) -> str:
        if not name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise ConfigError(
                f"expected a name of a file below {self.root}, found {name!r}; names must not be empty, nor have "
                f"empty, '.' or '..' parts"
            )
        return os.path.join(self.root, name)  # noqa: PTH118


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the lock of writes and deletes of one file, against threads, processes and hosts.

    The lock file is removed by its last holder. Some file systems have no locks (e.g. Lustre without its option
    `flock`). There the check and the write are two steps, and two writers in the same millisecond may both succeed.
    """
    folder, name = os.path.split(path)
    # A checksum, because a name may have the greatest length already. Two names with one checksum share the lock.
    lock = os.path.join(folder, f"{_TEMPORARY}{zlib.crc32(os.fsencode(name)):08x}.lock")  # noqa: PTH118
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(PermissionError):  # the lock file is another user's, and open to us already
                os.fchmod(handle, _lock_mode(folder))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
            # The last holder may have removed the file between our open and our lock: that lock excludes nobody.
            if not _is_still(handle, lock):
                continue
            try:
                yield
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(lock)  # noqa: PTH108
            return
        finally:
            os.close(handle)


def _new_file(folder: str) -> tuple[int, str]:
    """Create a new file with the permissions that the umask leaves. `tempfile` ignores the umask."""
    while True:
        path = os.path.join(folder, f"{_TEMPORARY}{secrets.token_hex(8)}")  # noqa: PTH118
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), path


def _keep_mode(path: str, temporary: str) -> None:
    mode, ours = (stat.S_IMODE(os.stat(each).st_mode) for each in (path, temporary))  # noqa: PTH116
    if mode != ours:  # some file systems have no modes to change
        os.chmod(temporary, mode)  # noqa: PTH101


def _lock_mode(folder: str) -> int:
    """The permissions of a lock file, which is empty: who may write the folder must be able to lock its files."""
    shared = os.stat(folder).st_mode & (stat.S_IWGRP | stat.S_IWOTH)  # noqa: PTH116
    return 0o666 if shared else 0o600


def _is_still(handle: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))  # noqa: PTH116
    except FileNotFoundError:
        return False


def _require(path: str, generation: int | None) -> int:
    """Return the file's generation, 0 for no file; raise PreconditionError if another one is required."""
    try:
        found = os.stat(path).st_mtime_ns  # noqa: PTH116
    except FileNotFoundError:
        found = 0
    if generation not in (None, found):
        raise precondition_failed(path, generation or 0, f"generation {found}" if found else "none")
    return found


def _stamp_after(path: str, generation: int) -> int:
    """Make a file's generation differ from its predecessor's: the clock that stamps files moves in steps of ms."""
    stamp = os.stat(path).st_mtime_ns  # noqa: PTH116
    if stamp <= generation:
        stamp = generation + 1
        os.utime(path, ns=(stamp, stamp))
    return os.stat(path).st_mtime_ns  # noqa: PTH116


def _read_part(handle: int, start: int, size_bytes: int) -> bytes:
    """So many bytes from there on: one call, but where the system gives less at once (2 GB on Linux)."""
    body = os.pread(handle, size_bytes, start)
    if len(body) == size_bytes:
        return body
    parts, at = [body], start + len(body)
    while part := os.pread(handle, start + size_bytes - at, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in circles
        return False


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    with _folder_errors(entry.path):
        try:
            return entry.stat()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):  # gone since the scan, or a link to nothing
                return None
            raise


def _no_folder(path: str) -> PlaceNotFoundError:
    return PlaceNotFoundError(f"expected a folder at {path}, found none; check the path, or prepare data there")


def _not_allowed(path: str, verb: str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"expected to {verb} {path}, found that user {os.geteuid()} may not; change its permissions or owner"
    )


@contextlib.contextmanager
def _folder_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_folder(path) from error
    except PermissionError as error:
        raise _not_allowed(path, "list") from error
    except OSError as error:
        raise StoreError(f"expected to list {path}, found {error}; check the file system") from error
