"""Google Cloud Storage: listed by google-cloud-storage, read by Dataflux (composed) or libcurl (direct)."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import google.api_core.exceptions
import google_crc32c
from google.cloud import storage

from ..errors import (
    ConfigError,
    ListingError,
    MissingDependencyError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PlaceNotFoundError,
)
from . import dataflux
from .base import BaseStore, Bodies, ObjectMeta, Pieces, RangeRequest, StoreConfig, precondition_failed
from .fast_listing import fast_list_objects
from .gcs_clients import google_blob, google_client, timeouts_s
from .gcs_compose import ComposeReader
from .gcs_direct import DirectReader
from .gcs_errors import AbsentError, call
from .gcs_listing import list_ranges, probe_points
from .gcs_probe import Settled, settle

logger = logging.getLogger(__name__)

_FIELDS = "items(name,size,generation,crc32c,storageClass,contentEncoding),nextPageToken"
_LISTING_THREADS = 10  # connections that google-cloud-storage's client keeps open

Listed = list[ObjectMeta]
Page = tuple[Listed, str | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BucketFacts:
    """What a bucket's server tells of it; a field is None where it does not.

    Attributes:
        soft_delete_s: seconds for which deleted objects, composites among them, are kept and billed; 0 is off.
        retention_s: seconds for which no object may be deleted; 0 is none.
    """

    location: str | None = None
    storage_class: str | None = None
    soft_delete_s: int | None = None
    versioning: bool | None = None
    retention_s: int | None = None
    unknown_because: str | None = None

    def keeps_composites(self) -> str | None:
        """Why a deleted composite would be kept and billed; None when it would not, or is not known."""
        if self.retention_s:
            return f"a retention policy of {self.retention_s / 86400:g} days forbids deleting composites"
        if self.versioning:
            return "object versioning would keep every composite"
        if self.soft_delete_s:
            return f"soft delete would keep, and bill, every composite for {self.soft_delete_s / 86400:g} days"
        return None


class GCSStore(BaseStore):
    """A prefix of a bucket. Thread-safe; pickles as its URI and configuration.

    Clients and thread pools belong to the process, and are made by the first request.
    """

    def __init__(self, uri: str, config: StoreConfig | None = None) -> None:
        """Note the place; touches no network.

        Args:
            uri: ``gs://bucket`` or ``gs://bucket/folder``, taken literally: nothing is percent-decoded.
            config: how to talk to the server.

        Raises:
            ConfigError: the URI names no bucket.
            MissingDependencyError: the transport is `compose`, and Dataflux is not installed.
        """
        bucket, _, prefix = uri.removeprefix("gs://").partition("/")
        if not uri.startswith("gs://") or not bucket:
            raise ConfigError(f"expected gs://bucket or gs://bucket/folder, found {uri!r}; name the bucket")
        prefix = prefix.rstrip("/")
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"gs://{bucket}/{self.prefix}"
        self.config = config or StoreConfig()
        if self.config.transport == "compose" and (reason := dataflux.missing()) is not None:
            raise MissingDependencyError(
                f"expected Dataflux for the transport `compose`, found that {reason}; give --data.store.transport auto "
                "or direct, or run on Python 3.10 to 3.12"
            )

    def __repr__(self) -> str:
        return f"GCSStore({self.uri!r}, transport={self.config.transport!r})"

    def list(self, prefix: str = "") -> Iterator[ObjectMeta]:
        """See `Lists.list`; a page at a time. Folder objects and Dataflux's composites are left out."""
        token: str | None = None
        while True:
            page, token = self.list_page(prefix, token=token)
            yield from page
            if not token:
                return

    def list_page(
        self,
        prefix: str = "",
        *,
        token: str | None = None,
        start: str | None = None,
        end: str | None = None,
        limit: int | None = None,
    ) -> Page:
        """One page of a plain listing, in byte order of names.

        Args:
            prefix: of names, relative to the URI.
            token: where the page before ended; None begins.
            start: the first name to list, relative to the URI.
            end: the name before which to end, relative to the URI; None is no end.
            limit: objects of the page; None takes `list_page_size`.

        Returns:
            The page, and the token of the next; None after the last.

        Raises:
            PlaceNotFoundError: the bucket does not exist.
            CredentialsError, PermissionDeniedError, UnreachableError: as named.
        """

        def get_page() -> tuple[Sequence[storage.Blob], str | None]:
            blobs = google_client(self.config).list_blobs(
                self.bucket,
                prefix=self.prefix + prefix or None,
                page_size=limit or self.config.list_page_size,
                page_token=token,
                start_offset=None if start is None else self.prefix + start,
                end_offset=None if end is None else self.prefix + end,
                fields=_FIELDS,
                retry=None,
                timeout=timeouts_s(self.config),
            )
            return list(next(blobs.pages, ())), blobs.next_page_token

        try:
            blobs, next_token = call(
                self.config, get_page, what=f"listing {self.uri}", permission="storage.objects.list"
            )
        except AbsentError as error:
            raise self._no_bucket() from error
        return [self._meta(blob) for blob in blobs if not _is_no_data(blob.name)], next_token

    def list_rest(self, listed: Listed, found: Callable[[int], None]) -> Listed:
        """Every object of the place, given the first ones: plain listings of ranges of names, in parallel.

        Every object has the same fields as in a plain listing.

        Args:
            listed: the first objects, in byte order of names.
            found: told how many objects are known.

        Raises:
            PlaceNotFoundError, CredentialsError, PermissionDeniedError, UnreachableError: as for `list`.
        """
        start = listed[-1].name
        ranges = 4 * self.config.fast_listing_processes
        before = listed[:-1]
        rest = list_ranges(
            self._list_range,
            start,
            self._split_points(start, ranges),
            min(self.config.fast_listing_processes, _LISTING_THREADS),
            lambda count: found(len(before) + count),
        )
        return before + rest

    def _split_points(self, start: str, wanted: int) -> Sequence[str]:
        """Names that cut those from `start` on into about equal parts: of Dataflux's listing, else by probing."""
        config = self.config
        if (reason := dataflux.missing()) is not None:
            logger.info("%s: probing finds the split points of the listing: %s", self.uri, reason)
            return probe_points(start, self._first_name, wanted=wanted)
        try:
            fast = fast_list_objects(
                bucket=self.bucket,
                prefix=self.prefix,
                project=config.project,
                processes=config.fast_listing_processes,
                timeout_s=config.fast_listing_timeout_s,
            )
            names = sorted(name for key in fast.sizes if (name := key[len(self.prefix) :]) > start)
            why = "it found no name beyond those listed already"
        except ListingError as error:
            names, why = [], str(error)
        if names:
            logger.info("%s: split points are of Dataflux's listing of %s names", self.uri, f"{len(names):,}")
            return names[:: max(1, len(names) // wanted)]
        logger.warning(
            "%s: probing takes over from Dataflux's listing as the source of split points: %s", self.uri, why
        )
        return probe_points(start, self._first_name, wanted=wanted)

    def _list_range(self, start: str, end: str | None) -> Listed:
        objects, token = self.list_page(start=start, end=end)
        while token:
            page, token = self.list_page(start=start, end=end, token=token)
            objects.extend(page)
        return objects

    def _first_name(self, start: str, end: str | None) -> str | None:
        objects, token = self.list_page(start=start, end=end, limit=1)
        if not objects and token:  # a folder object or a composite
            objects, _ = self.list_page(start=start, end=end, token=token)
        return objects[0].name if objects else None

    def _meta(self, blob: storage.Blob) -> ObjectMeta:
        return ObjectMeta(
            name=blob.name[len(self.prefix) :],
            size_bytes=int(blob.size or 0),
            generation=int(blob.generation) if blob.generation is not None else None,
            crc32c=int.from_bytes(base64.b64decode(blob.crc32c), "big") if blob.crc32c else None,
            storage_class=blob.storage_class,
            content_encoding=blob.content_encoding or None,
        )

    def fetch_each(self, objects: Sequence[ObjectMeta]) -> Bodies:
        """See `Fetches.fetch_each`. With the transport `auto` the first call of a process resolves it."""
        if not objects:
            return []
        if self.config.transport == "auto":
            return self._settled_here(objects).fetch_each(objects)
        if self.config.transport == "compose":
            return ComposeReader(direct=self._direct()).read_each(objects)
        return self._direct().read_each(objects)

    def fetch_ranges(self, requests: Sequence[RangeRequest]) -> Pieces:
        """See `FetchesRanges.fetch_ranges`: by direct reads whatever the transport, since no composite helps here."""
        return self._direct().read_ranges(requests)

    def put(self, name: str, data: bytes, if_generation: int | None = None) -> int:
        """See `Puts.put`; the server checks the upload's crc32c."""
        self._check_name(name)
        tries = itertools.count()

        def upload() -> int:
            blob = google_blob(self.config, self.bucket, self.prefix + name)
            again = next(tries) > 0
            try:
                blob.upload_from_string(
                    data,
                    content_type="application/octet-stream",
                    checksum="crc32c",
                    if_generation_match=if_generation,
                    retry=None,
                    timeout=timeouts_s(self.config),
                )
            except google.api_core.exceptions.PreconditionFailed as error:
                held = self._held(name) if again else None  # an earlier try may have written it, its answer lost
                if held is not None and (held.size, held.crc32c) == (len(data), _crc32c_of(data)):
                    return int(held.generation)
                raise precondition_failed(self.uri_of(name), if_generation or 0, "another") from error
            return int(blob.generation)

        what = f"writing {self.uri_of(name)}"
        try:
            return call(self.config, upload, what=what, permission="storage.objects.create")
        except AbsentError as error:
            raise self._no_bucket() from error

    def delete(self, name: str, if_generation: int | None = None) -> None:
        """See `Deletes.delete`; an object that is gone when the request is tried again counts as deleted."""
        self._check_name(name)
        tries = itertools.count()

        def remove() -> None:
            again = next(tries) > 0
            try:
                google_blob(self.config, self.bucket, self.prefix + name).delete(
                    if_generation_match=if_generation, retry=None, timeout=timeouts_s(self.config)
                )
            except google.api_core.exceptions.NotFound:
                if not again:
                    raise
            except google.api_core.exceptions.PreconditionFailed as error:
                if again and self._held(name) is None:
                    return
                raise precondition_failed(self.uri_of(name), if_generation or 0, "another") from error

        what = f"deleting {self.uri_of(name)}"
        try:
            call(self.config, remove, what=what, permission="storage.objects.delete")
        except AbsentError as error:
            self.list_page(name, limit=1)  # raises where the bucket is missing
            raise ObjectNotFoundError(
                f"expected the object {self.uri_of(name)} to delete, found none; it is gone already"
            ) from error

    def _held(self, name: str) -> storage.Blob | None:
        """The metadata of the object as the server has it now; None where there is no such object."""
        blob = google_blob(self.config, self.bucket, self.prefix + name)
        try:
            blob.reload(retry=None, timeout=timeouts_s(self.config))
        except google.api_core.exceptions.NotFound:
            return None
        return blob

    def _check_name(self, name: str) -> None:
        if not name:
            raise ConfigError(f"expected a name of an object below {self.uri}, found an empty one")

    def bucket_facts(self) -> BucketFacts:
        """Ask the server for the bucket's settings; without storage.buckets.get they stay unknown.

        Raises:
            PlaceNotFoundError: the bucket does not exist.
        """
        try:
            bucket = call(
                self.config,
                lambda: google_client(self.config).get_bucket(self.bucket, retry=None, timeout=timeouts_s(self.config)),
                what=f"asking for the settings of gs://{self.bucket}",
                permission="storage.buckets.get",
            )
        except AbsentError as error:
            raise self._no_bucket() from error
        except PermissionDeniedError:
            return BucketFacts(unknown_because="the account lacks storage.buckets.get")
        soft_delete = bucket.soft_delete_policy.retention_duration_seconds
        return BucketFacts(
            location=bucket.location,
            storage_class=bucket.storage_class,
            soft_delete_s=int(soft_delete or 0),
            versioning=bool(bucket.versioning_enabled),
            retention_s=int(bucket.retention_period or 0),
        )

    def settle(self, objects: Sequence[ObjectMeta]) -> Settled:
        """How to read these objects, or those that they are a sample of.

        Raises:
            StoreError: the bucket cannot be read at all.
        """
        return settle(self._direct(), objects, self.bucket_facts)

    def _settled_here(self, objects: Sequence[ObjectMeta]) -> GCSStore:
        key = (os.getpid(), self.uri, self.config)
        with _SETTLED_LOCK:
            if key not in _SETTLED:
                found = self.settle(objects)
                logger.info("%s is read by transport %s: %s", self.uri, found.transport, found.reason)
                config = dataclasses.replace(self.config, transport=found.transport, max_in_flight=found.max_in_flight)
                _SETTLED[key] = GCSStore(self.uri, config)
            return _SETTLED[key]

    def _direct(self) -> DirectReader:
        return DirectReader(bucket=self.bucket, prefix=self.prefix, config=self.config)

    def _no_bucket(self) -> PlaceNotFoundError:
        return PlaceNotFoundError(
            f"expected the bucket gs://{self.bucket}, found that it does not exist; check its name and project, or "
            f"make it, e.g. by `gcloud storage buckets create gs://{self.bucket}`"
        )


_SETTLED: dict[tuple[int, str, StoreConfig], GCSStore] = {}
_SETTLED_LOCK = threading.Lock()


def _crc32c_of(data: bytes) -> str:
    """As the server writes it."""
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def _is_no_data(key: str) -> bool:
    return key.endswith("/") or dataflux.is_composite(key)
