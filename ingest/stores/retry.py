"""The one retry policy of every store call: exponential back-off with full jitter, under one deadline."""

from __future__ import annotations

import collections
import logging
import math
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity
import tenacity.wait

from ..errors import CorruptObjectError, UnreachableError
from .base import StoreConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")

PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_GIVEN_UP_S: dict[str, float] = {}  # when a call last gave up on a server that takes no connection, by its name
_CORRUPT_KINDS = frozenset({"truncated", "checksum"})


class PassingError(Exception):
    """A failure that may pass by trying again; never leaves the stores.

    Attributes:
        kind: ``refused``, ``reset``, ``timeout``, ``cut`` (the connection ended within a body), ``truncated`` (a whole
            answer of the wrong length), ``checksum``, ``absent`` (a 404 for what is there), ``token`` (the server that
            renews credentials failed) or ``status-NNN``.
        detail: what the server or library said.
        retry_after_s: the wait the server asked for, None where it said nothing.
        progressed: whether this try brought a good part of what was asked for, from where the next one goes on.
    """

    progressed = False

    def __init__(self, kind: str, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(kind, detail, retry_after_s)
        self.kind = kind
        self.detail = detail
        self.retry_after_s = retry_after_s


class RefusedError(UnreachableError):
    """Every try found no server that takes connections: nothing was done, in any try."""


class KindCounts:
    """Counts what this process met, by kind. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, kind: str) -> None:
        """Note one."""
        with self._lock:
            self._counts[kind] += 1

    def snapshot(self) -> dict[str, int]:
        """The counts so far, since the process started."""
        with self._lock:
            return dict(self._counts)


RETRIES = KindCounts()
COMPOSITES = KindCounts()  # of one kind, `composed`


class _Wait(tenacity.wait.wait_base):
    """Full jitter, or what the server asked for when that is longer."""

    def __init__(self, config: StoreConfig) -> None:
        self._first_s = config.retry_first_s
        self._jitter = tenacity.wait_random_exponential(multiplier=config.retry_first_s, max=config.retry_longest_s)

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        error = _error_of(retry_state)
        if error and error.progressed:
            return random.uniform(0, self._first_s)
        return max(self._jitter(retry_state), (error and error.retry_after_s) or 0.0)


class _Stop:
    """The deadline, with shorter bounds for what does not pass by waiting."""

    def __init__(self, config: StoreConfig, tries: int | None, before_s: float) -> None:
        self._config = config
        self._tries = tries
        self._before_s = before_s
        self.only_refused = True
        self._corrupt = 0
        self._progress_s = 0.0

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        error = _error_of(retry_state)
        kind = error.kind if error else ""
        self.only_refused = self.only_refused and kind == "refused"
        self._corrupt += kind in _CORRUPT_KINDS
        deadline_s = self._config.retry_deadline_s
        spent_s = self._before_s + (retry_state.seconds_since_start or 0.0)
        if error and error.progressed:
            self._progress_s = spent_s
        waited_s = spent_s - self._progress_s + retry_state.upcoming_sleep
        if self.only_refused:
            # One call waits for the server to come up; those queued behind it need not each wait again.
            given_up_s = _GIVEN_UP_S.get(error.detail if error else "", -math.inf)
            if time.monotonic() - given_up_s < self._config.retry_refused_s:
                return True
            return waited_s >= min(deadline_s, self._config.retry_refused_s)
        return (
            waited_s >= deadline_s
            or self._corrupt >= self._config.retry_corrupt_tries
            or (self._tries is not None and retry_state.attempt_number >= self._tries)
        )


def _error_of(retry_state: tenacity.RetryCallState) -> PassingError | None:
    error = retry_state.outcome.exception() if retry_state.outcome else None
    return error if isinstance(error, PassingError) else None


def _note(retry_state: tenacity.RetryCallState) -> None:
    error = _error_of(retry_state)
    if error:
        RETRIES.add(error.kind)
        logger.debug(
            "try %d failed (%s: %s); the next in %.2f s",
            retry_state.attempt_number,
            error.kind,
            error.detail,
            retry_state.upcoming_sleep,
        )


def with_retries(config: StoreConfig, attempt: Callable[[], T], *, what: str, tries: int | None = None) -> T:
    """Call `attempt` until it returns or fails in a way that does not pass.

    Args:
        config: its ``retry_*`` fields are the policy.
        attempt: one try; raises `PassingError` for what may be tried again, anything else ends the call.
        what: the call in words with its object's full URI, for messages: ``reading gs://b/x``.
        tries: at most so many, where giving up early has a remedy; None goes by the deadline alone.

    Raises:
        CorruptObjectError: the bytes were wrong in every try up to the bound.
        RefusedError: no server took a connection.
        UnreachableError: the deadline came.
    """
    started = time.monotonic()
    try:
        return attempt()  # by far most calls end here: the machinery below costs a tenth of a small read
    except PassingError as error:
        first = [error]

    def again() -> T:
        if first:
            raise first.pop()
        return attempt()

    stop = _Stop(config, tries, time.monotonic() - started)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(PassingError),
        wait=_Wait(config),
        stop=stop,
        before_sleep=_note,
        reraise=True,
    )
    try:
        return retrying(again)
    except PassingError as error:
        count = int(retrying.statistics.get("attempt_number", 1))
        tried = f"{count} tries" if count > 1 else "1 try"
        if error.kind in _CORRUPT_KINDS:
            raise CorruptObjectError(
                f"{what}: expected bytes that match the listing, found otherwise in {tried}, at last {error.detail}; "
                "write the object again"
            ) from error
        if stop.only_refused:
            _GIVEN_UP_S[error.detail] = time.monotonic()
            raise RefusedError(
                f"{what}: expected a server that answers, found none in {tried}: {error.detail}; check that it runs "
                f"and that its address is right (STORAGE_EMULATOR_HOST, or the network to storage.googleapis.com)"
            ) from error
        raise UnreachableError(
            f"{what}: expected an answer within {config.retry_deadline_s:g} s, found a failure in {tried}, at last "
            f"{error.detail}; {_advice(error.kind)}"
        ) from error


def _advice(kind: str) -> str:
    if kind == "timeout":
        return "if the server may be silent for longer, raise read_timeout_s, and retry_deadline_s above it"
    if kind == "token":
        return "check that the server that renews the credentials is up, or raise retry_deadline_s"
    return "try again later, lower the requests in flight, or raise retry_deadline_s"
