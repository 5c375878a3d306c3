"""What more cases, shards and ranks cost: the driver's time and memory, the first batch, and CPU time a sample."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray.cloudpickle
from matplotlib.axes import Axes
from ray.data.context import DataContext
from rich.console import Console

from ingest.cluster import connected_ray
from ingest.crop import CropConfig
from ingest.datasource import PairedVolumeDatasource
from ingest.errors import ConfigError
from ingest.index import index_cases
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig, sample_bytes, shard_weights
from ingest.plan import Indices, ShardConfig, TrainingPlan, block_batches, epochs_together, split_holdout
from ingest.transport import choose_transport

from .child import in_child
from .epochs import run_executions
from .place import patch_of, side_of
from .report import Report, Row, keeping, meta_of, spread, status_of
from .synthetic import linked_cases, synthetic_manifest
from .tree import TreeMeter, forget_peak, peak_rss_bytes, rss_bytes

T = TypeVar("T")

BATCH = 32
FLAT_WITHIN = 0.1

PLAN_FIELDS = {
    "cases": "{:,}",
    "shards": "{:,}",
    "load_s": "{:.2f}",
    "holdout_s": "{:.2f}",
    "plan_s": "{:.3f}",
    "tasks_s": "{:.2f}",
    "manifest_mb": "{:,.1f}",
    "peak_mb": "{:,.1f}",
    "tasks_mb": "{:,.1f}",
    "source_mb": "{:,.1f}",
}
COST_FIELDS = {
    "cases": "{:,}",
    "shard_cases": "{:,}",
    "shards": "{:,}",
    "ranks": "{}",
    "epochs": "{}",
    "executions": "{}",
    "cpu_us_per_sample": "{:,.0f}",
    "cpu_us_low": "{:,.0f}",
    "cpu_us_high": "{:,.0f}",
    "samples_per_s": "{:,.0f}",
    "first_batch_s": "{:.2f}",
    "next_first_batch_s": "{:.2f}",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Measure plans of millions of cases, and what a sample costs as cases, shards and ranks grow."""

    json: Path | None = None
    """Where the JSON goes; the picture goes beside it. None is benchmarks/results/scale.json."""

    seed: int = 0
    """Of the orders, and of the made-up sizes."""

    images: str = ""
    """URI of images of yours to measure the cost of a sample on; empty takes local files that share their contents."""

    labels: str = ""
    """URI of the labels."""

    pair_kb: int = 160
    """KiB of image and label together of the local files."""

    plan_cases: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    """Cases of the plans; their objects lie nowhere."""

    cost_cases: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Cases of the data sets that are read; empty leaves that out, and then Ray is not started."""

    middle_cases: int = 10_000
    """Cases of the data set on which shards and ranks are varied."""

    shard_cases: tuple[int, ...] = (192, 384)
    """Cases of a shard, beside the default; its limit in bytes grows along."""

    ranks: tuple[int, ...] = (1, 4)
    """Ranks, beside two."""

    executions: int = 3
    """Executions of Ray Data that each measurement takes after a first one, which is cold: the median counts. Each is
    an epoch, or as many smaller ones as a run reads on end that scores nothing meanwhile."""

    def __post_init__(self) -> None:
        for name in ("plan_cases", "cost_cases", "shard_cases", "ranks"):
            if any(value < 1 for value in getattr(self, name)):
                raise ConfigError(f"{name} must be 1 or more each; got {getattr(self, name)}")
        if self.executions < 1:
            raise ConfigError(f"executions must be 1 or more; got {self.executions}")
        if self.cost_cases and min(self.cost_cases) < BATCH * max(2, *self.ranks, 2):
            raise ConfigError(f"cost_cases must give every rank a batch of {BATCH}; got {self.cost_cases}")


def run(config: ScaleConfig, console: Console) -> int:
    """Measure, print, and write the JSON and the picture."""
    meta = meta_of(config.seed, pair_kb=config.pair_kb, batch=BATCH)
    plans: list[Row] = []
    costs: list[Row] = []
    failed: list[str] = []
    with keeping(plans, failed):
        plans.extend(  # what is measured before one fails stays in the list
            in_child("benchmarks.scale:measure_plan", cases=cases, seed=config.seed)
            for cases in console_track(config.plan_cases, console, "plan of {:,} cases")
        )
    with keeping(plans or costs, failed):
        if config.cost_cases:
            measure_costs(config, console, costs)
    report = Report(name="scale", rows=[*plans, *costs], meta=meta | {"verdicts": verdicts(plans, costs)})
    Report(name="scale: plans", rows=plans, meta=meta).print(console, PLAN_FIELDS)
    if costs:
        Report(name="scale: cost of a sample", rows=costs, meta=meta).print(console, COST_FIELDS)
    for line in report.meta["verdicts"]:
        console.print(line)
    for file in report.save(config.json, lambda axes: draw(axes, costs)):
        console.print(f"wrote {file}")
    return status_of(failed)


def console_track(values: Sequence[T], console: Console, what: str) -> Sequence[T]:
    """The same values, each said on the console when its turn comes."""

    def tell() -> Any:
        for value in values:
            console.print(what.format(value), style="dim")
            yield value

    return tell()


def measure_plan(*, cases: int, seed: int) -> dict[str, Any]:
    """In a process of its own: what a driver does before the first object is read.

    Returns:
        Seconds for loading a manifest, splitting it, planning an execution and making its read tasks; MB of the
        manifest, of the most that planning held above it, and of what is pickled: all tasks, and the data source.
    """
    manifest = synthetic_manifest(cases, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        uri = f"{folder}/manifest.parquet"
        manifest.save(uri)
        load_s, _ = timed(lambda: Manifest.load(uri))
    forget_peak()
    before_bytes = rss_bytes()
    holdout_s, (candidates, _) = timed(lambda: split_holdout(seed, manifest.subjects().numbers, 0.1))
    data = DataConfig(seed=seed, crop=CropConfig(patch=(32, 32, 32)))
    planner = planner_of(manifest, data, candidates, ranks=2)
    epochs = range(epochs_together(manifest.case_bytes()[candidates], data.shards))
    plan_s, plan = timed(lambda: planner(epochs, np.zeros(0, dtype=np.int64)))
    source = PairedVolumeDatasource(manifest, planner, executions=[epochs], block=BATCH * planner.batches)
    tasks_s, tasks = timed(lambda: source.get_read_tasks(2, data_context=DataContext.get_current()))
    peak_bytes = peak_rss_bytes() - before_bytes
    assert len(tasks) == plan.num_shards
    return {
        "kind": "plan",
        "cases": cases,
        "shards": plan.num_shards,
        "load_s": load_s,
        "holdout_s": holdout_s,
        "plan_s": plan_s,
        "tasks_s": tasks_s,
        "manifest_mb": manifest.table.nbytes / 1e6,
        "peak_mb": peak_bytes / 1e6,
        "tasks_mb": sum(len(ray.cloudpickle.dumps(task)) for task in tasks) / 1e6,
        "source_mb": len(ray.cloudpickle.dumps(source)) / 1e6,
    }


def planner_of(manifest: Manifest, data: DataConfig, candidates: Indices, *, ranks: int) -> TrainingPlan:
    """What plans the epochs of such a run, as `training_dataset` has it."""
    cases = len(candidates) * epochs_together(manifest.case_bytes()[candidates], data.shards)
    return TrainingPlan(
        case_bytes=shard_weights(manifest, data),
        seed=data.seed,
        shards=data.shards,
        candidates=candidates,
        multiple=ranks * BATCH,
        batch=BATCH,
        ranks=ranks,
        batches=block_batches(cases, BATCH, ranks, BATCH * sample_bytes(data), data.shards),
    )


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a call took, and its answer."""
    started = time.perf_counter()
    answer = function()
    return time.perf_counter() - started, answer


