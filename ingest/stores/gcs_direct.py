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
from .curl import Answer, CutError, Get, Outcome, PoolClosedError
from .gcs_clients import authorization, curl_pool, google_blob, google_client, object_url, pool, timeouts_s
from .gcs_errors import AbsentError, RefusalError, call, status_of
from .retry import PassingError

IN_FLIGHT = 32
"""Requests in flight a process where neither the configuration nor a probe says how many."""


# So GCS sends a compressed object as it is stored, which is what size, checksum and ranges are of.
# https://cloud.google.com/storage/docs/transcoding
AS_STORED = "Accept-Encoding: gzip"


class Ask(NamedTuple):
    """An object, or the part of it from the first to before the second byte of `span`."""

    meta: ObjectMeta
    span: tuple[int, int] | None = None


class _Read:
    """An ask on its way: what has come of a body that was cut, and of which generation it is."""

    __slots__ = ("ask", "body", "generation")

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.body = b""
        self.generation: int | None = None

    def rest(self) -> Ask:
        """What is still to be asked for, of the generation of what has come."""
        if not self.body:
            return self.ask
        meta, span = self.ask
        start, stop = span or (0, meta.size_bytes)
        return Ask(meta._replace(generation=self.generation), (start + len(self.body), stop))

    def forget(self) -> None:
        """Begin anew."""
        self.body = b""
        self.generation = None

    def kept(self, cut: CutError) -> PassingError:
        """Keep what has come, if it is known to be of one generation and from where it was asked for."""
        meta, asked = self.rest()
        generation, answer = cut.answer.generation(), cut.answer
        wanted_bytes = meta.size_bytes if asked is None else asked[1] - asked[0]
        fits = (
            generation is not None
            and meta.generation in (None, generation)
            and answer.object_bytes in (None, meta.size_bytes)
            and (answer.span == asked)
            and len(answer.body) < wanted_bytes
        )
        if not fits:
            self.forget()
            return cut
        self.generation = generation
        self.body += answer.body
        whole_bytes = meta.size_bytes if self.ask.span is None else self.ask.span[1] - self.ask.span[0]
        cut.progressed = 100 * len(answer.body) >= whole_bytes  # so that a body is continued a hundred times at most
        return cut


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
        asks = [Ask(run[0].meta, (run[0].start, run[-1].stop)) for run in runs]
        # Where the listing tells no generation the first part does, and the other parts are pinned to it.
        firsts: dict[ObjectMeta, int] = {}
        for position, ask in enumerate(asks):
            if ask.meta.generation is None:
                firsts.setdefault(ask.meta, position)
        pinned: dict[ObjectMeta, int | None] = {}
        done: dict[int, bytes | ObjectError] = {}
        if firsts:
            met: list[int | None] = [None] * len(firsts)
            done = dict(zip(firsts.values(), self._each([asks[at] for at in firsts.values()], met), strict=True))
            pinned = dict(zip(firsts, met, strict=True))
        rest = [position for position in range(len(asks)) if position not in done]
        later = [
            Ask(ask.meta._replace(generation=pinned.get(ask.meta, ask.meta.generation)), ask.span)
            for ask in (asks[position] for position in rest)
        ]
        done.update(zip(rest, self._each(later), strict=True))
        pieces: Pieces = []
        for position, run in enumerate(runs):
            body = done[position]
            pieces.extend([body] * len(run) if isinstance(body, ObjectError) else parted(run, body))
        return pieces

    def read(self, meta: ObjectMeta) -> bytes | ObjectError:
        """Read one object; an error that concerns it alone is returned.

        Raises:
            StoreError: the bucket as a whole cannot be read.
        """
        return self._each([Ask(meta)])[0]

    def _each(self, asks: Sequence[Ask], met: list[int | None] | None = None) -> Bodies:
        """All at once by libcurl; what does not come whole and right at once is then seen to one by one.

        Args:
            asks: what to read.
            met: takes the generation of each that was read; None where nobody asks.
        """
        reads = [_Read(ask) for ask in asks]
        plain = [position for position, ask in enumerate(asks) if _is_plain(self.prefix + ask.meta.name)]
        outcomes = dict(zip(plain, self._asked_by_curl([asks[position] for position in plain]), strict=True))
        given: dict[int, bytes | ObjectError] = {}
        for position, outcome in outcomes.items():
            # What is not right goes on to `_read`, as its first try.
            if isinstance(outcome, Answer):
                with contextlib.suppress(PassingError, RefusalError, ObjectError):
                    given[position] = self._checked(outcome, reads[position])
        self._read_rest([position for position in range(len(asks)) if position not in given], reads, outcomes, given)
        if met is not None:
            met[:] = [read.generation for read in reads]
        return [given[position] for position in range(len(asks))]

    def _read_rest(
        self,
        rest: Sequence[int],
        reads: Sequence[_Read],
        outcomes: dict[int, Outcome | None],
        given: dict[int, bytes | ObjectError],
    ) -> None:
        if len(rest) <= 1:
            given.update((position, self._read(reads[position], outcomes.get(position))) for position in rest)
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
                    given[position] = self._read(reads[position], outcomes.get(position))
                except StoreError as error:
                    failed.append(error)

        futures = [threads.submit(work) for _ in range(min(len(rest), in_flight))]
        for future in futures:
            future.result()
        if failed:
            raise failed[0]

    def _read(self, read: _Read, outcome: Outcome | None) -> bytes | ObjectError:
        """Read under the retry policy, whose first try gave `outcome` where that is not None."""
        meta = read.ask.meta
        key = self.prefix + meta.name
        # A token may have run out while the request waited for its turn: a 401 is asked again with a new one.
        stale_token = isinstance(outcome, Answer) and outcome.status == 401
        first = [] if outcome is None or stale_token else [outcome]

        def attempt() -> bytes:
            try:
                return self._checked(first.pop() if first else self._asked(read.rest()), read)
            except (google.api_core.exceptions.GoogleAPICallError, RefusalError) as error:
                if status_of(error) not in (404, 416):  # 416: the range begins after the end of what is there now
                    raise
                read.forget()  # what had come may be of a generation that is gone
                raise self._why_absent(meta, str(error).partition("\n")[0]) from error

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
        # Of a whole object the client compares the answer's own checksum; raw is as stored.
        body = blob.download_as_bytes(
            start=first,
            end=last,
            raw_download=True,
            retry=None,
            timeout=timeouts_s(self.config),
            checksum="crc32c" if ask.span is None else None,
        )
        return Answer(200, body, None, None)

    def _asked_by_curl(self, asks: Sequence[Ask]) -> list[Outcome | None]:
        headers = call(
            self.config,
            lambda: authorization(self.config.read_timeout_s),
            what=f"asking for a token to read gs://{self.bucket}",
            permission="storage.objects.get",
        )
        headers = (*headers, AS_STORED)
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

    def _checked(self, outcome: Outcome, read: _Read) -> bytes:
        """The body of an answer that is what was listed, and what its own headers say.

        An answer's checksum is of the whole object: a part cannot be compared with it, a whole one put together of
        parts can.

        Raises:
            PassingError: the connection failed, or the bytes are wrong.
            RefusalError: the answer is no success.
            StaleManifestError: the object is of another size or generation by now.
        """
        meta, span = read.ask
        if isinstance(outcome, CutError):
            raise read.kept(outcome)
        if isinstance(outcome, PassingError):
            raise outcome
        if outcome.status not in (200, 206):
            raise RefusalError(outcome)
        if span is None and not read.body and meta.crc32c is not None and len(outcome.body) == meta.size_bytes:
            # By far the most: bytes that match what was listed need no header.
            found = google_crc32c.value(outcome.body)
            if found == meta.crc32c:
                return outcome.body
        generation = outcome.generation()
        if meta.generation is not None and generation not in (None, meta.generation):
            raise self._stale(meta, f"generation {generation}")
        if outcome.object_bytes is not None and outcome.object_bytes != meta.size_bytes:
            read.forget()
            # The listed generation has the listed length for ever: then it is the answer that is wrong.
            if generation is not None and generation == meta.generation:
                raise PassingError(
                    "truncated", f"an answer of {outcome.object_bytes:,} bytes of {meta.size_bytes:,} that were listed"
                )
            raise self._stale(meta, f"{outcome.object_bytes:,} bytes")
        if read.body and (generation != read.generation or outcome.span is None):
            read.forget()
            raise PassingError("cut", "a body that was cut cannot be continued; it is read from the start")
        asked = read.rest().span
        if asked is not None and outcome.span not in (None, asked):
            read.forget()
            raise PassingError("truncated", f"bytes {outcome.span} instead of {asked}")
        body = read.body + outcome.body
        expected_bytes = meta.size_bytes if span is None else span[1] - span[0]
        read.forget()
        if len(body) != expected_bytes:
            raise PassingError("truncated", f"{len(body):,} of {expected_bytes:,} bytes")
        if span is None:
            for crc32c in (meta.crc32c, outcome.crc32c()):
                if crc32c is not None and google_crc32c.value(body) != crc32c:
                    raise PassingError("checksum", f"crc32c {google_crc32c.value(body):08x} instead of {crc32c:08x}")
        read.generation = generation
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
                f"expected the listed object gs://{self.bucket}/{key}, found that it is gone; upload it again"
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
            "overwritten since"
        )


def _is_plain(key: str) -> bool:
    """Whether the key may stand in a path: clients and proxies drop empty and dot segments, which GCS allows."""
    return all(segment not in ("", ".", "..") for segment in key.split("/"))


def _in_flight(config: StoreConfig) -> int:
    return config.max_in_flight or IN_FLIGHT
