"""Reads one shard: its cases' objects, images and labels at once, a few chunks ahead of the transform."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .decode import Buffer
from .errors import ConfigError, IngestError, ObjectError, ObjectNotFoundError, StaleManifestError
from .layout import NAMES, Known, known_of
from .manifest import cases_of
from .pairing import Case
from .plan import Indices
from .quarantine import BadCaseConfig, Quarantine, QuarantineEntry, entry_of
from .slab import BadCase, Patch, Slabs
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
        pa.field("boxes", pa.list_(pa.int32())),  # of the label's foreground, where the manifest tells them
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

    slabs: Literal["auto", "never"] = "auto"
    """`auto` reads only the slab that holds the patch where an image is large and the patch is not as deep; `never`
    reads all volumes whole. The samples are the same, and the batches too but in epochs that find a bad case. Shapes
    and foreground boxes in the manifest (`voxflux index --boxes`) spare the reads that would find them."""

    slab_image_bytes: int = 8 * 2**20
    """Images smaller than this are read whole: a request more costs as much."""

    def __post_init__(self) -> None:
        if self.slabs not in ("auto", "never"):
            raise ConfigError(f"slabs must be auto or never; got {self.slabs!r}")
        for field in ("chunk_cases", "chunk_bytes", "slab_image_bytes"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be 1 or more; got {getattr(self, field)}")
        if self.chunks_ahead < 0:
            raise ConfigError(f"chunks_ahead must be 0 or more; got {self.chunks_ahead}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """Plain values that tell a worker what to read: pickles small, holds no client.

    Its rows may be a slice of a whole epoch's. They are pickled in Arrow's stream format, which takes of a slice only
    what is in it, and a third of the time of Ray's own way; the data sets' coordinator pickles all shards of an epoch
    before the first one is read.

    Attributes:
        epochs: (n,) int64, in which each is trained on.
        block: cases that are handed on together.
        rows: the shard's rows of the manifest, in order.
        indices: (n,) int64, their indices in the manifest.
        bad: what is done about a case whose objects cannot be read.
        quarantine: where such cases are kept; None where none is.
        slabs: cuts the patch out of large cases already here; None reads every case whole.
        record: is told what was done; None where nobody asks.
    """

    images_uri: str
    labels_uri: str
    store: StoreConfig
    fetch: FetchConfig
    epochs: Indices
    block: int
    rows: pa.Table
    indices: Indices
    bad: BadCaseConfig = dataclasses.field(default_factory=BadCaseConfig)
    quarantine: Quarantine | None = None
    slabs: Slabs | None = None
    record: Recorder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Its fields, the rows as bytes."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.rows.schema) as stream:
            stream.write_table(self.rows)
        return vars(self) | {"rows": sink.getvalue().to_pybytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the fields back."""
        vars(self).update(state | {"rows": pa.ipc.open_stream(state["rows"]).read_all()})


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

    A case that `spec.slabs` takes has its patch in the place of its volume: all of them the same number of bytes.

    Yields:
        Tables of `RAW_SCHEMA`.

    Raises:
        ObjectError: a case's object is missing, changed or damaged, and the policy is not to leave it out.
        DecodeError: the same of a case whose patch is cut here, and is not what was expected.
        QuarantineBudgetError: more cases are bad than may be left out.
        StoreError: the store as a whole cannot be read.
    """
    if spec.record is not None:
        TALLY.begin(int(spec.epochs[0]))
    cases, known = cases_of(spec.rows), known_of(spec.rows)
    left_out = () if spec.quarantine is None else spec.quarantine.indices()
    wanted = ~np.isin(spec.indices, left_out)
    chunks = _chunks([_read_bytes(spec.slabs, *each) for each in zip(cases, known, strict=True)], spec)
    block: list[pa.Table] = []
    ahead = spec.fetch.chunks_ahead
    with concurrent.futures.ThreadPoolExecutor(2 * (ahead + 1), thread_name_prefix="fetch") as pool:
        pending: collections.deque[tuple[slice, Callable[[], list[Fetched]]]] = collections.deque()
        try:
            for number in range(len(chunks) + ahead):
                if number < len(chunks):
                    chunk = chunks[number]
                    pending.append((chunk, _started(pool, spec, cases[chunk], known[chunk], chunk, wanted[chunk])))
                if number >= ahead:
                    chunk, fetched = pending.popleft()
                    before_s = time.perf_counter()
                    arrived = fetched()
                    waited_s = time.perf_counter() - before_s
                    epoch = int(spec.epochs[chunk.start])
                    if number > ahead and epoch != spec.epochs[chunk.start - 1]:
                        # Who has trained the epoch before asks what was done for it, at once.
                        TALLY.tell(spec.record, now=True)
                    TALLY.fetched(epoch, bytes_read=_bytes_of(arrived), waited_s=waited_s)
                    block.append(_table(spec, cases, chunk, arrived))
                    if chunk.stop % spec.block == 0 or chunk.stop == len(cases):
                        yield pa.concat_tables(block)
                        TALLY.tell(spec.record)
                        block = []
        finally:
            pool.shutdown(cancel_futures=True)
            TALLY.tell(spec.record, now=True)


def _read_bytes(slabs: Slabs | None, case: Case, known: Known | None) -> int:
    if slabs is not None and slabs.takes(case):
        return slabs.read_bytes(case, known)
    return case.image.size_bytes + case.label.size_bytes


def _chunks(read_bytes: Sequence[int], spec: ShardSpec) -> list[slice]:
    """As many cases at once as the limits allow by what is read of each, and never of two blocks or two epochs."""
    chunks: list[slice] = []
    start, chunk_bytes = 0, 0
    for number, case_bytes in enumerate(read_bytes):
        full = number - start == spec.fetch.chunk_cases or chunk_bytes + case_bytes > spec.fetch.chunk_bytes
        if number > start and (full or number % spec.block == 0 or spec.epochs[number] != spec.epochs[start]):
            chunks.append(slice(start, number))
            start, chunk_bytes = number, 0
        chunk_bytes += case_bytes
    if read_bytes:
        chunks.append(slice(start, len(read_bytes)))
    return chunks


Bodies = tuple[bytes | ObjectError, bytes | ObjectError]
Fetched = Bodies | Patch | BadCase | None
"""Of one case: both objects whole, or what cutting it gave; None where it was not to be read."""


def _started(
    pool: concurrent.futures.Executor,
    spec: ShardSpec,
    cases: Sequence[Case],
    known: Sequence[Known | None],
    chunk: slice,
    wanted: npt.NDArray[np.bool_],
) -> Callable[[], list[Fetched]]:
    """Begin to read a chunk's cases; what is returned waits for them."""
    images, labels = _store(spec.images_uri, spec.store), _store(spec.labels_uri, spec.store)
    cut = [spec.slabs is not None and spec.slabs.takes(case) for case in cases]
    epoch = int(spec.epochs[chunk.start])
    whole = [case for case, want, here in zip(cases, wanted, cut, strict=True) if want and not here]
    image_bodies = pool.submit(images.fetch_each, [case.image for case in whole])
    label_bodies = pool.submit(labels.fetch_each, [case.label for case in whole])
    patches = [
        pool.submit(spec.slabs.cut, images, labels, case, known[number], epoch=epoch, index=index)
        if spec.slabs is not None and wanted[number] and cut[number]
        else None
        for number, (case, index) in enumerate(zip(cases, spec.indices[chunk].tolist(), strict=True))
    ]

    def finished() -> list[Fetched]:
        bodies = iter(zip(image_bodies.result(), label_bodies.result(), strict=True))
        return [
            None if not want else next(bodies) if patch is None else patch.result()
            for want, patch in zip(wanted, patches, strict=True)
        ]

    return finished


