"""Whole volumes through Ray Data, for scoring and prediction: read once, in any order, streaming."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import ReadTask

from .datasource import shielded_task
from .decode import LabelMap, Volume, decode_case
from .errors import DecodeError
from .execution import execution_options, made_with
from .fetch import RAW_SCHEMA, ShardSpec, read_shard
from .images import IMAGE_SCHEMA, Image, ImageShard, read_images
from .manifest import Manifest
from .pipeline import DataConfig, views
from .plan import Indices, ShardConfig, shard_bounds
from .quarantine import Quarantine, entry_of
from .stores.base import StoreConfig

BLOCK_BYTES = 8 * 2**20
LEAST_BLOCKS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A labelled case, decoded.

    Attributes:
        index: in the run.
        case_id: its key.
        image: (C, D, H, W) float32, read-only.
        label: (1, D, H, W) uint8, read-only.
    """

    index: int
    case_id: str
    image: Volume
    label: LabelMap


class Read(NamedTuple):
    """One read task: what it calls, and how many rows and bytes that gives."""

    function: Callable[[], Iterable[pa.Table]]
    rows: int
    size_bytes: int


class VolumeDatasource(ray.data.Datasource):
    """A fixed list of read tasks, the same in every execution."""

    def __init__(self, reads: Sequence[Read], schema: pa.Schema) -> None:
        """Hold the tasks."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._reads = list(reads)
        self._schema = schema

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all objects."""
        return sum(read.size_bytes for read in self._reads)

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002  the list decides
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,  # noqa: ARG002  the signature is Ray's
    ) -> list[ReadTask]:
        """One task a read."""
        return [
            ReadTask(
                read.function,
                BlockMetadata(num_rows=read.rows, size_bytes=read.size_bytes, exec_stats=None, input_files=None),
                schema=self._schema,
                per_task_row_limit=per_task_row_limit,
            )
            for read in self._reads
        ]


def case_volumes(
    cases: Manifest, indices: Indices, config: DataConfig, quarantine: Quarantine | None = None
) -> ray.data.Dataset:
    """Whole labelled cases, raw; `decode_rows` makes volumes of them where they are used.

    Small blocks, one case where cases are large: they are what is dealt out to those who use them.

    Args:
        cases: to read.
        indices: (n,) int64, their indices in the run.
        config: how they are read; its store's transport is resolved.
        quarantine: takes the cases that cannot be read; None lets their errors out.

    Returns:
        Rows of `fetch.RAW_SCHEMA`.
    """
    sizes = cases.case_bytes()
    target, block, bounds = _layout(sizes, config.shards)
    reads = []
    for start, stop in itertools.pairwise(bounds.tolist()):
        spec = case_shard(cases, np.arange(start, stop), indices[start:stop], config, quarantine, block)
        reads.append(
            Read(shielded_task(functools.partial(read_shard, spec)), stop - start, int(sizes[start:stop].sum()))
        )
    return _dataset(reads, RAW_SCHEMA, target, config.read_cpus, config.label_selector)


def case_shard(
    cases: Manifest,
    positions: Indices,
    indices: Indices,
    config: DataConfig,
    quarantine: Quarantine | None = None,
    block: int = 1,
) -> ShardSpec:
    """What `fetch.read_shard` is to read for these rows of a manifest, whose indices in the run are `indices`."""
    return ShardSpec(
        images_uri=cases.images_uri,
        labels_uri=cases.labels_uri,
        store=config.store,
        fetch=dataclasses.replace(config.fetch, chunks_ahead=1),  # whole volumes are large: one ahead is enough
        epochs=np.zeros(len(indices), dtype=np.int64),
        block=block,
        rows=cases.take(positions),
        indices=indices,
        bad=config.bad,
        quarantine=quarantine,
    )


def image_volumes(
    images: Sequence[Image], uri: str, store: StoreConfig, shards: ShardConfig, task_cpus: float
) -> ray.data.Dataset:
    """Whole images without labels, raw.

    Returns:
        Rows of `images.IMAGE_SCHEMA`.
    """
    sizes = np.array([image.meta.size_bytes for image in images], dtype=np.int64)
    target, _, bounds = _layout(sizes, shards)
    reads = [
        Read(
            shielded_task(functools.partial(read_images, ImageShard(uri, store, tuple(images[start:stop])))),
            stop - start,
            int(sizes[start:stop].sum()),
        )
        for start, stop in itertools.pairwise(bounds.tolist())
    ]
    return _dataset(reads, IMAGE_SCHEMA, target, task_cpus)


def decode_rows(raw: pa.Table, config: DataConfig, quarantine: Quarantine | None = None) -> Iterator[Case]:
    """The cases of a raw table, checked; those that are left out or go into quarantine are missing.

    Raises:
        DecodeError: a case is not what was expected, and there is no quarantine.
        QuarantineBudgetError: one bad case too many.
    """
    bodies = zip(views(raw["image_npy"]), views(raw["label_npy"]), strict=True)
    for row, (image_npy, label_npy) in zip(
        raw.drop_columns(["image_npy", "label_npy"]).to_pylist(), bodies, strict=True
    ):
        if row["left_out"]:
            continue
        names = {"image_name": row["image_name"], "label_name": row["label_name"]}
        try:
            image_CDHW, label_1DHW = decode_case(image_npy, label_npy, config.decode, **names)
        except DecodeError as error:
            if quarantine is None or not config.bad.takes(error):
                raise
            # Each message begins with the name of the object at fault.
            uri = names["label_name"] if str(error).startswith(f"{names['label_name']}: ") else names["image_name"]
            quarantine.report(entry_of(error, index=row["index"], case_id=row["case_id"], uri=uri, epoch=row["epoch"]))
            continue
        yield Case(row["index"], row["case_id"], image_CDHW, label_1DHW)


def _layout(sizes: Indices, shards: ShardConfig) -> tuple[int, int, Indices]:
    """Bytes and cases of a block, and where each read task's cases begin and end."""
    total = int(sizes.sum())
    target = max(1, min(BLOCK_BYTES, total // LEAST_BLOCKS))
    block = max(1, target * len(sizes) // max(1, total))
    return target, block, shard_bounds(sizes, shards, block)


def _dataset(
    reads: Sequence[Read],
    schema: pa.Schema,
    target_bytes: int,
    task_cpus: float,
    label_selector: dict[str, str] | None = None,
) -> ray.data.Dataset:
    with made_with(execution_options(label_selector, in_order=False), block_bytes=target_bytes):
        volumes: ray.data.Dataset = ray.data.read_datasource(
            VolumeDatasource(reads, schema), override_num_blocks=max(1, len(reads)), num_cpus=task_cpus
        )
    return volumes
