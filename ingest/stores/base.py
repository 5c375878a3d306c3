"""What a store is: a place, named by a URI, that lists, fetches and puts whole objects."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple, Protocol, TypeAlias
from urllib.parse import urlsplit

import tyro

from ..errors import ConfigError, EncodingError, ObjectError, PreconditionError, UnknownSchemeError

Transport = Literal["auto", "compose", "direct"]


class ObjectMeta(NamedTuple):
    """What a listing says of one object.

    Attributes:
        name: relative to the store's URI, ``/``-separated.
        size_bytes: the object's length.
        generation: changes whenever the object is overwritten (GCS: its generation; local files: mtime in
            ns); None where the listing carried none.
        crc32c: of the whole object, as an unsigned 32-bit number; None where the listing carried none.
        storage_class: as the store names it; None where there is no such thing.
        content_encoding: what the object is stored with, such as ``gzip``; size and checksum are of the stored bytes,
            and those are what a fetch returns. None where there is none, or where it is not known.
    """

    name: str
    size_bytes: int
    generation: int | None = None
    crc32c: int | None = None
    storage_class: str | None = None
    content_encoding: str | None = None


_UNREAD_ENCODINGS = frozenset({"br", "compress", "dcb", "dcz", "deflate", "x-compress", "zstd"})
"""All encodings of https://www.iana.org/assignments/http-parameters that compress, except gzip."""


def is_unread(content_encoding: str | None) -> bool:
    """Return whether an object with this Content-Encoding is not read: it compresses, and is not gzip.

    A value that names no compression, such as `utf-8` by mistake, makes no difference.
    """
    if content_encoding is None:
        return False
    return any(token.strip().lower() in _UNREAD_ENCODINGS for token in content_encoding.split(","))


