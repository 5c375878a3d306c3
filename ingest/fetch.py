"""Reads one shard: its cases' objects, images and labels at once, a few chunks ahead of the transform."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from .errors import ConfigError, ObjectError
from .manifest import cases_of
from .pairing import Case
from .plan import Indices
from .stores.base import Store, StoreConfig, open_store

RAW_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("epoch", pa.int64(), nullable=False),
        pa.field("case_id", pa.string(), nullable=False),
        pa.field("image_name", pa.string(), nullable=False),
        pa.field("label_name", pa.string(), nullable=False),
        pa.field("image_npy", pa.large_binary(), nullable=False),
        pa.field("label_npy", pa.large_binary(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig:
    """How a read task walks through its shard."""

    chunk_cases: int = 32
    """Cases that are fetched together; rounded to whole batches, of which one is the least."""

    chunk_bytes: int = 32 * 2**20
    """Bytes of a chunk's objects at the most; one batch is a chunk though it may be larger."""

    chunks_ahead: int = 3
    """Chunks that are fetched while one is transformed. With `chunk_bytes` this bounds a task's memory."""

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
        batch: cases that are handed on together.
        rows: the shard's rows of the manifest, in order.
        indices: (n,) int64, their indices in the manifest.
    """

    images_uri: str
    labels_uri: str
    store: StoreConfig
    fetch: FetchConfig
    epoch: int
    batch: int
    rows: pa.Table
    indices: Indices


@functools.lru_cache(maxsize=16)
def _store(uri: str, config: StoreConfig) -> Store:
    """One store a place and process, so that its clients and connections outlive a shard."""
    return open_store(uri, config)


def read_shard(spec: ShardSpec) -> Iterator[pa.Table]:
    """Yield the shard's raw objects, a batch at a time, in the order of the spec.

    A pure function of the spec and of what the store holds, so that Ray may run it again at any time.

    Yields:
        Tables of `RAW_SCHEMA`.

    Raises:
        ObjectError: a case's object is missing, changed or damaged.
        StoreError: the store as a whole cannot be read.
    """
    images, labels = _store(spec.images_uri, spec.store), _store(spec.labels_uri, spec.store)
    cases = cases_of(spec.rows)
    chunks = _chunks(cases, spec.fetch, spec.batch)
    ahead = spec.fetch.chunks_ahead
    with concurrent.futures.ThreadPoolExecutor(2 * (ahead + 1), thread_name_prefix="fetch") as pool:
        pending: collections.deque[tuple[slice, tuple[concurrent.futures.Future[list[bytes | ObjectError]], ...]]] = (
            collections.deque()
        )
        try:
            for number in range(len(chunks) + ahead):
                if number < len(chunks):
                    mine = cases[chunks[number]]
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
                    table = _table(spec, cases, chunk, image_bodies.result(), label_bodies.result(), images, labels)
                    yield from (table.slice(start, spec.batch) for start in range(0, table.num_rows, spec.batch))
        finally:
            pool.shutdown(cancel_futures=True)


def _chunks(cases: Sequence[Case], config: FetchConfig, batch: int) -> list[slice]:
    """Whole batches, as many at once as the limits allow."""
    chunks: list[slice] = []
    chunk_bytes = 0
    for start in range(0, len(cases), batch):
        stop = min(start + batch, len(cases))
        batch_bytes = sum(case.image.size_bytes + case.label.size_bytes for case in cases[start:stop])
        fits = (
            bool(chunks)
            and stop - chunks[-1].start <= config.chunk_cases
            and chunk_bytes + batch_bytes <= config.chunk_bytes
        )
        if fits:
            chunks[-1] = slice(chunks[-1].start, stop)
            chunk_bytes += batch_bytes
        else:
            chunks.append(slice(start, stop))
            chunk_bytes = batch_bytes
    return chunks


def _table(
    spec: ShardSpec,
    cases: Sequence[Case],
    chunk: slice,
    image_bodies: list[bytes | ObjectError],
    label_bodies: list[bytes | ObjectError],
    images: Store,
    labels: Store,
) -> pa.Table:
    cases = cases[chunk]
    for body in (*image_bodies, *label_bodies):
        if isinstance(body, ObjectError):
            raise body
    columns = {
        "index": np.asarray(spec.indices[chunk], dtype=np.int64),
        "epoch": np.full(len(cases), spec.epoch, dtype=np.int64),
        "case_id": [case.case_id for case in cases],
        "image_name": [images.uri_of(case.image.name) for case in cases],
        "label_name": [labels.uri_of(case.label.name) for case in cases],
        "image_npy": pa.array(image_bodies, pa.large_binary()),
        "label_npy": pa.array(label_bodies, pa.large_binary()),
    }
    return pa.table(columns, schema=RAW_SCHEMA)
