"""Direct reads: one GET an object by libcurl, many at once, pinned to the listed generation and checked."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import google.api_core.exceptions
import google_crc32c
from google.cloud import storage

from ..errors import (
    ObjectError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PlaceNotFoundError,
    StaleManifestError,
    StoreError,
)
from .base import Bodies, ObjectMeta, Pieces, RangeRequest, StoreConfig, joined, parted
from .curl import Answer, Get, Outcome, PoolClosedError
from .gcs_clients import authorization, curl_pool, google_blob, google_client, object_url, pool, timeouts_s
from .gcs_errors import AbsentError, RefusalError, call, status_of
from .retry import PassingError

IN_FLIGHT = 32
"""Requests in flight a process where neither the configuration nor a probe says how many."""


class Ask(NamedTuple):
    """An object, or the part of it from the first to before the second byte of `span`."""

    meta: ObjectMeta
    span: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectReader:
    """Reads objects of one bucket, one request each. Thread-safe; plain values only.

    Attributes:
        prefix: what stands before every object's name: empty, or ending in ``/``.
    """

    bucket: str
    prefix: str
    config: StoreConfig

    def read_each(self, objects: Sequence[ObjectMeta]) -> list[bytes | ObjectError]:
        """Read objects, at most `max_in_flight` at a time in this process.

        Raises:
            StoreError: the bucket as a whole cannot be read; what was still to do is left.
        """
        return self._each([Ask(meta) for meta in objects])

    def read_ranges(self, requests: Sequence[RangeRequest]) -> Pieces:
        """Read parts of objects; near ones by one request, and else as `read_each`.

        Raises:
            StoreError: the bucket as a whole cannot be read; what was still to do is left.
        """
        runs = joined(requests, self.config.range_gap_bytes, self.config.range_most_bytes)
        bodies = self._each([Ask(run[0].meta, (run[0].start, run[-1].stop)) for run in runs])
        pieces: Pieces = []
        for run, body in zip(runs, bodies, strict=True):
            pieces.extend([body] * len(run) if isinstance(body, ObjectError) else parted(run, body))
        return pieces

    def read(self, meta: ObjectMeta) -> bytes | ObjectError:
        """Read one object; an error that concerns it alone is returned.

        Raises:
            StoreError: the bucket as a whole cannot be read.
        """
        return self._each([Ask(meta)])[0]

    def _each(self, asks: Sequence[Ask]) -> Bodies:
        """All at once by libcurl; what does not come whole and right at once is then seen to one by one."""
        plain = [position for position, ask in enumerate(asks) if _is_plain(self.prefix + ask.meta.name)]
        outcomes = dict(zip(plain, self._asked_by_curl([asks[position] for position in plain]), strict=True))
        given: dict[int, bytes | ObjectError] = {}
        for position, outcome in outcomes.items():
            # What is not right goes on to `_read`, as its first try.
            with contextlib.suppress(PassingError, RefusalError, ObjectError):
                if outcome is not None:
                    given[position] = self._checked(outcome, asks[position])
        self._read_rest([position for position in range(len(asks)) if position not in given], asks, outcomes, given)
        return [given[position] for position in range(len(asks))]

    def _read_rest(
        self,
        rest: Sequence[int],
        asks: Sequence[Ask],
        outcomes: dict[int, Outcome | None],
        given: dict[int, bytes | ObjectError],
    ) -> None:
        if len(rest) <= 1:
            given.update((position, self._read(asks[position], outcomes.get(position))) for position in rest)
            return
        in_flight = _in_flight(self.config)
        threads = pool("direct", in_flight)
        todo = iter(rest)
        failed: list[StoreError] = []

        def work() -> None:
            # One iterator for all workers: taking the next of a list is atomic.
            for position in todo:
                if failed:
                    return
                try:
                    given[position] = self._read(asks[position], outcomes.get(position))
                except StoreError as error:
                    failed.append(error)

        futures = [threads.submit(work) for _ in range(min(len(rest), in_flight))]
        for future in futures:
            future.result()
        if failed:
            raise failed[0]

    def _read(self, ask: Ask, outcome: Outcome | None) -> bytes | ObjectError:
        """Read under the retry policy, whose first try gave `outcome` where that is not None."""
        key = self.prefix + ask.meta.name
        # A token may have run out while the request waited for its turn: a 401 is asked again with a new one.
        stale_token = isinstance(outcome, Answer) and outcome.status == 401
        first = [] if outcome is None or stale_token else [outcome]

        def attempt() -> bytes:
            try:
                return self._checked(first.pop() if first else self._asked(ask), ask)
            except (google.api_core.exceptions.GoogleAPICallError, RefusalError) as error:
                if status_of(error) not in (404, 416):  # 416: the range begins after the end of what is there now
                    raise
                raise self._why_absent(ask.meta, str(error).partition("\n")[0]) from error

        try:
            return call(
                self.config, attempt, what=f"reading gs://{self.bucket}/{key}", permission="storage.objects.get"
            )
        except ObjectError as error:
            return error

    def _asked(self, ask: Ask) -> Outcome:
        key = self.prefix + ask.meta.name
        if _is_plain(key):
            (outcome,) = self._asked_by_curl([ask])
            assert outcome is not None  # none is left out of one
            return outcome
        blob = google_blob(self.config, self.bucket, key, ask.meta.generation)
        first, last = (None, None) if ask.span is None else (ask.span[0], ask.span[1] - 1)
        timeout = timeouts_s(self.config)
        body = blob.download_as_bytes(start=first, end=last, retry=None, timeout=timeout, checksum=None)
        return Answer(200, body, None, None)

    def _asked_by_curl(self, asks: Sequence[Ask]) -> list[Outcome | None]:
        headers = call(
            self.config,
            lambda: authorization(self.config.read_timeout_s),
            what=f"asking for a token to read gs://{self.bucket}",
            permission="storage.objects.get",
        )
        gets = [
            Get(
                url=object_url(self.bucket, self.prefix + meta.name, meta.generation),
                expected_bytes=meta.size_bytes if span is None else span[1] - span[0],
                headers=headers,
                span=span,
            )
            for meta, span in asks
        ]
        try:
            return curl_pool(self.config, _in_flight(self.config)).get(gets)
        except PoolClosedError as error:
            return [PassingError("reset", str(error)) for _ in gets]

    def _checked(self, outcome: Outcome, ask: Ask) -> bytes:
        """The body of an answer that is what was listed.

        Raises:
            PassingError: the connection failed, or the bytes are wrong.
            RefusalError: the answer is no success.
            StaleManifestError: the object is of another size by now.
        """
        meta, span = ask
        if isinstance(outcome, PassingError):
            raise outcome
        if outcome.status not in (200, 206):
            raise RefusalError(outcome)
        if outcome.object_bytes is not None and outcome.object_bytes != meta.size_bytes:
            raise self._stale(meta, f"{outcome.object_bytes:,} bytes")
        if span is not None and outcome.span not in (None, span):
            raise PassingError("truncated", f"bytes {outcome.span} instead of {span}")
        body = outcome.body
        expected_bytes = meta.size_bytes if span is None else span[1] - span[0]
        if len(body) != expected_bytes:
            raise PassingError("truncated", f"{len(body):,} of {expected_bytes:,} bytes")
        if span is None and meta.crc32c is not None and google_crc32c.value(body) != meta.crc32c:
            raise PassingError("checksum", f"crc32c {google_crc32c.value(body):08x} instead of {meta.crc32c:08x}")
        return body

    def _why_absent(self, meta: ObjectMeta, detail: str) -> ObjectError | PassingError:
        """After a 404: whether the object is gone, was overwritten, or is there as listed, so that the 404 may pass.

        Raises:
            PlaceNotFoundError: the bucket itself does not exist.
            StoreError: the bucket cannot be asked.
        """
        key = self.prefix + meta.name
        now = self._now(key)
        if now is None:
            return ObjectNotFoundError(
                f"expected the listed object gs://{self.bucket}/{key}, found that it is gone; upload it again or list "
                f"anew"
            )
        if now.size == meta.size_bytes and meta.generation in (None, now.generation):
            return PassingError("absent", f"a 404 for an object that the bucket lists ({detail})")
        return self._stale(meta, f"{now.size:,} bytes, generation {now.generation}")

    def _now(self, key: str) -> storage.Blob | None:
        """The object as the bucket lists it now, since a 404 on its own name is what is in doubt; None if gone."""
        timeout = timeouts_s(self.config)
        try:
            found = call(
                self.config,
                lambda: list(
                    google_client(self.config).list_blobs(
                        self.bucket, prefix=key, max_results=1, retry=None, timeout=timeout
                    )
                ),
                what=f"listing gs://{self.bucket}/{key}",
                permission="storage.objects.list",
            )
        except AbsentError as error:
            raise PlaceNotFoundError(
                f"expected the bucket gs://{self.bucket}, found that it does not exist; check its name"
            ) from error
        except PermissionDeniedError:
            # Reading may be allowed where listing is not: then the object's own metadata has to tell.
            return call(
                self.config,
                lambda: google_client(self.config).bucket(self.bucket).get_blob(key, retry=None, timeout=timeout),
                what=f"asking for gs://{self.bucket}/{key}",
                permission="storage.objects.get",
            )
        # In byte order of names the object itself comes before all that its name begins.
        return found[0] if found and found[0].name == key else None

    def _stale(self, meta: ObjectMeta, found: str) -> StaleManifestError:
        listed = f"{meta.size_bytes:,} bytes, generation {meta.generation or 'unknown'}"
        return StaleManifestError(
            f"expected gs://{self.bucket}/{self.prefix}{meta.name} as listed ({listed}), found {found}; it was "
            f"overwritten since: list anew"
        )


def _is_plain(key: str) -> bool:
    """Whether the key may stand in a path: clients and proxies drop empty and dot segments, which GCS allows."""
    return all(segment not in ("", ".", "..") for segment in key.split("/"))


def _in_flight(config: StoreConfig) -> int:
    return config.max_in_flight or IN_FLIGHT