def measure_costs(config: ScaleConfig, console: Console, rows: list[Row]) -> None:
    """Add one row a number of cases, then a row a size of shards and a row a number of ranks."""
    default = ShardConfig().shard_cases
    plans = [(cases, default, 2, False) for cases in config.cost_cases]
    plans += [(min(config.cost_cases), default, 2, True)]
    plans += [(config.middle_cases, shard_cases, 2, False) for shard_cases in config.shard_cases]
    plans += [(config.middle_cases, default, ranks, False) for ranks in config.ranks]
    with tempfile.TemporaryDirectory() as folder:
        given = None
        if config.images or config.labels:
            given = index_cases(config.images, config.labels).manifest
            plans = sorted({(min(cases, len(given)), *rest) for cases, *rest in plans})
        for cases, shard_cases, ranks, alone in plans:
            how = ", an epoch at a time" if alone else ""
            console.print(f"{cases:,} cases{how}, shards of {shard_cases}, {ranks} ranks", style="dim")
            if given is None:
                manifest, patch = linked_cases(cases, config.pair_kb), patch_of(side_of(config.pair_kb))
            else:
                manifest, patch = dataclasses.replace(given, table=given.table.slice(0, cases)), (32, 32, 32)
            uri = f"{folder}/{cases}.parquet"
            if not os.path.exists(uri):  # noqa: PTH110
                manifest.save(uri)
            rows.append(
                in_child(
                    "benchmarks.scale:measure_cost",
                    manifest_uri=uri,
                    patch=patch,
                    shard_cases=shard_cases,
                    ranks=ranks,
                    alone=alone,
                    executions=config.executions,
                    seed=config.seed,
                )
            )


