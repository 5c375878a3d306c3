"""The lease of a run folder: one run at a time writes into it.

`lease.json` names the holder: host, pid, start. The holder renews it every 10 s, on the condition that the object is
still of the generation that the holder wrote last, so no lease of another run is overwritten. Another run takes the
folder over if the lease has not changed for 60 s. It measures them by its own clock, from its first look at the lease,
because the clocks of two machines may differ. A holder on the same machine is known by its process: a dead one is not
waited for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from ray.train import Checkpoint, UserCallback

from ingest.errors import ConfigError, IngestError, ObjectError, PlaceNotFoundError, PreconditionError, StoreError
from ingest.stores import Store, StoreConfig, open_store

logger = logging.getLogger(__name__)

LEASE_FILE = "lease.json"
RENEW_S = 10.0
RETRY_S = 1.0  # after a renewal that failed
GIVE_UP_S = 45.0  # without a renewal; the rest of STALE_S is for saving
STALE_S = 60.0
LOOK_S = 2.0  # between two looks at the lease of another run
LOOKS = 5

LEASE_STORE = StoreConfig(connect_timeout_s=5.0, read_timeout_s=10.0, retry_deadline_s=10.0)
"""Of the lease's store: a renewal that fails must return well before GIVE_UP_S."""


class LeaseLostError(IngestError):
    """The run does not hold its folder any more, so it ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a run folder.

    Attributes:
        holder: a random id of this start of a run.
        host: its name.
        pid: of the driver.
        started: when the lease was taken, ISO 8601, UTC. Shown to people; nothing is decided by it.
        machine: the host's boot and pid namespace, within which a pid means one process; empty where unknown.
        process_start: when the process started, in clock ticks since the boot, because pids are used again.
        renewals: how often the lease was renewed, so that the bytes of two writes differ.
    """

    holder: str = ""
    host: str = "an unknown host"
    pid: int = 0
    started: str = "an unknown time"
    machine: str = ""
    process_start: str = ""
    renewals: int = 0

    @classmethod
    def here(cls, pid: int | None = None) -> Holder:
        """A process of this machine; None takes this process."""
        pid = os.getpid() if pid is None else pid
        return cls(
            holder=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=pid,
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=_machine(),
            process_start=_process_start(pid),
        )

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Holder:
        """Reads what `to_bytes` wrote; anything else is a holder of whom nothing is known."""
        try:
            found = cls(**json.loads(data))
            return dataclasses.replace(found, pid=int(found.pid), renewals=int(found.renewals))
        except (ValueError, TypeError):
            return cls()

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, started {self.started}"


def is_alive(holder: Holder) -> bool | None:
    """Whether a holder's process is alive; None if that cannot be known from here.

    It is None for another machine, and for this process itself, whose earlier run may have failed to release.
    """
    if not holder.machine or holder.machine != _machine():
        return None
    if _process_start(holder.pid) != holder.process_start:
        return False
    return None if holder.pid == os.getpid() else True


class Found(NamedTuple):
    """A lease as it was read."""

    generation: int
    holder: Holder


