"""Direct reads: one GET for each object, many at once by libcurl, pinned to the listed generation and checked."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import google.api_core.exceptions
import google_crc32c
from google.cloud import storage

from .. import gunzip
from ..errors import (
    ObjectError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PlaceNotFoundError,
    StaleManifestError,
    StoreError,
)
from .base import (
    Bodies,
    ObjectMeta,
    Pieces,
    RangeRequest,
    StoreConfig,
    is_unread,
    joined,
    parted,
    unread_encoding,
)
from .curl import Answer, CutError, Get, Outcome, PoolClosedError
from .gcs_clients import authorization, curl_pool, google_blob, google_client, object_url, pool, timeouts_s
from .gcs_errors import AbsentError, RefusalError, call, status_of
from .retry import PassingError

IN_FLIGHT = 32
"""Requests in flight per process, unless the configuration or a probe sets another number."""


# With this header GCS sends an object that is stored as gzip as it is stored, and does not decompress it. The listed
# size, the checksum and ranges are of the stored bytes. https://cloud.google.com/storage/docs/transcoding
AS_STORED = "Accept-Encoding: gzip"

READABLE_MAGICS = (b"\x93NUMPY", gunzip.MAGIC)
"""First bytes of .npy and gzip. Objects that begin with other bytes may have an encoding that is not read."""


class Ask(NamedTuple):
    """A request for an object, or for part of it.

    Attributes:
        meta: the object.
        span: bytes to read, from the first to before the second number; None reads the whole object.
    """

    meta: ObjectMeta
    span: tuple[int, int] | None = None


class _Read:
    """The state of one request over its tries.

    Attributes:
        ask: the request.
        body: the first part of a body that was cut, to be continued.
        generation: the generation of what was read; None while nothing is, or if the answers do not tell it.
    """

    __slots__ = ("ask", "body", "generation")

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.body = b""
        self.generation: int | None = None

    def rest(self) -> Ask:
        """Return the request for the bytes that are still missing, of the same generation."""
        if not self.body:
            return self.ask
        meta, span = self.ask
        start, stop = span or (0, meta.size_bytes)
        return Ask(meta._replace(generation=self.generation), (start + len(self.body), stop))

    def forget(self) -> None:
        """Drop the part that has arrived: the next try reads from the start."""
        self.body = b""
        self.generation = None

    def kept(self, cut: CutError) -> PassingError:
        """Keep the part of a body that arrived before it was cut, if the next try can continue it.

        That needs the answer to tell its generation, and to begin at the byte that was asked for. Otherwise the part is
        dropped.

        Returns:
            The error to raise. It is marked as progress if at least a hundredth of the body arrived.
        """
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
        cut.progressed = 100 * len(answer.body) >= whole_bytes  # at most 100 such tries
        return cut


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectReader:
    """Reads objects of one bucket, one request each. Thread-safe; holds plain values only, so that it pickles.

    Attributes:
        bucket: the bucket's name.
        prefix: put before every object's name; empty, or ending in ``/``.
        config: how to talk to the server.
    """

    bucket: str
    prefix: str
    config: StoreConfig

    def read_each(self, objects: Sequence[ObjectMeta]) -> list[bytes | ObjectError]:
        """Read objects, at most `max_in_flight` at a time in this process.

        Raises:
            StoreError: the bucket as a whole cannot be read; the remaining objects are not read.
        """
        return self._each([Ask(meta) for meta in objects])

    def read_ranges(self, requests: Sequence[RangeRequest]) -> Pieces:
        """Read parts of objects, as `read_each` does; one request serves parts of an object that lie close together.

        Raises:
            StoreError: the bucket as a whole cannot be read; the remaining parts are not read.
        """
        runs = joined(requests, self.config.range_gap_bytes, self.config.range_most_bytes)
        asks = [Ask(run[0].meta, (run[0].start, run[-1].stop)) for run in runs]
        # If the listing has no generation, the answer to the first part tells it, and the other parts are pinned to it.
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
        """Read one object; return, not raise, an error that concerns this object alone.

        Raises:
            StoreError: the bucket as a whole cannot be read.
        """
        return self._each([Ask(meta)])[0]

    def _each(self, asks: Sequence[Ask], met: list[int | None] | None = None) -> Bodies:
        """Send all requests at once, and retry those that fail one by one.

        Args:
            asks: the requests.
            met: if given, receives the generation of each object that was read.
        """
        reads = [_Read(ask) for ask in asks]
        plain = [position for position, ask in enumerate(asks) if _is_plain(self.prefix + ask.meta.name)]
        outcomes = dict(zip(plain, self._asked_by_curl([asks[position] for position in plain]), strict=True))
        given: dict[int, bytes | ObjectError] = {}
        for position, outcome in outcomes.items():
            # An answer that is not right is the first try of `_read` below.
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
            # All workers share one iterator over a list: taking the next item is atomic.
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
        """Read under the retry policy. If `outcome` is given, it is the result of the first try."""
        meta = read.ask.meta
        key = self.prefix + meta.name
        # A token may expire while a request waits for its turn, so a first 401 is asked again with a new token.
        stale_token = isinstance(outcome, Answer) and outcome.status == 401
        first = [] if outcome is None or stale_token else [outcome]

        def attempt() -> bytes:
            try:
                return self._checked(first.pop() if first else self._asked(read.rest()), read)
            except (google.api_core.exceptions.GoogleAPICallError, RefusalError) as error:
                if status_of(error) not in (404, 416):  # 416: the range begins after the end of what is there now
                    raise
                read.forget()  # the part that arrived may be of a generation that is gone
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
            assert outcome is not None  # a batch of one request is always sent
            return outcome
        blob = google_blob(self.config, self.bucket, key, ask.meta.generation)
        first, last = (None, None) if ask.span is None else (ask.span[0], ask.span[1] - 1)
        # raw_download gives the stored bytes. The client checks a whole object against the answer's own checksum.
        body = blob.download_as_bytes(
            start=first,
            end=last,
            raw_download=True,
            retry=None,
            timeout=timeouts_s(self.config),
            checksum="crc32c" if ask.span is None else None,
        )
        head = f"\ncontent-encoding: {blob.content_encoding}\n" if blob.content_encoding else ""
        return Answer(200, body, None, None, head=head.encode())

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
        """Return the body of an answer, after checking it against the listing and against the answer's own headers.

        An answer's checksum is of the whole object. So a part of an object cannot be checked against it, but a whole
        object that was put together from parts can.

        Raises:
            PassingError: the connection failed, or the bytes are wrong.
            RefusalError: the status is not one of success.
            StaleManifestError: the object is of another size or generation by now.
            EncodingError: the object is stored with an encoding that is not read.
        """
        meta, span = read.ask
        if isinstance(outcome, CutError):
            raise read.kept(outcome)
        if isinstance(outcome, PassingError):
            raise outcome
        if outcome.status not in (200, 206):
            raise RefusalError(outcome)
        encoding = meta.content_encoding
        if not outcome.body.startswith(READABLE_MAGICS):  # parsing the headers of every answer costs a tenth of a GET
            encoding = outcome.content_encoding() or encoding
        if encoding is not None and is_unread(encoding):
            raise unread_encoding(f"gs://{self.bucket}/{self.prefix}{meta.name}", encoding)
        if span is None and not read.body and meta.crc32c is not None and len(outcome.body) == meta.size_bytes:
            # Most answers end here: bytes that match the listed checksum need no further header.
            found = google_crc32c.value(outcome.body)
            if found == meta.crc32c:
                return outcome.body
        generation = outcome.generation()
        if meta.generation is not None and generation not in (None, meta.generation):
            raise self._stale(meta, f"generation {generation}")
        if outcome.object_bytes is not None and outcome.object_bytes != meta.size_bytes:
            read.forget()
            # A generation never changes its length, so an answer of the listed generation with another length is wrong.
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
        """Return the error for a 404: the object is gone, or was overwritten, or is there and the 404 may pass.

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
        """Return the object as the bucket lists it now; None if it is gone.

        The bucket is listed, because the answer to a request for the object itself is what is in doubt.
        """
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
            # An account may be allowed to read but not to list: then ask for the object's own metadata.
            return call(
                self.config,
                lambda: google_client(self.config).bucket(self.bucket).get_blob(key, retry=None, timeout=timeout),
                what=f"asking for gs://{self.bucket}/{key}",
                permission="storage.objects.get",
            )
        # In byte order of names an object comes before all others whose names begin with its name.
        return found[0] if found and found[0].name == key else None

    def _stale(self, meta: ObjectMeta, found: str) -> StaleManifestError:
        listed = f"{meta.size_bytes:,} bytes, generation {meta.generation or 'unknown'}"
        return StaleManifestError(
            f"expected gs://{self.bucket}/{self.prefix}{meta.name} as listed ({listed}), found {found}; it was "
            "overwritten since"
        )


def _is_plain(key: str) -> bool:
    """Return whether a key may stand in a URL's path.

    GCS allows empty segments and segments of dots in keys. Clients and proxies drop them from paths.
    """
    return all(segment not in ("", ".", "..") for segment in key.split("/"))


def _in_flight(config: StoreConfig) -> int:
    return config.max_in_flight or IN_FLIGHT
