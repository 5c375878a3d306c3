"""From configuration to a `ray.data.Dataset` of fixed-shape samples: read, then decode, crop and augment, fused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from ray.data import ExecutionOptions
from ray.data.context import DataContext

from .augment import AugmentConfig, PatchSampler
from .crop import CropConfig
from .datasource import PairedVolumeDatasource
from .decode import DecodeConfig, decode_case
from .errors import ConfigError
from .fetch import FetchConfig
from .manifest import Manifest
from .pairing import PairingConfig
from .plan import EpochPlan, Indices, ShardConfig, plan_epoch, split_holdout
from .stores.base import StoreConfig

Columns = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the cases lie and what becomes of them."""

    images: str = ""
    """URI of the images: gs://bucket/prefix, file:///folder, or a path."""

    labels: str = ""
    """URI of the labels; may be the same place."""

    manifest: str | None = None
    """URI of a saved manifest (`python -m ingest index`): the bucket is then not listed."""

    seed: int = 0
    """Of the order, the crops and the augmentations; the same seed gives the same samples on any cluster."""

    holdout_fraction: float = 0.1
    """Share of the cases that is kept from training, to validate on."""

    blocks_in_flight: int | None = None
    """Read tasks at once over the whole cluster; None leaves it to Ray Data."""

    task_cpus: float = 1.0
    """CPUs that Ray reserves for one read task."""

    block_bytes: int = 32 * 2**20
    """Size of the blocks of samples that read tasks hand on."""

    crop: CropConfig = dataclasses.field(default_factory=CropConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)
    pairing: PairingConfig = dataclasses.field(default_factory=PairingConfig)
    shards: ShardConfig = dataclasses.field(default_factory=ShardConfig)
    fetch: FetchConfig = dataclasses.field(default_factory=FetchConfig)
    store: StoreConfig = dataclasses.field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"data.seed must be from 0 to 2**63 - 1; got {self.seed}")
        if not 0 <= self.holdout_fraction < 1:
            raise ConfigError(f"data.holdout_fraction must be from 0 to below 1; got {self.holdout_fraction}")
        if self.blocks_in_flight is not None and self.blocks_in_flight < 1:
            raise ConfigError(f"data.blocks_in_flight must be 1 or more; got {self.blocks_in_flight}")
        if self.task_cpus <= 0 or self.block_bytes < 1:
            raise ConfigError(
                f"data.task_cpus and data.block_bytes must be above 0; got {self.task_cpus} and {self.block_bytes}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Plans any epoch of a run: a picklable function of the epoch.

    Attributes:
        case_bytes: (N,) int64, bytes of each case by index.
        candidates: indices to train on; None for all.
        resumed_epoch: the epoch that `consumed` speaks of.
        consumed: indices trained on already in that epoch.
        multiple: each epoch is cut to a multiple of this.
    """

    case_bytes: Indices
    seed: int
    shards: ShardConfig
    candidates: Indices | None = None
    resumed_epoch: int = 0
    consumed: Indices | None = None
    multiple: int = 1

    def __call__(self, epoch: int) -> EpochPlan:
        """The plan of one epoch."""
        return plan_epoch(
            case_bytes=self.case_bytes,
            seed=self.seed,
            epoch=epoch,
            shards=self.shards,
            candidates=self.candidates,
            consumed=self.consumed if epoch == self.resumed_epoch else None,
            multiple=self.multiple,
        )


def training_dataset(
    manifest: Manifest,
    config: DataConfig,
    *,
    first_epoch: int = 0,
    consumed: Indices | None = None,
    multiple: int = 1,
) -> ray.data.Dataset:
    """The training samples: each execution of the data set is one epoch.

    Args:
        manifest: the cases.
        config: its store's transport is resolved already.
        first_epoch: the epoch of the first execution.
        consumed: indices that were trained on already in the first epoch.
        multiple: each epoch is cut to a multiple of this many cases.

    Returns:
        Rows of `case_id` string, `index` int64 (in the manifest), `epoch` int64, `image` (C, *patch) float32 and
        `label` (1, *patch) uint8, in the order of the plan.
    """
    candidates, _ = split_holdout(config.seed, len(manifest), config.holdout_fraction)
    plan = TrainingPlan(
        case_bytes=manifest.case_bytes(),
        seed=config.seed,
        shards=config.shards,
        candidates=candidates,
        resumed_epoch=first_epoch,
        consumed=consumed,
        multiple=multiple,
    )
    source = PairedVolumeDatasource(manifest, plan, first_epoch=first_epoch, store=config.store, fetch=config.fetch)
    sample = functools.partial(
        sample_patches,
        sampler=PatchSampler(crop=config.crop, augment=config.augment, seed=config.seed),
        decode=config.decode,
    )
    functools.update_wrapper(sample, sample_patches)
    context = DataContext.get_current()
    before = context.target_max_block_size, context.execution_options
    try:
        # A data set takes a copy of the context as it stands when it is made.
        context.target_max_block_size = config.block_bytes
        context.execution_options = execution_options()
        read = ray.data.read_datasource(
            source,
            override_num_blocks=max(1, plan(first_epoch).num_shards),
            num_cpus=config.task_cpus,
            concurrency=config.blocks_in_flight,
        )
    finally:
        context.target_max_block_size, context.execution_options = before
    # batch_size=None and the same resources as the read: what lets Ray fuse the two into one task.
    samples: ray.data.Dataset = read.map_batches(
        sample,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=config.task_cpus,
        concurrency=config.blocks_in_flight,
    )
    return samples


def execution_options() -> ExecutionOptions:
    """Ray Data's options for a data set of ours: samples come in the order of the plan."""
    return ExecutionOptions(preserve_order=True)


def sample_patches(raw: pa.Table, *, sampler: PatchSampler, decode: DecodeConfig) -> Iterator[Columns]:
    """Decode, crop and augment one block of raw cases.

    Args:
        raw: of `fetch.RAW_SCHEMA`; its bytes are viewed, not copied.
        sampler: cuts the patches.
        decode: what a good case looks like.

    Yields:
        One block of columns as in `training_dataset`, each tensor column one contiguous buffer.

    Raises:
        DecodeError: a case is not what was expected.
    """
    rows = raw.num_rows
    patch = sampler.crop.patch
    image_NCDHW = np.empty((rows, decode.channels, *patch), dtype=np.float32)
    label_N1DHW = np.empty((rows, 1, *patch), dtype=np.uint8)
    index, epoch = raw["index"].to_numpy(), raw["epoch"].to_numpy()
    image_names, label_names = raw["image_name"].to_pylist(), raw["label_name"].to_pylist()
    image_npy, label_npy = views(raw["image_npy"]), views(raw["label_npy"])
    for row in range(rows):
        image_CDHW, label_1DHW = decode_case(
            image_npy[row],
            label_npy[row],
            decode,
            image_name=image_names[row],
            label_name=label_names[row],
            smallest=patch,
        )
        sampler(
            image_CDHW,
            label_1DHW,
            epoch=int(epoch[row]),
            index=int(index[row]),
            out_image=image_NCDHW[row],
            out_label=label_N1DHW[row],
        )
    yield {
        "case_id": np.asarray(raw["case_id"].to_pylist(), dtype=object),
        "index": index,
        "epoch": epoch,
        "image": image_NCDHW,
        "label": label_N1DHW,
    }


def views(column: pa.ChunkedArray) -> list[memoryview]:
    """The bodies of a large_binary column, without copying them as `to_pylist` would."""
    bodies: list[memoryview] = []
    for chunk in column.chunks:
        _, offsets_buffer, data = chunk.buffers()
        offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        whole = memoryview(data)
        bodies.extend(
            whole[start:stop] for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        )
    return bodies