def measure_cost(
    *, manifest_uri: str, patch: Sequence[int], shard_cases: int, ranks: int, alone: bool, executions: int, seed: int
) -> dict[str, Any]:
    """In a process of its own: executions of a data set, each of one epoch where `alone`, after a first, cold one."""
    depth, height, width = patch
    data = DataConfig(
        seed=seed,
        holdout_fraction=0,
        crop=CropConfig(patch=(depth, height, width)),
        shards=_shards_of(shard_cases, alone=alone),
    )
    with connected_ray(), TreeMeter() as meter:
        load_s, (manifest, data) = timed(lambda: _opened(manifest_uri, data))
        timings = run_executions(manifest, data, ranks=ranks, batch=BATCH, executions=1 + executions, meter=meter)
    together = timings[0].epochs
    planner = planner_of(manifest, data, np.arange(len(manifest)), ranks=ranks)
    cpu_us = spread([timing.cpu_s / timing.samples * 1e6 for timing in timings[1:]])
    return {
        "kind": "cost",
        "cases": len(manifest),
        "shards": planner(range(together), np.zeros(0, dtype=np.int64)).num_shards,
        "shard_cases": shard_cases,
        "ranks": ranks,
        "epochs": together,
        "executions": executions,
        "alone": alone,
        "cpu_us_per_sample": cpu_us["median"],
        "cpu_us_low": cpu_us["low"],
        "cpu_us_high": cpu_us["high"],
        "samples_per_s": spread([timing.samples / timing.wall_s for timing in timings[1:]])["median"],
        "first_batch_s": load_s + timings[0].first_batch_s,
        "next_first_batch_s": spread([timing.first_batch_s for timing in timings[1:]])["median"],
    }


def _shards_of(shard_cases: int, *, alone: bool) -> ShardConfig:
    default = ShardConfig(execution_cases=1) if alone else ShardConfig()
    shard_bytes = default.shard_bytes * max(shard_cases, default.shard_cases) // default.shard_cases
    return dataclasses.replace(default, shard_cases=shard_cases, shard_bytes=shard_bytes)


def _opened(manifest_uri: str, data: DataConfig) -> tuple[Manifest, DataConfig]:
    manifest = Manifest.load(manifest_uri)
    return manifest, dataclasses.replace(data, store=choose_transport(manifest, data.store).store)


def verdicts(plans: Sequence[Row], costs: Sequence[Row]) -> list[str]:
    """The targets in words, each with the numbers that decide it."""
    lines = []
    for row in plans:
        if row["cases"] == 1_000_000:
            plan_s = row["holdout_s"] + row["plan_s"] + row["tasks_s"]
            held = plan_s <= 2 and row["peak_mb"] <= 1000
            lines.append(
                f"plan of 1 M cases: {plan_s:.2f} s (split, order, shards, tasks) and {row['peak_mb']:,.0f} MB above "
                f"its manifest; target 2 s and 1 GB: {_word(held)}"
            )
    ladder = ladder_of(costs)
    if len(ladder) > 1:
        per_sample = [row["cpu_us_per_sample"] for row in ladder]
        spread_of_all = max(per_sample) / min(per_sample) - 1
        lines.append(
            f"CPU a sample from {ladder[0]['cases']:,} to {ladder[-1]['cases']:,} cases: "
            f"{', '.join(f'{us:,.0f}' for us in per_sample)} us, the most {spread_of_all:.0%} above the least; flat "
            f"within {FLAT_WITHIN:.0%}: {_word(spread_of_all <= FLAT_WITHIN)} (in executions of "
            f"{', '.join(str(row['epochs']) for row in ladder)} epochs, as a run reads that scores nothing meanwhile)"
        )
    lines += [
        f"an epoch at a time, as a run reads that scores after each: {row['cpu_us_per_sample']:,.0f} us of "
        f"{row['cases']:,} cases"
        for row in costs
        if row["alone"]
    ]
    for row in ladder[-1:]:
        held = row["first_batch_s"] <= 3 and row["next_first_batch_s"] <= 1
        lines.append(
            f"first batch of {row['cases']:,} cases {row['first_batch_s']:.2f} s after Ray is up, of later ones "
            f"{row['next_first_batch_s']:.2f} s; target for 100,000: 3 s and 1 s: {_word(held)}"
        )
    return lines


def ladder_of(costs: Sequence[Row]) -> list[Row]:
    """The rows that differ by their cases alone, ascending."""
    default = ShardConfig().shard_cases
    alike = [row for row in costs if row["shard_cases"] == default and row["ranks"] == 2 and not row["alone"]]
    return sorted(alike, key=lambda row: row["cases"])


def _word(held: bool) -> str:
    return "yes" if held else "no"


def draw(axes: Axes, costs: Sequence[Row]) -> None:
    """CPU a sample against cases, with the spread over epochs; other shards and ranks as points."""
    ladder = ladder_of(costs)
    for row in costs:
        if row not in ladder:
            label = f"{row['shard_cases']} cases a shard, {row['ranks']} ranks{', alone' if row['alone'] else ''}"
            axes.plot(row["cases"], row["cpu_us_per_sample"], "x", label=label)
    if ladder:
        middle = np.array([row["cpu_us_per_sample"] for row in ladder])
        low, high = (np.array([row[key] for row in ladder]) for key in ("cpu_us_low", "cpu_us_high"))
        axes.errorbar([row["cases"] for row in ladder], middle, [middle - low, high - middle], marker="o", capsize=4)
        if len(costs) > len(ladder):
            axes.legend(fontsize="small")
    axes.set(xscale="log", xlabel="cases", ylabel="CPU us a sample", title="What a sample costs")
    axes.set_ylim(bottom=0)