class Lease:
    """This run's hold of its folder. Thread-safe.

    Attributes:
        holder: this run.
        lost: why the lease could not be kept; None while it is held.
    """

    def __init__(self, store: Store, found: Found, clock: Callable[[], float], begun_s: float) -> None:
        """Made by `take`.

        Args:
            store: of the run folder.
            found: what was written.
            clock: seconds on this machine that never go back.
            begun_s: what it said before the write.
        """
        self.holder = found.holder
        self.lost: str | None = None
        self._store, self._generation = store, found.generation
        self._clock, self._renewed_s = clock, begun_s
        self._ask: Callable[[str], None] | None = None
        self._released = False
        self._lock = threading.Lock()

    def renew(self) -> bool:
        """Write the lease anew.

        A failing store does not lose the lease before GIVE_UP_S have passed since the last renewal.

        Returns:
            Whether it was written. `lost` says whether to go on trying.
        """
        with self._lock:
            if self._released or self.lost is not None:
                return False
            begun_s = self._clock()
            following = dataclasses.replace(self.holder, renewals=self.holder.renewals + 1)
            try:
                try:
                    self._generation = self._store.put(LEASE_FILE, following.to_bytes(), self._generation)
                except PreconditionError:
                    self._look_again()
                    return False
            except StoreError as error:
                silent_s = self._clock() - self._renewed_s
                if silent_s >= GIVE_UP_S:
                    self._lose(f"it could not be renewed for {silent_s:.0f} s: {error}")
                return False
            self.holder, self._renewed_s = following, begun_s
            return True

    def _look_again(self) -> None:
        """An earlier renewal may have been written although its answer was an error: then the lease is ours still."""
        found = read_lease(self._store)
        if found is not None and found.holder.holder == self.holder.holder:
            self._generation, self.holder = found
        else:
            self._lose(_whose(found))

    def _lose(self, why: str) -> None:
        self.lost = why
        if self._ask is not None:
            self._ask(why)

    @contextlib.contextmanager
    def on_loss(self, ask: Callable[[str], None]) -> Iterator[None]:
        """Call `ask` with the reason if the lease is lost meanwhile: once, on another thread.

        Raises:
            LeaseLostError: it is lost already.
        """
        with self._lock:
            self.require()
            self._ask = ask
        try:
            yield
        finally:
            with self._lock:
                self._ask = None

    def require(self) -> None:
        """Raise if the lease is lost.

        Raises:
            LeaseLostError: it is.
        """
        if self.lost is not None:
            raise _lost_error(self._store.uri, self.lost)

    def release(self) -> None:
        """Delete the lease if it is ours still; a store that fails leaves it to become stale."""
        self.renew()  # finds out whether it is ours
        with self._lock:
            if self._released or self.lost is not None:
                return
            self._released = True
            try:
                self._store.delete(LEASE_FILE, self._generation)
            except StoreError as error:
                logger.warning("the lease is left in the run folder, and is stale after %.0f s: %s", STALE_S, error)


def take(
    store: Store,
    *,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
    alive: Callable[[Holder], bool | None] = is_alive,
) -> Lease:
    """Take a run folder that no other run uses.

    Args:
        store: of the run folder; a local one is made where there is none.
        say: is told why this waits.
        clock: seconds on this machine that never go back.
        wait: sleeps for some seconds.
        alive: whether a holder is alive; None has its lease watched for up to STALE_S.

    Raises:
        ConfigError: another run holds the folder.
        StoreError: the folder cannot be read or written.
    """
    watched: Found | None = None
    since_s = clock()
    while True:
        found = read_lease(store)
        life = None if found is None else alive(found.holder)
        stale = watched is not None and found == watched and clock() - since_s >= STALE_S
        if found is None or life is False or stale:
            mine, begun_s = Holder.here(), clock()
            try:
                generation = store.put(LEASE_FILE, mine.to_bytes(), found.generation if found else 0)
            except PreconditionError:
                continue  # another run was faster: the next look says which
            return Lease(store, Found(generation, mine), clock, begun_s)
        if life or (watched is not None and found != watched):
            raise ConfigError(
                f"expected that no run uses the run folder {store.uri_of('')}, found one that does: {found.holder}; "
                "wait until it ends, or stop it by `kill -TERM` of that pid on that host, which lets it save, or begin "
                "another run with another --run-dir"
            )
        if watched is None:
            watched, since_s = found, clock()
            say(
                f"the run folder has a lease of {found.holder}, who may be alive; waiting up to {STALE_S:.0f} s for "
                "its renewal. Without one, this run takes the folder over"
            )
        wait(LOOK_S)


