"""Checks, before pairs are made, that the machine has the disk and the memory that a benchmark needs."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from ingest.errors import ConfigError

GIB = 2**30
TOGETHER_BYTES = GIB
"""Most bytes of pairs, as the server sent them, that all processes of a loader together hold at once."""

COPIES = 3  # of those: as they came, decoded, and as a client's library keeps them meanwhile
BASE_BYTES = 3 * GIB  # Ray with its object store, torch, and this process
SERVER_COPIES = 6  # of the largest object, while it is uploaded to the embedded server (measured: 5.5)


def together(pair_bytes: float, workers: int) -> int:
    """Return the number of pairs that one of so many processes may hold at once; 1 at least."""
    return max(1, int(TOGETHER_BYTES / workers / pair_bytes))


def memory_needed(pair_bytes: int, batch_bytes: int, workers: int) -> int:
    """Return the bytes of memory that the greediest loader and the embedded server take together.

    Args:
        pair_bytes: of image and label together.
        batch_bytes: of a batch as tensors.
        workers: processes of a loader; each has two batches ready.
    """
    held = max(TOGETHER_BYTES, workers * pair_bytes)
    return BASE_BYTES + COPIES * held + 2 * workers * batch_bytes + SERVER_COPIES * pair_bytes


def check_room(*, pairs: int, pair_bytes: int, batch_bytes: int, workers: int, folder: Path, made: bool) -> None:
    """Refuse a benchmark that the machine has no room for.

    Args:
        pairs: number of them.
        pair_bytes: of image and label together.
        batch_bytes: of a batch as tensors.
        workers: processes of a loader.
        folder: where the pairs lie, and where the embedded server keeps its copy of them.
        made: whether the pairs are there already.

    Raises:
        ConfigError: there is too little memory or disk; the message has what is needed and what there is.
    """
    wanted, found = memory_needed(pair_bytes, batch_bytes, workers), memory_available()
    if found < wanted:
        raise ConfigError(
            f"expected {wanted / GIB:,.1f} GiB of memory for pairs of {pair_bytes / 2**20:,.1f} MiB, found "
            f"{found / GIB:,.1f} GiB available; give smaller --pair-kb, --batch or --workers"
        )
    wanted = pairs * pair_bytes * (1 if made else 2)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    found = shutil.disk_usage(there).free
    if found < wanted:
        raise ConfigError(
            f"expected {wanted / GIB:,.1f} GiB of disk in {there} for {pairs:,} pairs and the server's copy of them, "
            f"found {found / GIB:,.1f} GiB free; give smaller --pair-kb or --pairs, or remove older ones from there"
        )


def memory_available() -> int:
    """Return the bytes that can be taken without swapping: of the machine, or of the container if it has less."""
    values = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    found = int(values["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # there is no such limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found = min(found, limit - used)
    return found
