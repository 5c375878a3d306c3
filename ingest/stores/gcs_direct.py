"""Direct reads: one GET an object by obstore on a thread pool, pinned to the listed generation and checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import google.api_core.exceptions
import google_crc32c
import obstore
from google.cloud import storage

from ..errors import (
    ObjectError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PlaceNotFoundError,
    StaleManifestError,
    StoreError,
)
from .base import ObjectMeta, Pieces, RangeRequest, StoreConfig, joined, parted
from .gcs_clients import google_blob, google_client, obstore_client, pool, timeouts_s
from .gcs_errors import AbsentError, call, status_of
from .retry import PassingError

Asked = TypeVar("Asked")
Given = TypeVar("Given")
Span = tuple[int, int] | None  # the first byte and the one after the last; None for all
Get = Callable[[str, ObjectMeta, Span], tuple[bytes | memoryview, int | None]]


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
        return self._each(objects, self.read)

    def read_ranges(self, requests: Sequence[RangeRequest]) -> Pieces:
        """Read parts of objects; near ones by one request, and else as `read_each`.

        Raises:
            StoreError: the bucket as a whole cannot be read; what was still to do is left.
        """
        runs = joined(requests, self.config.range_gap_bytes, self.config.range_most_bytes)
        return [piece for pieces in self._each(runs, self._read_run) for piece in pieces]

    def _each(self, asked: Sequence[Asked], read: Callable[[Asked], Given]) -> list[Given]:
        if len(asked) == 1:
            return [read(asked[0])]
        given: dict[int, Given] = {}
        positions = iter(range(len(asked)))
        in_flight = self.config.max_in_flight or 32
        workers = min(len(asked), in_flight)
        threads = pool("direct", in_flight)
        failed: list[StoreError] = []

        def work(mine: Iterator[int]) -> None:
            # One iterator for all workers: taking the next of a range is atomic.
            for position in mine:
                if failed:
                    return
                try:
                    given[position] = read(asked[position])
                except StoreError as error:
                    failed.append(error)

        futures = [threads.submit(work, positions) for _ in range(workers)]
        for future in futures:
            future.result()
        if failed:
            raise failed[0]
        return [given[position] for position in range(len(asked))]

    def read(self, meta: ObjectMeta) -> bytes | ObjectError:
        """Read one object; an error that concerns it alone is returned.

        Raises:
            StoreError: the bucket as a whole cannot be read.
        """
        body = self._read(meta, None)
        return bytes(body) if isinstance(body, memoryview) else body

    def _read_run(self, run: Sequence[RangeRequest]) -> Pieces:
        body = self._read(run[0].meta, (run[0].start, run[-1].stop))
        return [body] * len(run) if isinstance(body, ObjectError) else parted(run, body)

    def _read(self, meta: ObjectMeta, span: Span) -> bytes | memoryview | ObjectError:
        key = self.prefix + meta.name
        get = self._get_by_obstore if _is_plain(key) else self._get_by_google
        try:
            return call(
                self.config,
                functools.partial(self._checked, get, key, meta, span),
                what=f"reading gs://{self.bucket}/{key}",
                permission="storage.objects.get",
            )
        except ObjectError as error:
            return error

    def _checked(self, get: Get, key: str, meta: ObjectMeta, span: Span) -> bytes | memoryview:
        try:
            body, size_now = get(key, meta, span)
        except (OSError, google.api_core.exceptions.GoogleAPICallError, obstore.exceptions.BaseError) as error:
            if status_of(error) not in (404, 416):  # 416: the range begins after the end of what is there now
                raise
            raise self._why_absent(meta, str(error).partition("\n")[0]) from error
        if size_now is not None and size_now != meta.size_bytes:
            raise self._stale(meta, f"{size_now:,} bytes")
        expected_bytes = meta.size_bytes if span is None else span[1] - span[0]
        if len(body) != expected_bytes:
            raise PassingError("truncated", f"{len(body):,} of {expected_bytes:,} bytes")
        if span is None and meta.crc32c is not None and google_crc32c.value(body) != meta.crc32c:
            raise PassingError("checksum", f"crc32c {google_crc32c.value(body):08x} instead of {meta.crc32c:08x}")
        return body

    def _get_by_obstore(self, key: str, meta: ObjectMeta, span: Span) -> tuple[bytes | memoryview, int | None]:
        options: obstore.GetOptions = {} if meta.generation is None else {"version": str(meta.generation)}
        if span is not None:
            options["range"] = span
        answer = obstore.get(obstore_client(self.bucket, self.config), key, options=options)
        body = answer.bytes()
        return memoryview(body) if span is not None else bytes(body), answer.meta["size"]

    def _get_by_google(self, key: str, meta: ObjectMeta, span: Span) -> tuple[bytes | memoryview, int | None]:
        blob = google_blob(self.config, self.bucket, key, meta.generation)
        first, last = (None, None) if span is None else (span[0], span[1] - 1)
        timeout = timeouts_s(self.config)
        return blob.download_as_bytes(start=first, end=last, retry=None, timeout=timeout, checksum=None), None

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
    """Whether obstore takes the key: it refuses empty and dot segments, which GCS allows."""
    return all(segment not in ("", ".", "..") for segment in key.split("/"))
