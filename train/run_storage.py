"""Where Ray keeps a run's checkpoints: one filesystem object and plain paths, so that Ray parses no URI."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import NamedTuple

import pyarrow.fs

from ingest.errors import ConfigError
from ingest.stores import StoreConfig, open_store


class RunStorage(NamedTuple):
    """What `ray.train.RunConfig` is given of a run folder.

    Attributes:
        filesystem: that holds the folder.
        path: of the folder's parent on it: ``bucket/prefix``, or an absolute path.
        name: of the folder in its parent.
    """

    filesystem: pyarrow.fs.FileSystem
    path: str
    name: str


def storage_of(run_dir: str, config: StoreConfig | None = None) -> RunStorage:
    """The storage of a run folder, for a real bucket as for an emulator's. Touches no network.

    Our stores take a gs:// URI literally. Arrow would percent-decode it and cut it at ``#`` and ``?``, so Ray is given
    a filesystem and a path, which both take literally too.

    Args:
        run_dir: of `run_folder.resolve_run_dir`.
        config: its retry deadline bounds the retries of a request.

    Raises:
        ConfigError: Ray cannot have the folder.
    """
    check_ray_can_have(run_dir)
    config = config or StoreConfig()
    if not run_dir.startswith("gs://"):
        store = open_store(run_dir)
        parent, _, name = store.uri_of("").rstrip("/").rpartition("/")
        return RunStorage(pyarrow.fs.LocalFileSystem(), parent or "/", name)
    parent, _, name = run_dir.removeprefix("gs://").rstrip("/").rpartition("/")
    retry_time_limit = timedelta(seconds=config.retry_deadline_s)
    url = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
    if not url:
        return RunStorage(pyarrow.fs.GcsFileSystem(retry_time_limit=retry_time_limit), parent, name)
    # Arrow does not go by STORAGE_EMULATOR_HOST of itself. The rules for paths are the same.
    scheme, _, endpoint = url.rpartition("://")
    filesystem = pyarrow.fs.GcsFileSystem(
        anonymous=True, scheme=scheme or "http", endpoint_override=endpoint, retry_time_limit=retry_time_limit
    )
    return RunStorage(filesystem, parent, name)


def check_ray_can_have(run_dir: str) -> None:
    """Refuse a run folder that Ray would put elsewhere than our store, or could not name.

    Raises:
        ConfigError: it is a bucket itself, its path has empty, ``.`` or ``..`` parts, or holds control characters.
    """
    if not run_dir.startswith("gs://"):
        return
    parts = run_dir.removeprefix("gs://").rstrip("/").split("/")
    if len(parts) < 2:
        raise ConfigError(
            f"expected a run folder in a bucket, found the bucket itself, {run_dir!r}; name a folder in it, "
            f"e.g. {run_dir.rstrip('/')}/runs/one"
        )
    if any(part in ("", ".", "..") for part in parts) or any(ord(letter) < 32 for letter in run_dir):
        raise ConfigError(
            "expected a run folder without empty, '.' or '..' parts or control characters, since Ray would put "
            f"checkpoints elsewhere, found {run_dir!r}; choose another --run-dir"
        )
