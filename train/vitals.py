"""Watches the processes that a run cannot live without, and ends the run with one message when one of them died."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import ray

from ingest.errors import ClusterError, IngestError
from ingest.ray_compat import end_own_ray

from .ray_compat import own_dead_processes

T = TypeVar("T")

NEEDED = {"raylet": "the raylet, which runs all processes of the node", "gcs_server": "the GCS, which knows all nodes"}
"""Ray's processes on this node without which no run goes on, by Ray's names; the others only log and show."""

LOOK_S = 5.0
"""Seconds between two looks at the head of a cluster."""

SILENT_S = 40.0
"""Seconds without the head of a cluster after which a run ends; Ray ends the driver without a word after 60."""


class Vitals:
    """What a run's driver looks at while the run goes on. Not safe to share between threads while it is filled."""

    def __init__(self) -> None:
        self._checks: list[Callable[[], None]] = []

    def watch(self, check: Callable[[], None]) -> None:
        """Call this at each look too; it raises an IngestError where the run must end."""
        self._checks.append(check)

    def look(self) -> None:
        """Look once.

        Raises:
            IngestError: of what died, with what to do.
        """
        for check in self._checks:
            check()


class OwnRay:
    """Looks at the Ray processes that this driver started; there are none where it joined a cluster."""

    def __init__(
        self,
        run_dir: str,
        dead: Callable[[], Sequence[tuple[str, int, int]]] = own_dead_processes,
        end: Callable[[], None] = end_own_ray,
    ) -> None:
        """Store the run's folder and the source of ended processes.

        Args:
            run_dir: the run's folder, to go on with.
            dead: gives name, pid and exit status of each that ended.
            end: ends the others when one of them died.
        """
        self._run_dir, self._dead, self._end = run_dir, dead, end
        self._lock = threading.Lock()
        self._error: IngestError | None = None

    def __call__(self) -> None:
        """See `Vitals.watch`."""
        with self._lock:  # the thread that trains may look too, and would take those that we end for dead
            self._error = self._error or self._found()
        if self._error is not None:
            raise self._error

    def _found(self) -> IngestError | None:
        for name, pid, status in self._dead():
            if name in NEEDED:
                self._end()
                return IngestError(
                    f"expected Ray's {name} to live as long as the run ({NEEDED[name]}), found that pid {pid} "
                    f"{ended(status)}; look for what ended it (where memory ran out, `dmesg` says so), then go on with "
                    f"--trainer.resume {self._run_dir}"
                )
        return None


class Head:
    """Looks now and then whether the head of a joined cluster takes connections; it may be away for a while."""

    def __init__(self, run_dir: str, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Store the run's folder and the head's address.

        Args:
            run_dir: the run's folder, to go on with.
            address: HOST:PORT of the head's GCS.
            clock: seconds.
        """
        self._run_dir, self._address, self._clock = run_dir, address, clock
        self._looked_s = self._heard_s = clock()

    def __call__(self) -> None:
        """See `Vitals.watch`."""
        if self._clock() - self._looked_s < LOOK_S:
            return
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            self._heard_s = self._clock()
        except OSError as error:
            silent_s = self._clock() - self._heard_s
            if silent_s > SILENT_S:
                raise ClusterError(
                    f"expected the head of the Ray cluster at {self._address} to live as long as the run, found that "
                    f"it took no connection for {silent_s:.0f} s ({error}); start the cluster again, then go on with "
                    f"--trainer.resume {self._run_dir}"
                ) from error
        self._looked_s = self._clock()


def ended(status: int) -> str:
    """Return in words how a process ended, given its `subprocess` return code."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"was killed by signal {-status}"


def vitals_of_ray(run_dir: str, *, here: bool) -> Callable[[], None]:
    """What to watch of Ray: the processes of one that started here, or the head of a cluster."""
    return OwnRay(run_dir) if here else Head(run_dir, ray.get_runtime_context().gcs_address)


def guarded(work: Callable[[], T], vitals: Vitals) -> T:
    """Call a function. If it fails because a watched process died, raise the error of that process instead."""
    try:
        return work()
    except Exception:
        vitals.look()
        raise
