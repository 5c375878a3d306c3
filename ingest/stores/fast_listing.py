"""Dataflux's parallel listing, in a process group of its own that never outlives us.

As a module it is the parent's side; run by ``python -m ingest.stores.fast_listing`` it is the child, which alone
imports Dataflux. The controller forks workers and loses them in ways that end in a short or empty answer without any
error, so nothing here is trusted: `ingest.stores.gcs` takes only split points from it, and lists each range plainly.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from ..errors import ListingError

logger = logging.getLogger(__name__)

# A place in shared memory for each class, since the workers that see them are processes of their own.
STORAGE_CLASSES = (
    "NEARLINE",
    "COLDLINE",
    "ARCHIVE",
    "RAPID",
    "MULTI_REGIONAL",
    "REGIONAL",
    "DURABLE_REDUCED_AVAILABILITY",
    "other",
)
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastListing:
    """What a parallel listing found.

    Attributes:
        sizes: bytes by full object name, without folder objects and composites.
        classes: about how many objects there are of each storage class but STANDARD; the last object of a page is
            seen twice.
    """

    sizes: dict[str, int]
    classes: dict[str, int]


def fast_list_objects(
    *, bucket: str, prefix: str, project: str | None, processes: int, timeout_s: float
) -> FastListing:
    """List a prefix by Dataflux in a subprocess, which is gone with all of its children when this returns.

    Args:
        bucket: the bucket.
        prefix: of full object names.
        project: None takes the one of the credentials.
        processes: how many list in parallel.
        timeout_s: time after which it is given up.

    Raises:
        ListingError: it failed, or took too long; the message ends with what the child wrote.
    """
    with tempfile.TemporaryDirectory(prefix="voxflux-listing-") as scratch:
        answer, log = Path(scratch) / "answer.json", Path(scratch) / "log"
        request = {
            "bucket": bucket,
            "prefix": prefix,
            "project": project,
            "processes": processes,
            "answer": str(answer),
            "parent": os.getpid(),
        }
        with log.open("wb") as log_file:
            # Answer and log are files, so that nobody waits for anybody to empty a pipe.
            child = subprocess.Popen(
                [sys.executable, "-m", "ingest.stores.fast_listing", json.dumps(request, allow_nan=False)],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        try:
            status = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ListingError(
                f"expected the parallel listing of gs://{bucket}/{prefix} within {timeout_s:g} s, found it still at "
                f"work; raise fast_listing_timeout_s. It wrote: {_tail(log)}"
            ) from None
        finally:
            _end_group(child)
        if status != 0 or not answer.exists():
            raise ListingError(
                f"expected the parallel listing of gs://{bucket}/{prefix} to end well, found status {status}; "
                f"it wrote: {_tail(log)}"
            )
        found = json.loads(answer.read_bytes())
        return FastListing(sizes=dict(found["sizes"]), classes=found["classes"])


def _end_group(child: subprocess.Popen[bytes]) -> None:
    # The group is named by the child's pid, which is not given to another while we have not waited for the child or
    # while any of its workers lives; a group that is empty is gone, and says so.
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        logger.debug("the group of the parallel listing %d is gone already", child.pid)
    child.wait()


def _tail(log: Path, limit_bytes: int = 1500) -> str:
    return log.read_bytes()[-limit_bytes:].decode(errors="replace").strip() or "nothing"


class _AnyClass(list[str]):
    """Takes every storage class for allowed, and counts what is not STANDARD over all workers."""

    def __init__(self) -> None:
        super().__init__(["STANDARD"])
        self.counts = multiprocessing.get_context("fork").Array("Q", len(STORAGE_CLASSES))

    def __contains__(self, storage_class: object) -> bool:
        if storage_class not in ("STANDARD", None):
            place = STORAGE_CLASSES.index(str(storage_class) if storage_class in STORAGE_CLASSES else "other")
            with self.counts.get_lock():
                self.counts[place] += 1
        return True


def _tie_to_parent(parent: int, death_signal: signal.Signals) -> None:
    """Have the kernel signal this process when its parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(death_signal))
    if os.getppid() != parent:
        sys.exit("the parent has died already")


def _end_own_group(_number: int, _frame: FrameType | None) -> None:
    os.killpg(0, signal.SIGKILL)


def _become_worker() -> None:
    """In each process that Dataflux forks: die with the child, and by SIGTERM alone, not taking the group along."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def main(arguments: Sequence[str]) -> int:
    """The child: list, write the answer, end. Its last act is to be killed with its group by the parent."""
    request = json.loads(arguments[0])
    signal.signal(signal.SIGTERM, _end_own_group)
    _tie_to_parent(request["parent"], signal.SIGTERM)
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    multiprocessing.set_start_method("fork")  # the workers must inherit the counts; no thread runs here yet
    from dataflux_core.fast_list import ListingController

    os.register_at_fork(after_in_child=_become_worker)
    any_class = _AnyClass()
    found = ListingController(
        max_parallelism=request["processes"],
        project=request["project"] or "",
        bucket=request["bucket"],
        sort_results=True,
        prefix=request["prefix"],
        allowed_storage_classes=any_class,
    ).run()
    counts: list[int] = any_class.counts[:]
    classes = {name: count for name, count in zip(STORAGE_CLASSES, counts, strict=True) if count}
    answer = Path(request["answer"])
    whole = answer.with_suffix(".partial")
    whole.write_text(json.dumps({"sizes": found, "classes": classes}, allow_nan=False))
    whole.rename(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
