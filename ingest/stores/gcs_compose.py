"""Composed reads: up to 32 small objects in one GET, by Dataflux, checked object by object.

Dataflux plans, composes, cuts and deletes. It is given a storage client of ours that serves one chunk: every
request goes through our retry policy, sources are pinned to their generations, and the composite's name is known,
so that it is deleted also where Dataflux would leave it. Any doubt about a chunk sends that chunk to direct reads.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import threading
from collections.abc import Sequence

import google_crc32c

from ..errors import ObjectError, PermissionDeniedError, StoreError
from .base import ObjectMeta, StoreConfig
from .dataflux import COMPOSED_PREFIX, composite_prefix
from .gcs_clients import google_blob, pool, timeouts_s
from .gcs_direct import READABLE_MAGICS, DirectReader
from .gcs_errors import AbsentError, call
from .retry import COMPOSITES, RETRIES, RefusedError

logger = logging.getLogger(__name__)

OBJECTS_PER_COMPOSITE = 32  # the most that GCS composes in one request
_CLEANUP_TRIES = 8


class _DoubtError(Exception):
    """A composed read whose bytes cannot be trusted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComposeReader:
    """Reads objects of one bucket through composites. Thread-safe; plain values only.

    Attributes:
        direct: reads what cannot or should not be composed.
    """

    direct: DirectReader

    def read_each(self, objects: Sequence[ObjectMeta]) -> list[bytes | ObjectError]:
        """Read objects, up to `compose_in_flight` composites at a time in this process.

        Raises:
            StoreError: the bucket as a whole cannot be read.
        """
        config = self.direct.config
        small: list[int] = []
        single: list[int] = []
        for position, meta in enumerate(objects):
            # Of objects stored with an encoding the parts of a composite have none, and it is read as if it had none.
            composable = 0 < meta.size_bytes <= config.compose_max_bytes // 2 and meta.content_encoding is None
            (small if composable else single).append(position)
        chunks = _chunks(small, objects, config.compose_max_bytes)
        single += [chunk[0] for chunk in chunks if len(chunk) == 1]
        chunks = [chunk for chunk in chunks if len(chunk) > 1]
        threads = pool("compose", config.compose_in_flight)
        futures = [threads.submit(self._read_chunk, [objects[position] for position in chunk]) for chunk in chunks]
        bodies: dict[int, bytes | ObjectError] = {}
        try:
            if single:
                bodies.update(
                    zip(
                        single,
                        self.direct.read_each([objects[position] for position in single]),
                        strict=True,
                    )
                )
            for chunk, future in zip(chunks, futures, strict=True):
                bodies.update(zip(chunk, future.result(), strict=True))
        finally:
            for future in futures:
                future.cancel()
        return [bodies[position] for position in range(len(objects))]

    def _read_chunk(self, chunk: list[ObjectMeta]) -> list[bytes | ObjectError]:
        bucket = self.direct.bucket
        if compose_refusal(bucket) is not None:
            return self.direct.read_each(chunk)
        try:
            bodies = self.read_composed(chunk)
        except RefusedError:
            raise  # there is no server to read from directly either
        except PermissionDeniedError as error:
            _refuse_compose(bucket, str(error))
        except (_DoubtError, StoreError) as error:
            RETRIES.add("compose-fallback")
            logger.info(
                "a composed read of %d objects of gs://%s, first %s, is done again by direct reads: %s",
                len(chunk),
                bucket,
                chunk[0].name,
                error,
            )
        else:
            return self._with_encodings(chunk, bodies)
        return self.direct.read_each(chunk)

    def _with_encodings(self, chunk: list[ObjectMeta], bodies: Sequence[bytes]) -> list[bytes | ObjectError]:
        """Read those objects again, each by itself, whose bytes are neither .npy nor gzip.

        Such an object may be stored with another encoding. Its own headers tell the encoding, and so does a listing; a
        composite's headers and a manifest do not.
        """
        found: list[bytes | ObjectError] = list(bodies)
        odd = [
            position
            for position, (meta, body) in enumerate(zip(chunk, bodies, strict=True))
            if meta.name.endswith(".npy") and not body.startswith(READABLE_MAGICS)
        ]
        for position, body in zip(odd, self.direct.read_each([chunk[position] for position in odd]), strict=True):
            found[position] = body
        return found

    def read_composed(self, chunk: Sequence[ObjectMeta]) -> list[bytes]:
        """Read 2 to 32 objects through one composite, or fail; leaves no composite where it can be deleted.

        Raises:
            StoreError: a request failed for good, or too often.
        """
        from dataflux_core.download import DataFluxDownloadOptimizationParams, dataflux_download

        direct = self.direct
        client = _ChunkClient(direct, {direct.prefix + meta.name: meta for meta in chunk})
        try:
            bodies = dataflux_download(
                project_name=direct.config.project or "",
                bucket_name=direct.bucket,
                objects=[(direct.prefix + meta.name, meta.size_bytes) for meta in chunk],
                storage_client=client,
                # Its cap is tested before an object is added; the chunk is cut already, so all of it is one.
                dataflux_download_optimization_params=DataFluxDownloadOptimizationParams(
                    sum(meta.size_bytes for meta in chunk)
                ),
                threading_enabled=True,  # otherwise it takes over SIGINT
                retry_config=None,
            )
        finally:
            client.clean_up()
        _check(chunk, bodies)
        return [bytes(body) for body in bodies]

    def probe(self, pair: Sequence[ObjectMeta]) -> None:
        """Show by two objects that composing, reading and deleting work.

        Raises:
            StoreError: they do not; the message says which.
        """
        try:
            self.read_composed(pair)
        except _DoubtError as error:
            raise StoreError(str(error)) from error
        refusal = compose_refusal(self.direct.bucket)
        if refusal:
            raise StoreError(refusal)


