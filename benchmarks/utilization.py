"""Would an accelerator starve? An emulated one, sleeping through each step, in a real Ray Train loop on the pipeline.

AU is MLPerf Storage's formula, once over a rank's whole run with all its epochs on end: only the run's very first step
is left out, so that the first batches of later epochs count as waiting. As in DLIO, ranks meet after every step, and
what they wait for each other is not compute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import ray.data
import ray.train
import ray.train.torch
from matplotlib.axes import Axes
from rich.console import Console

from ingest.cluster import connected_ray
from ingest.crop import CropConfig, Shape
from ingest.errors import ConfigError
from ingest.execution import execution_options
from ingest.index import index_cases
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig, training_dataset, warm_reader
from ingest.plan import epochs_together
from ingest.stores.base import StoreConfig
from ingest.transport import choose_transport
from train.ahead import TURNS
from train.launch import environment

from .emulated import EmulatedJob, RankReport, emulated_loop
from .place import Place, opened
from .profiles import PROFILES
from .report import Report, Row, keeping, meta_of, status_of

PASSING_AU = 0.9
FIELDS = {
    "profile": "{}",
    "share_of_rate": "{:.2f}",
    "step_s": "{:.4f}",
    "demanded_samples_per_s": "{:,.0f}",
    "samples_per_s": "{:,.0f}",
    "au": "{:.1%}",
    "au_by_epoch": "{:.1%}",
    "stall_p50_s": "{:.4f}",
    "stall_p95_s": "{:.4f}",
    "stall_p99_s": "{:.4f}",
    "epoch_first_batch_s": "{:.3f}",
    "sync_s": "{:.4f}",
    "ranks": "{}",
    "batch": "{}",
    "steps": "{}",
    "epochs": "{}",
    "executions": "{}",
    "scale_down": "{:g}",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UtilizationConfig:
    """Emulate accelerators in a real Ray Train loop, and see how busy the pipeline keeps them."""

    json: Path | None = None
    """Where the JSON goes; the picture goes beside it. None is benchmarks/results/utilization.json."""

    seed: int = 0
    """Of the order, the crops and the augmentations."""

    images: str = ""
    """URI of images of yours; empty takes generated pairs on the embedded server."""

    labels: str = ""
    """URI of the labels."""

    pairs: int = 4800
    """Generated pairs of the sweep."""

    pair_kb: int = 160
    """KiB of image and label together of the sweep's pairs."""

    latency_ms: float = 0.0
    """Put in front of every request to the embedded server."""

    profile: tuple[Literal["sweep", "demo-v100", "unet3d-h100"], ...] = ("sweep", "demo-v100", "unet3d-h100")
    """What to run: a sweep of step times around the measured ingest rate, and known training jobs."""

    shares: tuple[float, ...] = (0.5, 0.75, 0.9, 1.0, 1.25)
    """Demanded samples/s of the sweep, as shares of the measured ingest rate."""

    control: bool = False
    """Measure each share of the sweep also with batches out of memory: what the emulation itself takes of AU."""

    ranks: int = 2
    """Training processes."""

    batch: int = 32
    """Samples a rank and step of the sweep."""

    steps: int = 300
    """Steps of each rank at the least, in whole epochs and at least two executions of Ray Data."""

    together: int | None = None
    """Epochs that one execution reads at the most; None as many as a run that scores nothing meanwhile. 1 is as in a
    run that scores held-out cases after each."""

    scale_down: float = 32.0
    """Divides the size of unet3d-h100's volumes: 147 MB at 2 x 7 / 0.323 s would be 6.4 GB/s."""

    cpus_per_rank: float = 0.25
    """CPUs that Ray reserves for a training process, which here sleeps."""

    task_cpus: float = 0.75
    """CPUs that Ray reserves for one read task."""

    prefetch_batches: int = 3
    """Batches made ready ahead of the step."""

    store: StoreConfig = dataclasses.field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        if min(self.ranks, self.batch, self.prefetch_batches) < 1 or self.steps < 2:
            raise ConfigError(
                f"expected ranks, batch and prefetch_batches of 1, steps of 2 or more, found {self}; raise them"
            )
        if self.together is not None and self.together < 1:
            raise ConfigError(f"expected together of 1 or more, found {self.together}; leave it out for the most")
        if not self.profile or any(share <= 0 for share in self.shares) or self.scale_down < 1:
            raise ConfigError(f"expected a profile, shares above 0 and a scale_down of 1 or more, found {self}")