class _Row(NamedTuple):
    """What a row holds of its case; `as_listed` is False where it has been overwritten."""

    image_npy: Buffer
    label_npy: Buffer
    as_listed: bool = True


def _bytes_of(arrived: Sequence[Fetched]) -> int:
    """Of whole objects, and of a case that was read in part those of its patch."""
    pairs = [found for found in arrived if found is not None and not isinstance(found, BadCase)]
    return sum(len(body) for pair in pairs for body in pair if not isinstance(body, ObjectError))


def _table(spec: ShardSpec, cases: Sequence[Case], chunk: slice, fetched: Sequence[Fetched]) -> pa.Table:
    cases, indices, epoch = cases[chunk], spec.indices[chunk], int(spec.epochs[chunk.start])
    images, labels = _store(spec.images_uri, spec.store), _store(spec.labels_uri, spec.store)
    settled = [
        None if found is None else _settled(spec, case, epoch, index, found)
        for case, index, found in zip(cases, indices.tolist(), fetched, strict=True)
    ]
    bad = [entry for entry in settled if isinstance(entry, QuarantineEntry)]
    if spec.quarantine is not None and bad:
        spec.quarantine.report(*bad)  # in one call, because the book writes about once a second
    good = [row if isinstance(row, _Row) else None for row in settled]
    rows = [_blank(spec, case) if row is None else row for case, row in zip(cases, good, strict=True)]
    boxes = pa.nulls(len(cases), pa.list_(pa.int32()))
    if NAMES[-1] in spec.rows.column_names:
        boxes = spec.rows[NAMES[-1]][chunk].combine_chunks()
        if not all(row.as_listed for row in rows):
            boxes = pc.if_else(pa.array([row.as_listed for row in rows]), boxes, pa.scalar(None, boxes.type))
    columns = {
        "index": np.asarray(indices, dtype=np.int64),
        "epoch": np.full(len(cases), epoch, dtype=np.int64),
        "case_id": [case.case_id for case in cases],
        "image_name": [images.uri_of(case.image.name) for case in cases],
        "label_name": [labels.uri_of(case.label.name) for case in cases],
        "image_npy": _uncopied([row.image_npy for row in rows]),
        "label_npy": _uncopied([row.label_npy for row in rows]),
        "left_out": [row is None for row in good],
        "boxes": boxes,
    }
    return pa.table(columns, schema=RAW_SCHEMA)