class _ChunkClient:
    """What Dataflux takes for its storage client and its bucket, for one chunk in one thread."""

    _connection = None  # Dataflux would add its user agent here; ours has it already

    def __init__(self, direct: DirectReader, sources: dict[str, ObjectMeta]) -> None:
        self.direct = direct
        self.sources = sources
        self.total_bytes = sum(meta.size_bytes for meta in sources.values())
        self.verified = all(meta.crc32c is not None for meta in sources.values())
        self.composites: set[str] = set()

    def bucket(self, _name: str) -> _ChunkClient:
        return self

    def blob(self, name: str) -> _ChunkBlob:
        """A blob of that name; a composite goes by the run's id too."""
        if name not in self.sources:
            name = composite_prefix(self.direct.config.run_id) + name.removeprefix(COMPOSED_PREFIX)
        return _ChunkBlob(self, name)

    def clean_up(self) -> None:
        """Delete every composite of this chunk that is not known to be gone."""
        for name in sorted(self.composites):
            _delete_composite(self.direct.bucket, name, self.direct.config)


class _ChunkBlob:
    """What Dataflux takes for a blob: a source of the chunk, or its composite."""

    def __init__(self, client: _ChunkClient, name: str) -> None:
        self.name = name
        self._client = client
        self._bucket = client.direct.bucket
        self._config = client.direct.config
        self._uri = f"gs://{self._bucket}/{name}"

    def compose(self, sources: Sequence[_ChunkBlob], retry: object = None) -> None:  # noqa: ARG002  Dataflux passes it
        """Make the composite of these generations of the sources."""
        client = self._client
        sent = 0

        def send() -> None:
            nonlocal sent
            sent += 1
            google_blob(self._config, self._bucket, self.name).compose(
                [
                    google_blob(self._config, self._bucket, name, client.sources[name].generation)
                    for name in (source.name for source in sources)
                ],
                retry=None,
                timeout=timeouts_s(self._config),
            )

        client.composites.add(self.name)
        try:
            call(
                self._config,
                send,
                what=f"composing {len(sources)} objects into {self._uri}",
                permission="storage.objects.create",
                tries=self._config.compose_tries,
            )
        except (AbsentError, PermissionDeniedError, RefusedError) as error:
            if sent == 1 or isinstance(error, RefusedError):
                client.composites.discard(self.name)  # it never came to be; an earlier try's answer may have been lost
            raise
        COMPOSITES.add("composed")

    def download_as_bytes(self, retry: object = None) -> bytes:  # noqa: ARG002  Dataflux passes it
        """Read the composite whole; verified here only where its parts cannot be."""
        client = self._client
        body = call(
            self._config,
            lambda: google_blob(self._config, self._bucket, self.name).download_as_bytes(
                retry=None, timeout=timeouts_s(self._config), checksum=None if client.verified else "auto"
            ),
            what=f"reading {self._uri}",
            permission="storage.objects.get",
            tries=self._config.compose_tries,
        )
        if len(body) != client.total_bytes:
            raise _DoubtError(f"expected {client.total_bytes:,} bytes in the composite, found {len(body):,}")
        return bytes(body)

    def delete(self, retry: object = None) -> None:  # noqa: ARG002  Dataflux passes it
        """Delete the composite; a failure is kept for `sweep_leftovers`, and never raised."""
        self._client.clean_up()
        self._client.composites.clear()


