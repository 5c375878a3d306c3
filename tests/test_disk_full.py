"""A full disk is recognised through whatever wraps it, and a file that could not be written for it is named."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import ray.exceptions

from ingest.disk_full import full_disk
from ingest.errors import ConfigError, DiskFullError, StoreError, UnreachableError
from ingest.stores import local as local_store
from ingest.stores import open_store

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that a local store begins lies on a device that is full."""

    def begin(folder: str) -> tuple[int, str]:
        path = f"{folder}/.full"
        Path(path).touch()
        return os.open("/dev/full", os.O_WRONLY), path

    monkeypatch.setattr(local_store, "_new_file", begin)


def test_a_local_file_for_which_the_disk_has_no_room_is_named_and_the_one_before_it_stays(tmp_path, request):
    store = open_store(str(tmp_path))
    store.put("a/x.json", b"before")
    request.getfixturevalue("full")
    with pytest.raises(
        DiskFullError, match=r"expected room to write .*/a/x\.json, found No space left .* MiB free"
    ) as no:
        store.put("a/x.json", b"after")
    assert no.value.place == f"{tmp_path}/a/x.json"
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["x.json"]
    assert (tmp_path / "a" / "x.json").read_bytes() == b"before"


def test_the_error_keeps_its_place_between_processes():
    error = pickle.loads(pickle.dumps(DiskFullError("expected room", "/a/b", 7)))  # noqa: S301  our own
    assert (str(error), error.place, error.needed_bytes) == ("expected room", "/a/b", 7)


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def ray_task_error(cause: Exception) -> Exception:
    return ray.exceptions.RayTaskError("task", "Traceback ...\n" + str(cause), cause).as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [
        NO_SPACE,
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device"),  # Arrow's
        OSError(errno.EDQUOT, "in words of another language"),
        chained(StoreError("expected to write x"), NO_SPACE),
        ray_task_error(OSError(errno.ENOSPC, "no room")),
        ray_task_error(DiskFullError("expected room", "/a")),
        RuntimeError("the worker said: [Errno 28] No space left on device"),
        ray.exceptions.OutOfDiskError("of an object"),
        RuntimeError("Local disk is full"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:20]}",
)
def test_a_full_disk_is_recognised(error):
    assert full_disk(error) is not None


@pytest.mark.parametrize("cause", [OSError(errno.ENOSPC, "no room", "/a"), DiskFullError("expected room", "/a")])
def test_the_error_that_ray_wraps_is_found_and_not_its_wrapper(cause):
    assert full_disk(ray_task_error(cause)) is cause


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        MemoryError("no memory left"),
        ConfigError("expected a disk"),
        UnreachableError("the server said: 500, No space left on device"),  # not of a disk of this machine
        ray_task_error(UnreachableError("the server said: 500, No space left on device")),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:20]}",
)
def test_nothing_else_is_taken_for_a_full_disk(error):
    assert full_disk(error) is None


def test_of_several_errors_the_one_that_names_the_path_counts():
    named = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    assert full_disk(chained(chained(OSError(errno.ENOSPC, "anywhere"), NO_SPACE), named)) is named
    done = DiskFullError("expected room", "/c", 7)
    assert full_disk(chained(named, done)) is done
