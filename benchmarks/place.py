"""Where a benchmark reads: the given URIs, or generated pairs on the embedded server behind a latency."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ingest.cluster import environment
from ingest.emulator import EMULATOR_VARIABLE, EmbeddedServer
from ingest.errors import ConfigError
from ingest.stores import open_store
from ingest.stores.gcs_clients import close_clients
from ingest.testing import make_cases

from .latency import delayed

BUCKET = "voxflux-bench"
DATA_DIR = Path("data/bench")
MOST_LOADED_BYTES = 2**30


def _nothing() -> None:
    """There is no server of ours to look at."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Pairs to read, and what a process needs to reach them.

    Attributes:
        images: URI.
        labels: URI.
        folder: where the same pairs lie as files, with `images/` and `labels/`; None for given URIs.
        patch: (D, H, W) to cut from each pair.
        env: environment variables for the processes that read.
        server_pids: of processes whose CPU time is the server's.
        check: raises UnreachableError if the embedded server has ended.
    """

    images: str
    labels: str
    folder: Path | None
    patch: tuple[int, int, int]
    env: dict[str, str]
    server_pids: tuple[int, ...]
    check: Callable[[], None] = _nothing


def side_of(pair_kb: int) -> int:
    """Voxels a side of the cube whose float32 image and uint8 label have this size together; 160 gives 32."""
    return round((pair_kb * 1024 / 5) ** (1 / 3))


def patch_of(side: int) -> tuple[int, int, int]:
    """What is cut from such cubes: MLPerf's 128³ where it fits, else the reference demo's 32³."""
    edge = 128 if side >= 128 else min(32, side)
    return edge, edge, edge


def folder_of(pairs: int, pair_kb: int) -> Path:
    """Where `make_pairs` puts them."""
    return DATA_DIR.resolve() / f"{pair_kb}kb-{pairs}" / BUCKET / "pairs"


def are_made(pairs: int, pair_kb: int) -> bool:
    """Return whether the pairs exist already."""
    return (folder_of(pairs, pair_kb) / ".made").exists()


def make_pairs(pairs: int, pair_kb: int) -> Path:
    """Make pairs with smooth labels under `DATA_DIR`, unless they are there: `BUCKET/PAIRS/{images,labels}/`.

    Returns:
        The folder that holds `images/` and `labels/`.
    """
    folder = folder_of(pairs, pair_kb)
    done = folder / ".made"
    if not done.exists():
        side = side_of(pair_kb)
        images, labels = open_store(str(folder / "images")), open_store(str(folder / "labels"))
        # A case takes ten times its size while it is made, and `make_cases` makes four at once.
        at_once = pairs if 40 * pair_kb * 1024 < MOST_LOADED_BYTES else 1
        for first in range(0, pairs, at_once):
            make_cases(images, labels, at_once, (side, side, side), first=first)
        done.touch()
    return folder


@contextlib.contextmanager
def served(folder: Path, all_bytes: int, most_loaded_bytes: int = MOST_LOADED_BYTES) -> Iterator[EmbeddedServer]:
    """The embedded server, up and with the pairs in it.

    At its start it loads a folder faster than it takes uploads, but holds the whole of it in memory, twice. So what is
    large is uploaded, an object at a time.

    Args:
        folder: of `make_pairs`.
        all_bytes: of the pairs.
        most_loaded_bytes: what may be loaded.
    """
    # In memory the server looks an object up by going through all of them: a cost that grows with their number. Its
    # copies lie beside the pairs, because the folder of temporary files may be in memory.
    loaded = all_bytes <= most_loaded_bytes
    data = folder.parent.parent if loaded else None
    with EmbeddedServer(data=data, backend="filesystem", scratch=DATA_DIR.resolve()) as server:
        if not loaded:
            server.create_bucket(BUCKET)
            with environment(server.env()):
                for role in ("images", "labels"):
                    store = open_store(f"gs://{BUCKET}/pairs/{role}")
                    for file in sorted((folder / role).glob("*.npy")):
                        store.put(file.name, file.read_bytes())
                close_clients()
        yield server


@contextlib.contextmanager
def opened(*, images: str, labels: str, pairs: int, pair_kb: int, latency_ms: float) -> Iterator[Place]:
    """The given URIs as they are; else generated pairs on an embedded server, `latency_ms` away.

    Raises:
        ConfigError: only one of the two URIs is given, or a latency in front of a server that is not ours.
    """
    if bool(images) != bool(labels):
        raise ConfigError(f"expected --images and --labels, or neither, found {images!r} and {labels!r}; give both")
    if images:
        if latency_ms:
            raise ConfigError("expected --latency-ms 0 for places of yours, which have their own; leave it out")
        yield Place(images=images, labels=labels, folder=None, patch=(32, 32, 32), env={}, server_pids=())
        return
    folder = make_pairs(pairs, pair_kb)
    with served(folder, pairs * pair_kb * 1024) as server, delayed(server.url, latency_ms) as (url, proxy):
        yield Place(
            images=f"gs://{BUCKET}/pairs/images/",
            labels=f"gs://{BUCKET}/pairs/labels/",
            folder=folder,
            patch=patch_of(side_of(pair_kb)),
            env={EMULATOR_VARIABLE: url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"},
            check=server.check,
            server_pids=tuple(pid for pid in (server.pid, proxy, os.getpid()) if pid is not None),
        )