def _chunks(positions: Sequence[int], objects: Sequence[ObjectMeta], chunk_bytes: int) -> list[list[int]]:
    chunks: list[list[int]] = []
    size = 0
    names: set[str] = set()
    for position in positions:
        meta = objects[position]
        full = bool(chunks) and (
            len(chunks[-1]) == OBJECTS_PER_COMPOSITE or size + meta.size_bytes > chunk_bytes or meta.name in names
        )
        if full or not chunks:
            chunks.append([])
            size = 0
            names = set()
        chunks[-1].append(position)
        names.add(meta.name)
        size += meta.size_bytes
    return chunks


def _check(chunk: Sequence[ObjectMeta], bodies: Sequence[bytes]) -> None:
    if len(bodies) != len(chunk):
        raise _DoubtError(f"expected {len(chunk)} objects back, found {len(bodies)}")
    for meta, body in zip(chunk, bodies, strict=True):
        if len(body) != meta.size_bytes:
            raise _DoubtError(f"expected {meta.size_bytes:,} bytes of {meta.name}, found {len(body):,}")
        if meta.crc32c is not None:
            if google_crc32c.value(body) != meta.crc32c:
                raise _DoubtError(f"the checksum of {meta.name} does not match its listing")
        elif meta.name.endswith(".npy") and not body.startswith(READABLE_MAGICS):
            raise _DoubtError(f"{meta.name} does not begin as an .npy file does")


_LOCK = threading.Lock()
_REFUSALS: dict[tuple[int, str], str] = {}
_LEFTOVERS: dict[tuple[str, str], StoreConfig] = {}


def compose_refusal(bucket: str) -> str | None:
    """Why this process no longer composes in the bucket; None while it may."""
    return _REFUSALS.get((os.getpid(), bucket))


def _refuse_compose(bucket: str, reason: str) -> None:
    with _LOCK:
        first = (os.getpid(), bucket) not in _REFUSALS
        _REFUSALS.setdefault((os.getpid(), bucket), reason)
    if first:
        logger.warning(
            "gs://%s is read directly from now on, since composed reads need storage.objects.create and "
            "storage.objects.delete on the bucket: %s",
            bucket,
            reason,
        )


def leftovers() -> list[str]:
    """URIs of this process's composites that could not be deleted yet."""
    with _LOCK:
        return [f"gs://{bucket}/{name}" for bucket, name in _LEFTOVERS]


def sweep_leftovers() -> None:
    """Try once more to delete what could not be deleted."""
    with _LOCK:
        left = dict(_LEFTOVERS)
    for (bucket, name), config in left.items():
        _delete_composite(bucket, name, config, tries=2)


def _delete_composite(bucket: str, name: str, config: StoreConfig, tries: int = _CLEANUP_TRIES) -> None:
    try:
        call(
            config,
            lambda: google_blob(config, bucket, name).delete(retry=None, timeout=timeouts_s(config)),
            what=f"deleting the composite gs://{bucket}/{name}",
            permission="storage.objects.delete",
            tries=tries,
        )
    except AbsentError:
        pass  # gone already: an earlier try arrived, or it was never made
    except StoreError as error:
        with _LOCK:
            known = (bucket, name) in _LEFTOVERS
            _LEFTOVERS[bucket, name] = config
        if not known:
            logger.warning(
                "%s; it is tried again at the end of the process, and `voxflux clean gs://%s` removes it too",
                error,
                bucket,
            )
        if isinstance(error, PermissionDeniedError):
            _refuse_compose(bucket, str(error))
        return
    with _LOCK:
        _LEFTOVERS.pop((bucket, name), None)


atexit.register(sweep_leftovers)