def read_lease(store: Store) -> Found | None:
    """The lease as it is now; None where there is none.

    Raises:
        StoreError: the place cannot be read, or the lease changes at every look.
    """
    for _ in range(LOOKS):
        try:
            entry = next((entry for entry in store.list(LEASE_FILE) if entry.name == LEASE_FILE), None)
            if entry is None:
                return None
            (body,) = store.fetch([entry])
        except PlaceNotFoundError:
            return None
        except ObjectError:
            continue  # renewed or released between the listing and the read
        if entry.generation is None:
            raise StoreError(f"expected a generation of {store.uri_of(LEASE_FILE)} in the listing, found none")
        return Found(entry.generation, Holder.from_bytes(body))
    raise StoreError(
        f"expected to read {store.uri_of(LEASE_FILE)}, found another one at each of {LOOKS} looks; several runs want "
        "this folder: give each of them its own --run-dir"
    )


@contextlib.contextmanager
def held(run_dir: str, say: Callable[[str], None], *, renew_s: float = RENEW_S) -> Iterator[Lease]:
    """Hold a run folder: take its lease, renew it in the background, and release it at the end.

    Args:
        run_dir: the run's folder or gs:// place.
        say: is told why this waits.
        renew_s: between two renewals.

    Raises:
        ConfigError: another run holds the folder.
        StoreError: the folder cannot be read or written.
        LeaseLostError: at the end, if the lease was lost meanwhile.
    """
    lease = take(open_store(run_dir, LEASE_STORE), say=say)
    done = threading.Event()

    def keep() -> None:
        wait_s = renew_s
        while not done.wait(wait_s) and lease.lost is None:
            wait_s = renew_s if lease.renew() else RETRY_S

    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    except Exception as error:
        if lease.lost is None or isinstance(error, LeaseLostError):
            raise
        raise _lost_error(run_dir, f"{lease.lost}; the run then failed: {error}") from error
    finally:
        done.set()
        lease.release()
        thread.join()
    lease.require()


class LeaseGuard(UserCallback):
    """Ends a run whose folder another run has taken over, before its controller names a checkpoint there.

    The driver renews the lease. The controller is another process, which may live on for a while without its driver.

    Args:
        run_dir: the run's folder or gs:// place.
        holder: the id of the run's own lease.
    """

    def __init__(self, run_dir: str, holder: str) -> None:
        self._run_dir, self._holder = run_dir, holder

    def after_report(
        self,
        run_context: Any,  # noqa: ARG002  the signature is Ray's
        metrics: list[dict[str, Any]],  # noqa: ARG002
        checkpoint: Checkpoint | None,  # noqa: ARG002
    ) -> None:
        """Raise if the lease is another run's; Ray then ends the run, without a restart.

        Raises:
            LeaseLostError: it is.
        """
        require_held(open_store(self._run_dir, LEASE_STORE), self._holder)


def require_held(store: Store, holder: str) -> None:
    """Raise if a run folder is known to be no longer held.

    Args:
        store: of the folder.
        holder: the id that its lease must have.

    Raises:
        LeaseLostError: the lease is another's, or gone.
    """
    try:
        found = read_lease(store)
    except StoreError as error:
        # Nobody else is known to hold the folder. The renewals find out whether its place stays silent.
        logger.warning("could not read the lease of the run: %s", error)
        return
    if found is None or found.holder.holder != holder:
        raise _lost_error(store.uri, _whose(found))


def _whose(found: Found | None) -> str:
    return "it was deleted" if found is None else f"it was taken over by {found.holder}"


def _lost_error(place: str, why: str) -> LeaseLostError:
    return LeaseLostError(
        f"expected to hold the run folder {place} until the end of the run, found its lease lost: {why}; see that no "
        "other run uses the folder, then go on by --trainer.resume"
    )


def _machine() -> str:
    """This machine's boot id and this process's pid namespace; empty where the system has neither."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115  it is no path
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """When a process started, in clock ticks since the boot; empty for none, or one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
