"""Where a sample's time goes: CPU milliseconds of each stage on its way from the store to a tensor.

Each piece is our own function, called alone in one process on the same cases; what the whole Ray run takes beyond
their sum, over all of its processes, is Ray's: to schedule, serialise, hold in the object store and iterate. The same
whole is also shown by processes.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from ray.data.context import DataContext
from rich.console import Console

from ingest.augment import NO_AUGMENTATION, AugmentConfig, PatchSampler
from ingest.cluster import connected_ray, environment
from ingest.crop import CropConfig
from ingest.datasource import PairedVolumeDatasource
from ingest.decode import decode_case
from ingest.errors import ConfigError
from ingest.index import index_cases
from ingest.manifest import Manifest, cases_of
from ingest.pipeline import DataConfig
from ingest.plan import epochs_together
from ingest.stores import open_store
from ingest.stores.base import StoreConfig, Transport
from ingest.transport import choose_transport
from train.batches import ToTensors

from .child import in_child
from .epochs import run_executions
from .place import opened
from .report import Report, Row, keeping, meta_of, status_of
from .scale import planner_of
from .tree import ROLES, TreeMeter

BATCH = 32
RANKS = 2
STAGES = ("fetch", "columns", "decode", "crop", "augment", "tensors", "ray")
"""In the order of a sample's way; `columns` is the shard's reading beyond its fetching, `ray` what is left over."""

FIELDS = {
    "transport": "{}",
    "stage": "{}",
    "cpu_ms_per_sample": "{:.3f}",
    "low": "{:.3f}",
    "high": "{:.3f}",
    "share": "{:.0%}",
    "samples_per_s": "{:,.0f}",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """Take a sample's cost apart, by stages and by transports."""

    json: Path | None = None
    """Where the JSON goes; the picture goes beside it. None is benchmarks/results/stages.json."""

    seed: int = 0
    """Of the order, the crops and the augmentations."""

    images: str = ""
    """URI of images of yours; empty takes generated pairs, on the embedded server and as local files."""

    labels: str = ""
    """URI of the labels."""

    pairs: int = 2000
    """Generated pairs."""

    pair_kb: int = 160
    """KiB of image and label together."""

    latency_ms: float = 0.0
    """Put in front of every request to the embedded server."""

    transports: tuple[Literal["compose", "direct", "local"], ...] = ("compose", "direct", "local")
    """How the objects are read; a given place takes `auto` instead."""

    samples: int = 640
    """Samples that each piece is measured on."""

    rounds: int = 5
    """Times that each piece is measured; half as many executions of the whole after its first. The median counts."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.samples < BATCH or self.pairs < BATCH * RANKS:
            raise ConfigError(
                f"expected rounds of 1, samples of {BATCH} and pairs of {BATCH * RANKS} or more, found {self}"
            )


def run(config: StagesConfig, console: Console) -> int:
    """Measure, print, and write the JSON and the picture."""
    meta = meta_of(config.seed, pair_kb=config.pair_kb, pairs=config.pairs, latency_ms=config.latency_ms)
    rows: list[Row] = []
    failed: list[str] = []
    place_of = functools.partial(opened, images=config.images, labels=config.labels, pairs=config.pairs)
    with keeping(rows, failed), place_of(pair_kb=config.pair_kb, latency_ms=config.latency_ms) as place:
        for transport in ("auto",) if place.folder is None else config.transports:
            console.print(f"transport {transport}", style="dim")
            images, labels = place.images, place.labels
            if transport == "local":
                assert place.folder is not None
                images, labels = str(place.folder / "images"), str(place.folder / "labels")
            with environment(place.env), tempfile.TemporaryDirectory() as folder:
                manifest_uri = f"{folder}/manifest.parquet"
                index_cases(images, labels).manifest.save(manifest_uri)
                asked = {
                    "manifest_uri": manifest_uri,
                    "transport": "direct" if transport == "local" else transport,
                    "patch": place.patch,
                    "rounds": config.rounds,
                    "seed": config.seed,
                }
                pieces = in_child("benchmarks.stages:measure_pieces", samples=config.samples, **asked)
                whole = in_child("benchmarks.stages:measure_whole", **asked)
            rows += rows_of(transport, pieces, whole)
    report = Report(name="stages", rows=rows, meta=meta)
    report.print(console, FIELDS)
    for file in report.save(config.json, lambda axes: draw(axes, rows)):
        console.print(f"wrote {file}")
    return status_of(failed)


def settled(manifest_uri: str, transport: Transport, patch: Sequence[int], seed: int) -> tuple[Manifest, DataConfig]:
    """The cases, and how all of them are read: the transport and its requests in flight as a run would choose them."""
    manifest = Manifest.load(manifest_uri)
    store = choose_transport(manifest, StoreConfig(transport=transport)).store
    depth, height, width = patch
    return manifest, DataConfig(
        seed=seed, holdout_fraction=0, crop=CropConfig(patch=(depth, height, width)), store=store
    )


def measure_pieces(
    *, manifest_uri: str, transport: Transport, patch: Sequence[int], samples: int, rounds: int, seed: int
) -> dict[str, list[float]]:
    """In a process of its own: CPU milliseconds a sample of every piece, one figure a round.

    Returns:
        By piece: `fetch`; `read`, which is fetching and making columns; `decode`; `crop`, and `sample`, which is
        cropping and augmenting; `tensors`.
    """
    manifest, data = settled(manifest_uri, transport, patch, seed)
    planner = planner_of(manifest, data, np.arange(len(manifest)), ranks=RANKS)
    epochs = range(epochs_together(manifest.case_bytes(), data.shards))  # the shards of the whole run
    source = PairedVolumeDatasource(
        manifest,
        planner,
        executions=[epochs],
        block=BATCH * planner.batches,
        store=data.store,
        fetch=data.fetch,
        bad=data.bad,
    )
    tasks = source.get_read_tasks(1, data_context=DataContext.get_current())
    counts = np.cumsum([task.metadata.num_rows for task in tasks])
    tasks = tasks[: int(np.searchsorted(counts, samples)) + 1]
    samples = int(counts[len(tasks) - 1])
    cases = cases_of(manifest.take(planner(epochs, np.zeros(0, dtype=np.int64)).order[:samples]))
    images, labels = open_store(manifest.images_uri, data.store), open_store(manifest.labels_uri, data.store)
    chunk = data.fetch.chunk_cases

    def fetch() -> tuple[list[bytes], list[bytes]]:
        starts = range(0, samples, chunk)
        return (
            [body for start in starts for body in images.fetch([case.image for case in cases[start : start + chunk]])],
            [body for start in starts for body in labels.fetch([case.label for case in cases[start : start + chunk]])],
        )

    bodies = list(zip(*fetch(), strict=True))  # also makes the clients and their connections

    def decode() -> list[Any]:
        return [
            decode_case(image, label, data.decode, image_name="image", label_name="label", smallest=data.crop.patch)
            for image, label in bodies
        ]

    volumes = decode()
    shape = (samples, data.decode.channels, *data.crop.patch)
    # Written to once, so that no piece pays for pages that are touched first.
    image_NCDHW = np.full(shape, 1, dtype=np.float32)
    label_N1DHW = np.full((samples, 1, *data.crop.patch), 1, dtype=np.uint8)

    def sample(augment: AugmentConfig) -> None:
        sampler = PatchSampler(crop=data.crop, augment=augment, seed=seed)
        for index, (image, label) in enumerate(volumes):
            sampler(image, label, epoch=0, index=index, out_image=image_NCDHW[index], out_label=label_N1DHW[index])

    def tensors() -> None:
        collate = ToTensors()
        for start in range(0, samples, BATCH):
            cut = slice(start, start + BATCH)
            collate(
                {
                    "image": image_NCDHW[cut],
                    "label": label_N1DHW[cut],
                    "index": np.arange(BATCH),
                    "epoch": np.zeros(BATCH, dtype=np.int64),
                }
            )

    pieces: dict[str, Callable[[], object]] = {
        "fetch": fetch,
        "read": lambda: [table for task in tasks for table in task()],
        "decode": decode,
        "crop": lambda: sample(NO_AUGMENTATION),
        "sample": lambda: sample(data.augment),
        "tensors": tensors,
    }
    found: dict[str, list[float]] = {name: [] for name in pieces}
    for _ in range(rounds):
        for name, piece in pieces.items():
            found[name].append(cpu_s_of(piece) / samples * 1e3)
    return found


def cpu_s_of(piece: Callable[[], object]) -> float:
    """CPU seconds of this process, all threads, that a call takes; what it made is thrown away outside of them."""
    gc.collect()
    before_s = time.process_time()
    made = piece()
    used_s = time.process_time() - before_s
    del made
    return used_s


def measure_whole(
    *, manifest_uri: str, transport: Transport, patch: Sequence[int], rounds: int, seed: int
) -> dict[str, list[float]]:
    """In a process of its own: the pipeline in Ray, one figure an execution.

    Returns:
        `cpu_ms` a sample in all, and by each of `tree.ROLES`; and `samples_per_s`.
    """
    manifest, data = settled(manifest_uri, transport, patch, seed)
    with connected_ray(), TreeMeter() as meter:
        executions = 1 + -(-rounds // 2)  # each takes many epochs of so few cases
        timings = run_executions(manifest, data, ranks=RANKS, batch=BATCH, executions=executions, meter=meter)[1:]
    return {
        "cpu_ms": [timing.cpu_s / timing.samples * 1e3 for timing in timings],
        "samples_per_s": [timing.samples / timing.wall_s for timing in timings],
    } | {role: [timing.cpu_s_by_role[role] / timing.samples * 1e3 for timing in timings] for role in ROLES}


def rows_of(transport: str, pieces: dict[str, list[float]], whole: dict[str, list[float]]) -> list[Row]:
    """One row a stage, and one for the whole: medians and ranges; stages by difference take differences of medians."""
    middle = {name: statistics.median(values) for name, values in pieces.items()}
    total = statistics.median(whole["cpu_ms"])
    spent = {
        "fetch": middle["fetch"],
        "columns": max(0.0, middle["read"] - middle["fetch"]),
        "decode": middle["decode"],
        "crop": middle["crop"],
        "augment": max(0.0, middle["sample"] - middle["crop"]),
        "tensors": middle["tensors"],
    }
    spent["ray"] = max(0.0, total - sum(spent.values()))
    rows: list[Row] = [
        {
            "transport": transport,
            "stage": stage,
            "cpu_ms_per_sample": spent[stage],
            "low": min(pieces[stage]) if stage in pieces else None,
            "high": max(pieces[stage]) if stage in pieces else None,
            "share": spent[stage] / total,
        }
        for stage in STAGES
    ]
    for role in ROLES:
        used = statistics.median(whole[role])
        rows.append(
            {
                "transport": transport,
                "stage": f"by process: {role}",
                "cpu_ms_per_sample": used,
                "low": min(whole[role]),
                "high": max(whole[role]),
                "share": used / total,
            }
        )
    rows.append(
        {
            "transport": transport,
            "stage": "whole",
            "cpu_ms_per_sample": total,
            "low": min(whole["cpu_ms"]),
            "high": max(whole["cpu_ms"]),
            "share": 1.0,
            "samples_per_s": statistics.median(whole["samples_per_s"]),
        }
    )
    return rows


def draw(axes: Axes, rows: Sequence[Row]) -> None:
    """One bar a stage, side by side for the transports."""
    transports = list(dict.fromkeys(row["transport"] for row in rows))
    width = 0.8 / len(transports)
    for number, transport in enumerate(transports):
        of_stage = {row["stage"]: row["cpu_ms_per_sample"] for row in rows if row["transport"] == transport}
        places = np.arange(len(STAGES)) + (number - (len(transports) - 1) / 2) * width
        label = f"{transport}: {of_stage['whole']:.2f} ms in all"
        axes.bar(places, [of_stage[stage] for stage in STAGES], width, label=label)
    axes.set_xticks(range(len(STAGES)), STAGES)
    axes.set(ylabel="client CPU ms a sample", title="Where a sample's time goes")
    axes.legend(fontsize="small")