def run(config: UtilizationConfig, console: Console) -> int:
    """Measure, print, and write the JSON and the picture."""
    console.print("AU formula; not an MLPerf result")
    meta = meta_of(
        config.seed,
        note="AU formula; not an MLPerf result",
        latency_ms=config.latency_ms,
        cpus_per_rank=config.cpus_per_rank,
        task_cpus=config.task_cpus,
    )
    rows: list[Row] = []
    failed: list[str] = []
    with keeping(rows, failed):
        if "sweep" in config.profile or config.images:
            with _data(config, config.pairs, config.pair_kb) as (place, folder):
                sweep(config, place, folder, console, rows)
        # If a measurement fails, those before it stay in the list.
        rows.extend(known_job(config, name, console) for name in config.profile if name != "sweep")
    report = Report(name="utilization", rows=rows, meta=meta)
    report.print(console, FIELDS)
    for file in report.save(config.json, lambda axes: draw(axes, rows)):
        console.print(f"wrote {file}")
    return status_of(failed)


@contextlib.contextmanager
def _data(config: UtilizationConfig, pairs: int, pair_kb: int) -> Iterator[tuple[Place, str]]:
    """Pairs, and Ray, both up; and a folder for what Ray Train keeps."""
    with (
        opened(
            images=config.images, labels=config.labels, pairs=pairs, pair_kb=pair_kb, latency_ms=config.latency_ms
        ) as place,
        environment(place.env),
        connected_ray(),
        tempfile.TemporaryDirectory(prefix="voxflux-utilization-") as folder,
    ):
        yield place, folder


def sweep(config: UtilizationConfig, place: Place, folder: str, console: Console, rows: list[Row]) -> None:
    """Add the ingest rate, with accelerators that compute nothing, then step times around it."""
    manifest, data = _indexed(config, place, place.patch)
    base = {"profile": "sweep", "scale_down": 1.0}
    free = measure(config, manifest, data, batch=config.batch, step_s=0.0, folder=folder)
    rate = free["samples_per_s"]
    console.print(f"ingest rate, with steps of 0 s: {rate:,.0f} samples/s", style="dim")
    rows += [base | free | {"profile": "rate", "au": None, "au_by_epoch": None}]
    for share in config.shares:
        step_s = config.ranks * config.batch / (share * rate)
        found = measure(config, manifest, data, batch=config.batch, step_s=step_s, folder=folder)
        console.print(f"{share:.2f} of it demanded, steps of {step_s:.4f} s: AU {found['au']:.1%}", style="dim")
        rows.append(base | found | {"share_of_rate": share})
        if config.control:
            found = measure(config, manifest, data, batch=config.batch, step_s=step_s, folder=folder, in_memory=True)
            console.print(f"the same with batches out of memory: AU {found['au']:.1%}", style="dim")
            rows.append(base | found | {"profile": "control", "share_of_rate": share})


def known_job(config: UtilizationConfig, name: str, console: Console) -> Row:
    """A profile's accelerators on data of its kind."""
    job = PROFILES[name]
    down = config.scale_down if name == "unet3d-h100" else 1.0
    edge = max(16, round(job.patch / down ** (1 / 3) / 16) * 16)
    with _data(config, job.pairs, round(job.pair_kb / down)) as (place, folder):
        manifest, data = _indexed(config, place, (edge, edge, edge))
        row = measure(config, manifest, data, batch=job.batch, step_s=job.step_s, folder=folder)
    console.print(f"{name} ({job.about}), volumes divided by {down:g}: AU {row['au']:.1%}", style="dim")
    return row | {"profile": name, "scale_down": down}


def _indexed(config: UtilizationConfig, place: Place, patch: Shape) -> tuple[Manifest, DataConfig]:
    manifest = index_cases(place.images, place.labels, config.store).manifest
    store = choose_transport(manifest, config.store).store
    data = DataConfig(
        seed=config.seed, holdout_fraction=0, task_cpus=config.task_cpus, crop=CropConfig(patch=patch), store=store
    )
    return manifest, data