def _blank(spec: ShardSpec, case: Case) -> _Row:
    if spec.slabs is not None and spec.slabs.takes(case):
        return _Row(*spec.slabs.blank())
    return _Row(bytes(case.image.size_bytes), bytes(case.label.size_bytes))


def _uncopied(bodies: Sequence[Buffer]) -> pa.ChunkedArray:
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


def _settled(
    spec: ShardSpec, case: Case, epoch: int, index: int, fetched: Bodies | Patch | BadCase
) -> _Row | QuarantineEntry:
    """Return the row of a case, or its quarantine entry if the case is left out.

    Raises:
        ObjectError, DecodeError: an object is bad, and the policy is not to leave its case out.
    """
    refresh = spec.bad.on_stale == "refresh"
    found: _Row | Patch | BadCase
    if not isinstance(fetched, Patch | BadCase):
        found = _both(spec, case, fetched, refresh=refresh)
    elif isinstance(fetched, BadCase) and isinstance(fetched.error, StaleManifestError) and refresh:
        found = _cut_anew(spec, case, epoch, index)
    else:
        found = fetched
    if not isinstance(found, BadCase):
        return found if isinstance(found, _Row) else _Row(*found)
    if spec.quarantine is None or not spec.bad.takes(found.error):
        raise _with_advice(found.error) from found.error
    uri, meta = (spec.images_uri, case.image) if found.role == "image" else (spec.labels_uri, case.label)
    name = _store(uri, spec.store).uri_of(meta.name)
    return entry_of(found.error, index=index, case_id=case.case_id, uri=name, epoch=epoch)


def _with_advice(error: IngestError) -> IngestError:
    """Return the error of a bad case that ends the run, with the settings that would let the run go on."""
    if isinstance(error, StaleManifestError):
        return StaleManifestError(
            f"{error}; put the listed bytes back, or go on with --data.on-stale refresh, which reads it as it is now, "
            "or with --data.on-stale quarantine, which leaves its case out"
        )
    if isinstance(error, ObjectError):
        return type(error)(f"{error}, or go on with --data.on-bad quarantine, which leaves its case out")
    return error


def _both(spec: ShardSpec, case: Case, bodies: Bodies, *, refresh: bool) -> _Row | BadCase:
    """Both objects of a case, whole."""
    good: list[bytes] = []
    as_listed = True
    role: Literal["image", "label"]
    for role, uri, meta, body in (
        ("image", spec.images_uri, case.image, bodies[0]),
        ("label", spec.labels_uri, case.label, bodies[1]),
    ):
        if isinstance(body, StaleManifestError) and refresh:
            store = _store(uri, spec.store)
            now = _as_it_is_now(store, meta)
            body = now if isinstance(now, ObjectError) else store.fetch_each([now])[0]
            as_listed = False
        if isinstance(body, ObjectError):
            return BadCase(body, role)
        good.append(body)
    return _Row(good[0], good[1], as_listed)


def _cut_anew(spec: ShardSpec, case: Case, epoch: int, index: int) -> Patch | BadCase:
    """The patch of a case that was overwritten, as the case is now."""
    assert spec.slabs is not None
    images, labels = _store(spec.images_uri, spec.store), _store(spec.labels_uri, spec.store)
    image, label = _as_it_is_now(images, case.image), _as_it_is_now(labels, case.label)
    if isinstance(image, ObjectError):
        return BadCase(image, "image")
    if isinstance(label, ObjectError):
        return BadCase(label, "label")
    now = case._replace(image=image, label=label)
    return spec.slabs.cut(images, labels, now, None, epoch=epoch, index=index)


def _as_it_is_now(store: Store, listed: ObjectMeta) -> ObjectMeta | ObjectError:
    """What a listing says now of an object that is stale; if it is overwritten again, reading it is an error."""
    now = next((found for found in store.list(listed.name) if found.name == listed.name), None)
    if now is None:
        return ObjectNotFoundError(
            f"expected {store.uri_of(listed.name)}, which was overwritten since it was listed, found that it is gone; "
            "put it back"
        )
    if (now.size_bytes, now.generation) == (listed.size_bytes, listed.generation):
        return now
    logger.warning(
        "%s was overwritten since it was listed (%s bytes, generation %s): it is read as it is now (%s bytes, "
        "generation %s); a new run lists it as it is now",
        store.uri_of(listed.name),
        f"{listed.size_bytes:,}",
        listed.generation or "unknown",
        f"{now.size_bytes:,}",
        now.generation or "unknown",
    )
    return now