def unread_encoding(uri: str, content_encoding: str) -> EncodingError:
    """Return the error of an object that is stored with an encoding that is not read, for every store."""
    return EncodingError(
        f"expected {uri} to be stored uncompressed or as gzip, found it stored with Content-Encoding "
        f"{content_encoding}, which is not read; decompress it and upload it anew"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class RangeRequest:
    """Some bytes of one object: from `start` to before `stop`."""

    meta: ObjectMeta
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.meta.size_bytes:
            raise ConfigError(
                f"expected a range of at least one byte within the {self.meta.size_bytes:,} of {self.meta.name}, found "
                f"{self.start:,} to {self.stop:,}; list anew if the object has grown"
            )


class Lists(Protocol):
    """Can say what it holds."""

    @property
    def uri(self) -> str:
        """The place's URI, ending in ``/``."""

    def list(self, prefix: str = "") -> Iterator[ObjectMeta]:
        """Yield every object under `prefix`, in byte order of names.

        Raises:
            PlaceNotFoundError: the bucket or folder does not exist.
            CredentialsError, PermissionDeniedError, UnreachableError: as named.
        """


class Fetches(Protocol):
    """Can hand back the bytes of listed objects."""

    @property
    def uri(self) -> str:
        """The place's URI, ending in ``/``."""

    def fetch_each(self, objects: Sequence[ObjectMeta]) -> list[bytes | ObjectError]:
        """Fetch whole objects, each checked against its listed size, generation and crc32c.

        Returns:
            One entry an object, in the order asked: its bytes, or the error that concerns it alone.

        Raises:
            StoreError: the place as a whole cannot be read (credentials, permission, network).
        """

    def fetch(self, objects: Sequence[ObjectMeta]) -> list[bytes]:
        """As `fetch_each`, but the first `ObjectError` is raised."""


class FetchesRanges(Protocol):
    """Can hand back parts of listed objects."""

    @property
    def uri(self) -> str:
        """The place's URI, ending in ``/``."""

    def fetch_ranges(self, requests: Sequence[RangeRequest]) -> list[bytes | memoryview | ObjectError]:
        """Fetch parts of objects, each of the listed generation and of the length asked for.

        A checksum is of a whole object: no part can be checked against it. So ask only for objects whose generation
        is known, and have what was read looked at. Neighbouring requests of one object, in ascending order, may be
        served by one read that goes on through the gap between them.

        Returns:
            One entry a request, in the order asked: its bytes, or the error that concerns its object alone.

        Raises:
            StoreError: the place as a whole cannot be read (credentials, permission, network).
        """


class Puts(Protocol):
    """Can keep an object."""

    def put(self, name: str, data: bytes, if_generation: int | None = None) -> int:
        """Write one object whole or not at all, replacing any of that name.

        A conditional write whose answer is lost is tried again. The object then holds these bytes already, and the
        write counts as done. So bytes that two writers may write at once must differ, e.g. by a random id.

        Args:
            name: relative to the store's URI.
            data: the object's bytes.
            if_generation: write only if the object is of this generation now; 0 if there must be no such object; None
                writes always.

        Returns:
            The generation of the object that was written.

        Raises:
            PreconditionError: the object is of another generation, or exists where it must not.
        """


class Deletes(Protocol):
    """Can delete an object."""

    def delete(self, name: str, if_generation: int | None = None) -> None:
        """Delete one object.

        Args:
            name: relative to the store's URI.
            if_generation: delete only if the object is of this generation now; None deletes any.

        Raises:
            ObjectNotFoundError: there is no such object.
            PreconditionError: the object is of another generation.
        """


class Store(Lists, Fetches, FetchesRanges, Puts, Deletes, Protocol):
    """A place. Pickles as plain configuration; clients are made lazily, once a process. Thread-safe."""

    def uri_of(self, name: str) -> str:
        """The full URI of one object, for messages."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """How stores talk to their servers. Stores that have no such thing ignore a field."""

    transport: Annotated[Transport, tyro.conf.arg(aliases=("--transport",))] = "auto"
    """GCS: `compose` (Dataflux, many small objects in one GET; needs create and delete permission, and Python 3.12 or
    older), `direct` (concurrent GETs), or `auto`: compose where the bucket allows it and a probe shows it faster."""

    project: str | None = None
    """GCS: the project for client calls; None takes the one of the credentials."""

    max_in_flight: int | None = None
    """Requests in flight a process for direct reads; None follows the latency of the bucket, from 32 to 128."""

    compose_in_flight: int = 8
    """Composed reads in flight a process; each holds up to `compose_max_bytes`."""

    compose_max_bytes: int = 32 * 2**20
    """Bytes a composite may hold (Dataflux's own default is 100 MB)."""

    connect_timeout_s: float = 10.0
    """Time to open one connection."""

    read_timeout_s: float = 60.0
    """Time for which one request may be silent: no byte of its answer has come. A body may take any time as long as
    it comes; one that is cut is continued from where it ended."""

    retry_deadline_s: float = 120.0
    """Time after which a call that keeps failing in a passing way (408, 429, 5xx, resets) is given up. It counts from
    the last try that brought at least a hundredth of the body, where a body is continued."""

    retry_first_s: float = 0.25
    """Upper bound of the first wait between tries; each wait is uniform from 0 to its bound (full jitter)."""

    retry_longest_s: float = 20.0
    """The bound doubles from try to try up to this."""

    retry_refused_s: float = 10.0
    """Time after which a server that has refused every connection so far is given up: a closed port or a wrong
    host does not pass by waiting."""

    retry_corrupt_tries: int = 5
    """Reads of one object after which bytes that do not match their length or checksum are given up."""

    range_gap_bytes: int = 2**20
    """GCS: parts of an object with at most so many bytes between them are read by one request."""

    range_most_bytes: int = 16 * 2**20
    """GCS: bytes of one such request at the most; several at a time are faster than one long one."""

    compose_tries: int = 3
    """GCS: tries of each request of a composed read, after which its objects are read directly instead."""

    run_id: str = ""
    """GCS: composites are named by it, so that the end of a run sweeps its own and no other's; empty leaves it out."""

    list_page_size: int = 5000
    """GCS: objects a listing's page; the server gives no more than 5,000."""

    fast_listing_above: int = 100_000
    """GCS: a prefix with more objects than this is listed in parallel, by ranges of names."""

    fast_listing_processes: int = 16
    """GCS: processes of Dataflux's listing, which finds the split points, and ranges listed at a time (at most 10)."""

    fast_listing_timeout_s: float = 900.0
    """GCS: time after which Dataflux's listing is ended, and probing finds the split points."""

    def __post_init__(self) -> None:
        if self.transport not in ("auto", "compose", "direct"):
            raise ConfigError(f"transport must be auto, compose or direct; got {self.transport!r}")
        if not re.fullmatch(r"[A-Za-z0-9_-]{0,64}", self.run_id):
            raise ConfigError(
                f"run_id must be at most 64 letters, digits, - and _, since it is part of names; got {self.run_id!r}"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value <= 0:
                raise ConfigError(f"{field.name} must be above 0; got {value}")


Bodies: TypeAlias = list[bytes | ObjectError]
"""What `fetch_each` returns; named here, since a class with a method `list` cannot say it."""
Pieces: TypeAlias = list[bytes | memoryview | ObjectError]
"""What `fetch_ranges` returns."""


def joined(requests: Sequence[RangeRequest], gap_bytes: int, most_bytes: int) -> list[Sequence[RangeRequest]]:
    """Cut requests into runs that one read serves each: of one object, ascending, with small gaps.

    Args:
        requests: to cut; their order is kept.
        gap_bytes: a gap between two requests that is at most so large is read through.
        most_bytes: of one read; a request that is larger is a run of its own.
    """
    runs: list[Sequence[RangeRequest]] = []
    start = 0
    for number in range(1, len(requests) + 1):
        if number < len(requests):
            before, here = requests[number - 1], requests[number]
            if (
                here.meta == before.meta
                and 0 <= here.start - before.stop <= gap_bytes
                and here.stop - requests[start].start <= most_bytes
            ):
                continue
        runs.append(requests[start:number])
        start = number
    return runs


def parted(run: Sequence[RangeRequest], body: bytes | memoryview) -> Pieces:
    """What each request of a run gets of the bytes that its one read gave."""
    if len(run) == 1:
        return [body]
    view, first = memoryview(body), run[0].start
    return [view[request.start - first : request.stop - first] for request in run]


def precondition_failed(uri: str, generation: int, found: str) -> PreconditionError:
    """The error of a conditional write or delete, for every store.

    Args:
        uri: of the object.
        generation: that was required; 0 is no object.
        found: in words.
    """
    wanted = f"generation {generation} of {uri}" if generation else f"no object at {uri}"
    return PreconditionError(f"expected {wanted}, found {found}; somebody else wrote it: read it anew, then decide")


class BaseStore:
    """The part that every store shares: `fetch` out of `fetch_each`, and URIs of objects."""

    uri: str

    def uri_of(self, name: str) -> str:
        """The full URI of one object, for messages."""
        return self.uri + name

    def fetch_each(self, objects: Sequence[ObjectMeta]) -> list[bytes | ObjectError]:
        """See `Fetches.fetch_each`."""
        raise NotImplementedError

    def fetch_ranges(self, requests: Sequence[RangeRequest]) -> list[bytes | memoryview | ObjectError]:
        """See `FetchesRanges.fetch_ranges`; here by whole reads, for stores that know no ranges."""
        objects = list({request.meta: None for request in requests})
        whole = dict(zip(objects, self.fetch_each(objects), strict=True))
        pieces: Pieces = []
        for request in requests:
            body = whole[request.meta]
            pieces.append(body if isinstance(body, ObjectError) else memoryview(body)[request.start : request.stop])
        return pieces

    def fetch(self, objects: Sequence[ObjectMeta]) -> list[bytes]:
        """As `fetch_each`, but the first `ObjectError` is raised."""
        bodies: list[bytes] = []
        for body in self.fetch_each(objects):
            if isinstance(body, ObjectError):
                raise body
            bodies.append(body)
        return bodies


def open_store(uri: str, config: StoreConfig | None = None) -> Store:
    """Open the place that `uri` names: ``gs://bucket/prefix``, ``file:///folder`` or a plain path.

    A prefix is a folder: ``gs://b/x`` holds ``gs://b/x/1.npy`` and never ``gs://b/xyz.npy``. Opening makes
    no client and touches no network.

    Raises:
        UnknownSchemeError: no store serves the URI's scheme.
        ConfigError: the URI names no bucket or folder.
    """
    config = config or StoreConfig()
    if not uri:
        raise ConfigError("expected a URI such as gs://bucket/prefix or ./folder; got an empty one")
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme == "gs":
        from .gcs import GCSStore

        return GCSStore(uri, config)
    if scheme in ("", "file"):
        from .local import LocalStore

        return LocalStore(uri, config)
    raise UnknownSchemeError(
        f"expected a URI that starts with gs:// or file://, or a plain path; got {uri!r} with the scheme "
        f"{scheme!r}; copy the data to a bucket or folder of these kinds, or mount it and give its path"
    )
