"""From configuration to a `ray.data.Dataset` of fixed-shape samples: read, then decode, crop and augment, fused."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import tyro

from .augment import AugmentConfig, PatchSampler
from .crop import CropConfig
from .datasource import PairedVolumeDatasource, shielded_task
from .decode import DecodeConfig, decode_case
from .errors import ConfigError, DecodeError
from .execution import execution_options, made_with
from .fetch import FetchConfig
from .holdout import HOLDOUT_FRACTION, check_ways
from .layout import read_boxes
from .manifest import Manifest
from .pairing import PairingConfig
from .plan import Indices, ShardConfig, TrainingPlan, block_batches, split_holdout
from .quarantine import BadCaseConfig, Quarantine, QuarantineEntry, entry_of
from .slab import Slabs, boxes_of, names_fault
from .stores.base import StoreConfig
from .tally import TALLY, Recorder

Columns = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the cases lie and what becomes of them."""

    images: str = ""
    """URI of the images: gs://bucket/prefix, file:///folder, or a path."""

    labels: str = ""
    """URI of the labels; may be the same place."""

    manifest: str | None = None
    """URI of a saved manifest (`voxflux index`): the bucket is then not listed."""

    seed: int = 0
    """Of the order, the crops and the augmentations; the same seed gives the same samples on any cluster."""

    holdout_fraction: float = HOLDOUT_FRACTION
    """Share of the subjects that is kept from training, to validate on; copies of a case stay together."""

    subject_pattern: str | None = None
    """Regular expression that finds the subject in a case id: its first group, or the whole match. Cases of a subject
    are held out together. None takes BIDS's `sub-*` where an id has it, and each other case as a subject of its own;
    '' always the latter."""

    holdout_cases: str | None = None
    """Instead of a share: a file of case ids, one a line (a path or URI), or `kits19-mlperf`, the 42 that
    MLPerf Inference names."""

    eval_images: str = ""
    """Instead of a share: URI of other images, to validate on; of `images` all other subjects are then trained on."""

    eval_labels: str = ""
    """URI of their labels."""

    blocks_in_flight: int | None = None
    """Read tasks of an execution at once over the whole cluster; None leaves it to Ray Data. The next execution has as
    many of its own once it is begun, while the last steps of one are trained."""

    task_cpus: float | None = None
    """CPUs that Ray reserves for one read task; None takes one, or less where a run's cluster has too few."""

    label_selector: dict[str, str] | None = None
    """Labels of the nodes that read and transform; None takes those labelled ray-subcluster=data where a run finds
    any, and all nodes else. By the key ray-subcluster Ray Data also counts CPUs and memory; by others it does not."""

    crop: CropConfig = dataclasses.field(default_factory=CropConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)
    pairing: PairingConfig = dataclasses.field(default_factory=PairingConfig)
    shards: ShardConfig = dataclasses.field(default_factory=ShardConfig)
    fetch: FetchConfig = dataclasses.field(default_factory=FetchConfig)
    store: StoreConfig = dataclasses.field(default_factory=StoreConfig)
    bad: Annotated[BadCaseConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=BadCaseConfig)
    # Without a name of its own on the command line: --data.on-bad, --data.on-stale, --data.budget-cases.

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"data.seed must be from 0 to 2**63 - 1; got {self.seed}")
        if not 0 <= self.holdout_fraction < 1:
            raise ConfigError(f"data.holdout_fraction must be from 0 to below 1; got {self.holdout_fraction}")
        check_ways(self.holdout_cases, self.eval_images, self.eval_labels, self.subject_pattern)
        if self.blocks_in_flight is not None and self.blocks_in_flight < 1:
            raise ConfigError(f"data.blocks_in_flight must be 1 or more; got {self.blocks_in_flight}")
        if self.read_cpus <= 0:
            raise ConfigError(f"data.task_cpus must be above 0; got {self.task_cpus}")
        for key, value in (self.label_selector or {}).items():
            if not key or not value or value.startswith(("!", "in(")):
                raise ConfigError(f"data.label_selector must name labels and plain values; got {key!r}: {value!r}")

    @property
    def read_cpus(self) -> float:
        """`task_cpus`, or 1, where no cluster is known."""
        return 1.0 if self.task_cpus is None else self.task_cpus


