"""Reads one shard: its cases' objects, images and labels at once, a few chunks ahead of the transform."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from .errors import ConfigError, ObjectError, ObjectNotFoundError, StaleManifestError
from .manifest import cases_of
from .pairing import Case
from .plan import Indices
from .quarantine import BadCaseConfig, Quarantine, entry_of
from .stores.base import ObjectMeta, Store, StoreConfig, open_store
from .tally import TALLY, Recorder

logger = logging.getLogger(__name__)

RAW_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("epoch", pa.int64(), nullable=False),
        pa.field("case_id", pa.string(), nullable=False),
        pa.field("image_name", pa.string(), nullable=False),
        pa.field("label_name", pa.string(), nullable=False),
        pa.field("image_npy", pa.large_binary(), nullable=False),
        pa.field("label_npy", pa.large_binary(), nullable=False),
        pa.field("left_out", pa.bool_(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig:
    """How a read task walks through its shard."""

    chunk_cases: int = 32
    """Cases that are fetched together at the most."""

    chunk_bytes: int = 32 * 2**20
    """Bytes of a chunk's objects at the most; one case is a chunk though it may be larger."""

    chunks_ahead: int = 3
    """Chunks that are fetched beyond the one that is waited for. With `chunk_bytes` and `--data.shards.block-bytes`
    this bounds a task's memory. Chunks are small beside blocks, so that the first ones have the network for
    themselves, and an epoch begins soon."""

    def __post_init__(self) -> None:
        for field in ("chunk_cases", "chunk_bytes"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be 1 or more; got {getattr(self, field)}")
        if self.chunks_ahead < 0:
            raise ConfigError(f"chunks_ahead must be 0 or more; got {self.chunks_ahead}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """Plain values that tell a worker what to read: pickles small, holds no client.

    Attributes:
        block: cases that are handed on together.
        rows: the shard's rows of the manifest, in order.
        indices: (n,) int64, their indices in the manifest.
        bad: what is done about a case whose objects cannot be read.
        quarantine: where such cases are kept; None where none is.
        record: is told what was done; None where nobody asks.
    """

    images_uri: str
    labels_uri: str
    store: StoreConfig
    fetch: FetchConfig
    epoch: int
    block: int
    rows: pa.Table
    indices: Indices
    bad: BadCaseConfig = dataclasses.field(default_factory=BadCaseConfig)
    quarantine: Quarantine | None = None
    record: Recorder | None = None


@functools.lru_cache(maxsize=16)
def _store(uri: str, config: StoreConfig) -> Store:
    """One store a place and process, so that its clients and connections outlive a shard."""
    return open_store(uri, config)


def read_shard(spec: ShardSpec) -> Iterator[pa.Table]:
    """Yield the shard's raw objects, a block at a time, in the order of the spec.

    A pure function of the spec and of what the store holds, so that Ray may run it again at any time. A quarantined
    case keeps its row, marked `left_out`, with as many zeros for bytes as were listed, and is not read: tables have
    the same rows and bytes whether it was found bad by this run of the task, by an earlier one, or by its decoding.
    Ray cuts blocks by their bytes, and a task that it runs again must give the same ones.

    Yields:
        Tables of `RAW_SCHEMA`.

    Raises:
        ObjectError: a case's object is missing, changed or damaged, and the policy is not to leave it out.
        QuarantineBudgetError: more cases are bad than may be left out.
        StoreError: the store as a whole cannot be read.
    """
    if spec.record is not None:
        TALLY.begin(spec.epoch)
    images, labels = _store(spec.images_uri, spec.store), _store(spec.labels_uri, spec.store)
    cases = cases_of(spec.rows)
    known = () if spec.quarantine is None else spec.quarantine.indices()
    wanted = ~np.isin(spec.indices, known)
    chunks = _chunks(cases, spec.fetch, spec.block)
    block: list[pa.Table] = []
    ahead = spec.fetch.chunks_ahead
    with concurrent.futures.ThreadPoolExecutor(2 * (ahead + 1), thread_name_prefix="fetch") as pool:
        pending: collections.deque[tuple[slice, tuple[concurrent.futures.Future[list[bytes | ObjectError]], ...]]] = (
            collections.deque()
        )
        try:
            for number in range(len(chunks) + ahead):
                if number < len(chunks):
                    mine = [
                        case for case, want in zip(cases[chunks[number]], wanted[chunks[number]], strict=True) if want
                    ]
                    pending.append(
                        (
                            chunks[number],
                            (
                                pool.submit(images.fetch_each, [case.image for case in mine]),
                                pool.submit(labels.fetch_each, [case.label for case in mine]),
                            ),
                        )
                    )
                if number >= ahead:
                    chunk, (image_bodies, label_bodies) = pending.popleft()
                    before_s = time.perf_counter()
                    arrived = list(zip(image_bodies.result(), label_bodies.result(), strict=True))
                    TALLY.fetched(bytes_read=_bytes_of(arrived), waited_s=time.perf_counter() - before_s)
                    bodies = iter(arrived)
                    block.append(_table(spec, cases, chunk, [next(bodies) if want else None for want in wanted[chunk]]))
                    if chunk.stop % spec.block == 0 or chunk.stop == len(cases):
                        yield pa.concat_tables(block)
                        TALLY.tell(spec.record)
                        block = []
        finally:
            pool.shutdown(cancel_futures=True)
            TALLY.tell(spec.record, now=True)


def _chunks(cases: Sequence[Case], config: FetchConfig, block: int) -> list[slice]:
    """As many cases at once as the limits allow, and never of two blocks."""
    chunks: list[slice] = []
    start, chunk_bytes = 0, 0
    for number, case in enumerate(cases):
        case_bytes = case.image.size_bytes + case.label.size_bytes
        full = number - start == config.chunk_cases or chunk_bytes + case_bytes > config.chunk_bytes
        if number > start and (full or number % block == 0):
            chunks.append(slice(start, number))
            start, chunk_bytes = number, 0
        chunk_bytes += case_bytes
    if cases:
        chunks.append(slice(start, len(cases)))
    return chunks


Bodies = tuple[bytes | ObjectError, bytes | ObjectError]


def _bytes_of(arrived: Sequence[Bodies]) -> int:
    return sum(len(body) for pair in arrived for body in pair if not isinstance(body, ObjectError))


def _table(spec: ShardSpec, cases: Sequence[Case], chunk: slice, fetched: Sequence[Bodies | None]) -> pa.Table:
    cases, indices = cases[chunk], spec.indices[chunk]
    images, labels = _store(spec.images_uri, spec.store), _store(spec.labels_uri, spec.store)
    good = [
        None if bodies is None else _settled(spec, case, index, bodies)
        for case, index, bodies in zip(cases, indices.tolist(), fetched, strict=True)
    ]
    bodies = [
        (bytes(case.image.size_bytes), bytes(case.label.size_bytes)) if pair is None else pair
        for case, pair in zip(cases, good, strict=True)
    ]
    columns = {
        "index": np.asarray(indices, dtype=np.int64),
        "epoch": np.full(len(cases), spec.epoch, dtype=np.int64),
        "case_id": [case.case_id for case in cases],
        "image_name": [images.uri_of(case.image.name) for case in cases],
        "label_name": [labels.uri_of(case.label.name) for case in cases],
        "image_npy": _uncopied([image for image, _ in bodies]),
        "label_npy": _uncopied([label for _, label in bodies]),
        "left_out": [pair is None for pair in good],
    }
    return pa.table(columns, schema=RAW_SCHEMA)


def _uncopied(bodies: Sequence[bytes]) -> pa.ChunkedArray:
    """A column that views these bytes where they lie, a chunk each: copying them costs as much as reading a file."""
    return pa.chunked_array(
        [
            pa.Array.from_buffers(
                pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, len(body)], dtype=np.int64)), pa.py_buffer(body)]
            )
            for body in bodies
        ],
        pa.large_binary(),
    )


def _settled(spec: ShardSpec, case: Case, index: int, bodies: Bodies) -> tuple[bytes, bytes] | None:
    """The bytes of a case's image and label; None where the case is left out, which is reported first.

    Raises:
        ObjectError: an object is bad, and the policy is not to leave its case out.
        QuarantineBudgetError: one bad case too many.
    """
    good: list[bytes] = []
    for uri, meta, body in zip((spec.images_uri, spec.labels_uri), (case.image, case.label), bodies, strict=True):
        store = _store(uri, spec.store)
        if isinstance(body, StaleManifestError) and spec.bad.on_stale == "refresh":
            body = _refreshed(store, meta)
        if isinstance(body, ObjectError):
            if spec.quarantine is None or not spec.bad.takes(body):
                raise body
            name = store.uri_of(meta.name)
            entry = entry_of(body, index=index, case_id=case.case_id, uri=name, epoch=spec.epoch)
            spec.quarantine.report(entry)
            return None
        good.append(body)
    return good[0], good[1]


def _refreshed(store: Store, listed: ObjectMeta) -> bytes | ObjectError:
    """An object that was overwritten, as it is now; if it is overwritten again meanwhile, that is its error."""
    now = next((found for found in store.list(listed.name) if found.name == listed.name), None)
    if now is None:
        return ObjectNotFoundError(
            f"expected {store.uri_of(listed.name)}, which was overwritten since it was listed, found that it is gone; "
            "put it back or list anew"
        )
    logger.warning(
        "%s was overwritten since it was listed (%s bytes, generation %s): it is read as it is now (%s bytes, "
        "generation %s); make the manifest anew to read it so from the start",
        store.uri_of(listed.name),
        f"{listed.size_bytes:,}",
        listed.generation or "unknown",
        f"{now.size_bytes:,}",
        now.generation or "unknown",
    )
    return store.fetch_each([now])[0]