def measure(
    config: UtilizationConfig,
    manifest: Manifest,
    data: DataConfig,
    *,
    batch: int,
    step_s: float,
    folder: str,
    in_memory: bool = False,
) -> dict[str, Any]:
    """Run the trainer once; Ray must be up."""
    steps_per_epoch = len(manifest) // (config.ranks * batch)
    if steps_per_epoch == 0:
        raise ConfigError(
            f"expected at least {config.ranks * batch} pairs, a batch of {batch} for each of {config.ranks} ranks, "
            f"found {len(manifest)}; give more pairs or lower --batch"
        )
    together = config.together or epochs_together(manifest.case_bytes(), data.shards)
    job = EmulatedJob(
        step_s=step_s,
        epochs=max(together + 1, math.ceil(config.steps / steps_per_epoch)),
        together=together,
        steps_per_epoch=steps_per_epoch,
        batch=batch,
        prefetch_batches=config.prefetch_batches,
        in_memory=in_memory,
    )
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # as train.launch has it
    trainer = ray.train.torch.TorchTrainer(
        emulated_loop,
        train_loop_config={"job": job},
        datasets={
            name: functools.partial(_dataset, manifest, data, job, config.ranks, turn)
            for turn, name in enumerate(TURNS[: len(job.executions())])
            if not in_memory
        },
        dataset_config=ray.train.DataConfig(execution_options=execution_options()),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.ranks, resources_per_worker={"CPU": config.cpus_per_rank}
        ),
        run_config=ray.train.RunConfig(name=f"emulated-{time.time_ns()}", storage_path=folder),
    )
    reports: list[RankReport] = trainer.fit().return_value
    return row_of(reports, step_s=step_s, batch=batch) | {"executions": len(job.executions())}


def _dataset(manifest: Manifest, data: DataConfig, job: EmulatedJob, ranks: int, turn: int) -> ray.data.Dataset:
    """As `train.planned` makes it."""
    if turn == 0:
        warm_reader()
    executions = job.executions()[turn :: len(TURNS)]
    return training_dataset(
        manifest, data, executions=executions, multiple=ranks * job.batch, batch=job.batch, ranks=ranks
    )


def row_of(reports: Sequence[RankReport], *, step_s: float, batch: int) -> dict[str, Any]:
    """All ranks' runs as one row: AU is their mean, rates add up, and the slowest rank's stalls count.

    Args:
        reports: one a rank.
        step_s: seconds of a step's emulated compute.
        batch: samples a rank and step.
    """
    wholes = [report.whole for report in reports]
    epochs = [epoch for report in reports for epoch in report.by_epoch]
    later = [epoch.first_batch_s for report in reports for epoch in report.by_epoch[1:]]
    return {
        "step_s": step_s,
        "demanded_samples_per_s": len(reports) * batch / step_s if step_s else None,
        # Without the run's first step, as in the formula: what it waits for is Ray's start.
        "samples_per_s": sum((each.samples - batch) / (each.wall_s - _known(each.first_batch_s)) for each in wholes),
        "au": _mean([each.au for each in wholes]),
        "au_by_epoch": _mean([each.au for each in epochs]),
        "stall_p50_s": max(_known(each.stall_p50_s) for each in wholes),
        "stall_p95_s": max(_known(each.stall_p95_s) for each in wholes),
        "stall_p99_s": max(_known(each.stall_p99_s) for each in wholes),
        "first_batch_s": max(_known(each.first_batch_s) for each in wholes),
        "epoch_first_batch_s": max(map(_known, later)) if later else None,
        "sync_s": max((each.wall_s - each.wait_s - each.compute_s) / each.steps for each in wholes),
        "ranks": len(reports),
        "batch": batch,
        "steps": min(each.steps for each in wholes),
        "epochs": len(reports[0].by_epoch),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _known(value: float | None) -> float:
    return 0.0 if value is None else value


def draw(axes: Axes, rows: Sequence[Row]) -> None:
    """AU against demanded samples/s, with the passing mark and the measured ingest rate."""
    for name in dict.fromkeys(row["profile"] for row in rows if row["au"] is not None):
        mine = [row for row in rows if row["profile"] == name]
        demanded = [row["demanded_samples_per_s"] for row in mine]
        axes.plot(demanded, [100 * row["au"] for row in mine], marker="o", label=name)
    axes.axhline(100 * PASSING_AU, color="grey", linestyle="--", label="90 %")
    for row in rows:
        if row["profile"] == "rate":
            axes.axvline(row["samples_per_s"], color="grey", linestyle=":", label="measured ingest rate")
    axes.set(xlabel="demanded samples/s", ylabel="AU, %", title="AU formula; not an MLPerf result")
    axes.set_ylim(0, 101)
    axes.set_xlim(left=0)
    axes.legend(fontsize="small")