def training_dataset(
    manifest: Manifest,
    config: DataConfig,
    *,
    first_epoch: int = 0,
    executions: Sequence[range] | None = None,
    consumed: Indices | None = None,
    multiple: int = 1,
    batch: int = 32,
    ranks: int = 1,
    quarantine: Quarantine | None = None,
    record: Recorder | None = None,
    candidates: Indices | None = None,
) -> ray.data.Dataset:
    """The training samples: each execution of the data set is one epoch, or several on end.

    A block is a whole number of batches, as `plan.block_batches` says. Ray deals blocks out to ranks in turn, and the
    plan arranges them so that step s trains on the same cases whatever was read when and by whom, and that what was
    trained on at any step is a prefix of the epoch's order. A batch is viewed where it lies.

    A bad case that goes into quarantine takes no other with it: its row is missing from the epoch in which it is
    found, whose later blocks in that shard are then other ones, and it is in no later epoch's plan.

    Args:
        manifest: the cases.
        config: its store's transport is resolved already.
        first_epoch: the epoch of the first execution, where each is one epoch and there is no end of them.
        executions: instead, the epochs of each execution; several in one, such as `epochs_together` says, need
            `multiple`.
        consumed: indices that were trained on already in the first epoch.
        multiple: each epoch is cut to a multiple of this many cases.
        batch: rows of a rank's batch; the last one of an epoch may have fewer.
        ranks: that the data set is split to, where `multiple` is a multiple of ranks times batch; else 1.
        quarantine: the run's bad cases, as `start_quarantine` gives them. Needed where `config.bad` says so.
        record: is told what each task does, about once a second.
        candidates: indices to train on; None for all but the share that `config` holds out.

    Returns:
        Rows of `case_id` string, `index` int64 (in the manifest), `epoch` int64, `image` (C, *patch) float32 and
        `label` (1, *patch) uint8, in the order of the plan.

    Raises:
        ConfigError: `config.bad` wants a quarantine, and none is given; or with one, several epochs are to be read on
            end, of which a bad case would shift the later ones; or executions of nothing.
    """
    if config.bad.quarantines and quarantine is None:
        raise ConfigError(
            f"expected a quarantine, since data.on_bad is {config.bad.on_bad} and data.on_stale {config.bad.on_stale}, "
            "found none; hand over the one of start_quarantine, or set both to fail"
        )
    if quarantine is not None and any(len(epochs) > 1 for epochs in executions or ()):
        raise ConfigError(
            "expected each epoch by itself, since a case that is quarantined shifts what comes after it, found "
            f"executions of {max(map(len, executions or ()))} epochs; read one at a time, or without a quarantine"
        )
    if candidates is None:
        candidates, _ = split_holdout(
            config.seed, manifest.subjects(config.subject_pattern).numbers, config.holdout_fraction
        )
    if executions is not None:
        if not executions or not all(executions) or first_epoch:
            raise ConfigError(
                f"expected executions of one epoch or more each, and no first_epoch beside them, found {executions} "
                f"and {first_epoch}; give one or the other"
            )
        first_epoch = executions[0][0]
    longest = 1 if executions is None else max(map(len, executions))
    batches = block_batches(len(candidates) * longest, batch, ranks, batch * sample_bytes(config), config.shards)
    block = batch * batches
    plan = TrainingPlan(
        case_bytes=shard_weights(manifest, config),
        seed=config.seed,
        shards=config.shards,
        candidates=candidates,
        resumed_epoch=first_epoch,
        consumed=consumed,
        multiple=multiple,
        batch=batch,
        ranks=ranks,
        batches=batches,
    )
    source = PairedVolumeDatasource(
        manifest,
        plan,
        first_epoch=first_epoch,
        executions=executions,
        block=block,
        store=config.store,
        fetch=config.fetch,
        bad=config.bad,
        quarantine=quarantine,
        slabs=slabs_of(config),
        record=record,
    )
    sample = shielded_task(
        functools.partial(
            sample_patches,
            sampler=sampler_of(config),
            decode=config.decode,
            batch=block,
            quarantine=quarantine if config.bad.on_bad == "quarantine" else None,
            record=record,
        )
    )
    shards = max(1, source.first_shards())
    concurrency = config.blocks_in_flight
    if concurrency is not None:
        concurrency = max(1, min(concurrency, source.most_shards()))
    block_bytes = block_target_bytes(config, block, manifest.id_bytes())
    with made_with(execution_options(config.label_selector), block_bytes=block_bytes):
        read = ray.data.read_datasource(
            source,
            override_num_blocks=shards,
            num_cpus=config.read_cpus,
            concurrency=concurrency,
        )
    # batch_size=None and the same resources as the read: what lets Ray fuse the two into one task.
    samples: ray.data.Dataset = read.map_batches(
        sample,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=config.read_cpus,
        concurrency=concurrency,
    )
    return samples


def sampler_of(config: DataConfig) -> PatchSampler:
    """What cuts and augments the patches of such a run."""
    return PatchSampler(crop=config.crop, augment=config.augment, seed=config.seed)


def slabs_of(config: DataConfig) -> Slabs | None:
    """What cuts patches in the read task already; None where all volumes are read whole."""
    if config.fetch.slabs == "never":
        return None
    return Slabs(sampler=sampler_of(config), decode=config.decode, least_bytes=config.fetch.slab_image_bytes)


def shard_weights(manifest: Manifest, config: DataConfig) -> Indices:
    """Bytes that each case counts towards `ShardConfig.shard_bytes`, (N,) int64."""
    slabs = slabs_of(config)
    return manifest.case_bytes() if slabs is None else slabs.shard_weights(manifest.table)


def warm_reader(label_selector: dict[str, str] | None = None) -> ray.ObjectRef[int]:
    """Have a worker load what reading needs, before it is asked to read: it takes about as long as planning does.

    Args:
        label_selector: of the nodes that read.

    Returns:
        The worker's process id, once it is done; nobody need wait for it.
    """
    # A little of a CPU, so that it is not done on a head that has none and never reads.
    return ray.remote(num_cpus=0.01, label_selector=label_selector or {})(_loaded).remote()


def _loaded() -> int:
    """The process that runs it, and has loaded this module and Ray Data by then."""
    return os.getpid()


def sample_bytes(config: DataConfig) -> int:
    """Bytes of one sample's columns but for its id."""
    tensors = math.prod(config.crop.patch) * (4 * config.decode.channels + 1)
    return tensors + 2 * 8 + 2 * 8 + 4  # and two integers, their tensors' offsets, and the id's


def block_target_bytes(config: DataConfig, rows: int, id_bytes: tuple[int, int]) -> int:
    """The target size that makes Ray hand on blocks of exactly `rows` samples.

    Ray gathers what a task yields until it is over the target, and cuts what is over 1.5 times the target. Samples
    have one size but for their ids, so a target between the largest block less one sample and the smallest block is
    passed by a block's last sample and by no other.

    Args:
        config: says how large a sample is.
        rows: samples of a block.
        id_bytes: of the shortest and of the longest case id.
    """
    each = sample_bytes(config)
    under, over = (rows - 1) * (each + id_bytes[1]), rows * (each + id_bytes[0])
    return max(1, (under + over) // 2 if under < over else over - 1)


def sample_patches(
    raw: pa.Table,
    *,
    sampler: PatchSampler,
    decode: DecodeConfig,
    batch: int,
    quarantine: Quarantine | None = None,
    record: Recorder | None = None,
) -> Iterator[Columns]:
    """Decode, crop and augment some raw cases.

    Args:
        raw: of `fetch.RAW_SCHEMA`: a whole batch, or a part that Ray cut since its volumes are large. Its bytes
            are viewed, not copied.
        sampler: cuts the patches.
        decode: what a good case looks like.
        batch: rows of a block.
        quarantine: takes the cases that do not decode; None lets their errors out.
        record: is told what was done.

    Yields:
        Columns as in `training_dataset`, each tensor column one contiguous buffer: a whole batch as one table, and
        parts of one a sample at a time, so that Ray gathers them into whole batches again. Rows that are left out
        are missing; where none is left, nothing is yielded.

    Raises:
        DecodeError: a case is not what was expected, and there is no quarantine.
        QuarantineBudgetError: one bad case too many.
    """
    rows = batch if raw.num_rows == batch else 1
    for start in range(0, raw.num_rows, rows):
        before_s = time.perf_counter()
        samples = _sample_batch(raw.slice(start, rows), sampler, decode, quarantine)
        TALLY.transformed(samples["epoch"], time.perf_counter() - before_s)
        if len(samples["index"]):
            yield samples
    TALLY.tell(record)


def _sample_batch(raw: pa.Table, sampler: PatchSampler, decode: DecodeConfig, quarantine: Quarantine | None) -> Columns:
    rows = raw.num_rows
    patch = sampler.crop.patch
    image_NCDHW = np.empty((rows, decode.channels, *patch), dtype=np.float32)
    label_N1DHW = np.empty((rows, 1, *patch), dtype=np.uint8)
    index, epoch = raw["index"].to_numpy(), raw["epoch"].to_numpy()
    case_ids, left_out = raw["case_id"].to_pylist(), raw["left_out"].to_pylist()
    image_names, label_names = raw["image_name"].to_pylist(), raw["label_name"].to_pylist()
    image_npy, label_npy = views(raw["image_npy"]), views(raw["label_npy"])
    boxes = raw["boxes"].to_pylist()
    good: list[int] = []
    bad: list[QuarantineEntry] = []
    for row in range(rows):
        if left_out[row]:
            continue
        try:
            image_CDHW, label_1DHW = decode_case(
                image_npy[row],
                label_npy[row],
                decode,
                image_name=image_names[row],
                label_name=label_names[row],
                smallest=patch,
            )
        except DecodeError as error:
            if quarantine is None:
                raise
            uri = label_names[row] if names_fault(error, label_names[row]) else image_names[row]
            bad.append(entry_of(error, index=int(index[row]), case_id=case_ids[row], uri=uri, epoch=int(epoch[row])))
            continue
        if boxes[row] is None:
            find_boxes = functools.partial(boxes_of, label_names[row], label_npy[row], label_1DHW)
        else:
            find_boxes = functools.partial(read_boxes, boxes[row])
        sampler(
            image_CDHW,
            label_1DHW,
            epoch=int(epoch[row]),
            index=int(index[row]),
            out_image=image_NCDHW[len(good)],
            out_label=label_N1DHW[len(good)],
            boxes=find_boxes,
        )
        good.append(row)
    if quarantine is not None and bad:
        quarantine.report(*bad)  # in one call, because the book writes about once a second
    return {
        "case_id": np.asarray([case_ids[row] for row in good], dtype=object),
        "index": index if len(good) == rows else index[good],
        "epoch": epoch if len(good) == rows else epoch[good],
        "image": image_NCDHW[: len(good)],
        "label": label_N1DHW[: len(good)],
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
