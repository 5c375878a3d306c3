"""Samples a second, client CPU a sample, first batch and memory: voxflux's transports, the peers, and the floor."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from ingest.errors import ConfigError, IngestError
from ingest.index import index_cases

from .child import in_child
from .peers import own_venv
from .peers.needs import check_needs
from .peers.work import Opened, Tensors, Transform, Work
from .place import Place, are_made, folder_of, opened, patch_of, side_of
from .report import Report, Row, meta_of, spread
from .room import check_room, together
from .tree import TreeMeter

Loader = Literal[
    "ours-auto", "ours-direct", "ours-compose", "ours-local", "reference", "reference-readonly", "ray-stock",
    "torch-obstore", "litdata-raw", "mosaic", "floor", "local-loop", "ours-boxes", "ours-whole",
]  # fmt: skip
LOADERS: tuple[Loader, ...] = Loader.__args__  # type: ignore[attr-defined]
OTHER_PEERS = ("torch-obstore", "litdata-raw", "mosaic")
LOCAL = ("ours-local", "local-loop")
IN_PART = ("ours-boxes", "ours-whole")  # differ from ours-auto only where volumes are large
Child = Callable[..., dict[str, Any]]
WARM_UP_S = 3.0
LEAST_BATCHES = 4
LARGE_KB = 10 * 2**10  # of pairs whose images are read in part
FIELDS = {
    "loader": "{}",
    "latency_ms": "{:g}",
    "pair_kb": "{}",
    "pairs": "{:,}",
    "samples_per_s": "{:,.0f}",
    "samples_per_s_low": "{:,.0f}",
    "samples_per_s_high": "{:,.0f}",
    "mb_per_s": "{:,.1f}",
    "client_cpu_ms_per_sample": "{:.3f}",
    "first_batch_s": "{:.2f}",
    "peak_rss_mb": "{:,.0f}",
    "above_idle_mb": "{:,.0f}",
}
IN_FLIGHT_NEAR, IN_FLIGHT_FAR = 16, 64  # what was fastest for plain obstore (FACTS section 10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Measure how fast pairs become batches of tensors, and what that costs."""

    json: Path | None = None
    """Where the JSON goes; the picture goes beside it. None is benchmarks/results/throughput.json."""

    seed: int = 0
    """Of the orders of cases and of loaders, and of the transforms."""

    images: str = ""
    """URI of images of yours, measured as they are; empty takes generated pairs on the embedded server."""

    labels: str = ""
    """URI of the labels."""

    pairs: int = 4800
    """Generated pairs."""

    pair_kb: tuple[int, ...] = (160,)
    """KiB of image and label together."""

    latency_ms: tuple[float, ...] = (0.0, 30.0)
    """Put in front of every request to the embedded server."""

    transform: Transform = "full"
    """`none` decodes only, `crop` places the patch, `full` augments it."""

    loaders: tuple[Loader, ...] = LOADERS
    """What to measure."""

    rounds: int = 5
    """Each measures every loader once, in another order."""

    batch: int = 32
    """Samples of a batch."""

    workers: int = 2
    """Processes of the DataLoaders."""

    seconds: float = 4.0
    """About as long takes an epoch at the most: a loader that is slow while it warms up gets fewer pairs."""

    def __post_init__(self) -> None:
        if min(self.pairs, self.rounds, self.batch, self.workers, *self.pair_kb) < 1 or self.seconds <= 0:
            raise ConfigError(f"expected positive sizes and numbers, found {self}")


def open_loader(name: Loader, work: Work) -> Opened:
    """The loader of that name, ready."""
    from .peers import floor, litdata_raw, mosaic, ours, ray_stock, reference, torch_obstore

    factories: dict[Loader, Callable[[Work], Opened]] = {
        "ours-auto": functools.partial(ours.opened, transport="auto"),
        "ours-direct": functools.partial(ours.opened, transport="direct"),
        "ours-compose": functools.partial(ours.opened, transport="compose"),
        "ours-local": functools.partial(ours.opened, transport="direct"),
        "ours-boxes": functools.partial(ours.opened, transport="auto", boxes=True),
        "ours-whole": functools.partial(ours.opened, transport="auto", slabs="never"),
        "reference": functools.partial(reference.opened, composed=True),
        "reference-readonly": functools.partial(reference.opened, composed=False),
        "ray-stock": ray_stock.opened,
        "torch-obstore": torch_obstore.opened,
        "litdata-raw": litdata_raw.opened,
        "mosaic": mosaic.opened,
        "floor": floor.opened,
        "local-loop": floor.opened_local,
    }
    return factories[name](work)


def measure(loader: Loader, work: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """One epoch of one loader, in this process, after small ones and some of its length that warm it up.

    What is timed runs from asking for the epoch to its last batch as tensors; processes are up by then, connections
    open. CPU time is that of this process and all below it, between the same two instants. An epoch is never broken
    off, which would charge a loader for batches that it made and did not hand over: one that is slow while it warms
    up is asked for fewer pairs.
    """
    what = Work(**{**work, "patch": tuple(work["patch"])})
    pairs, pair_bytes = size_of(what)
    what = bounded(what, pair_bytes)
    with TreeMeter() as meter, open_loader(loader, what) as epoch:
        least = min(pairs, LEAST_BATCHES * what.batch)
        started = time.monotonic()
        warm = drain(epoch(least), what)  # starts processes, which import what they need
        limit = fitting(warm, seconds, what.batch, least, min(8 * what.batch, max(least, pairs // 4)))
        warm = drain(epoch(limit), what)
        while time.monotonic() - started < WARM_UP_S:
            warm = drain(epoch(limit), what)
        settle(meter)
        idle_bytes = meter.rss_bytes()
        # Long enough that every process takes part, which a small epoch does not ask of it. No pause before the timed
        # one: Ray ends processes that idle for a second.
        spent_s = warm[2]
        while spent_s < seconds:
            warm = drain(epoch(fitting(warm, seconds, what.batch, limit, pairs)), what)
            spent_s += warm[2]
        limit = fitting(warm, seconds, what.batch, least, pairs)
        cpu_s = meter.cpu_s()
        samples, first_s, last_s = drain(epoch(limit if limit < pairs else None), what)
        cpu_s = meter.cpu_s() - cpu_s
        return {
            "pairs": pairs,
            "pair_kb": round(pair_bytes / 1024),
            "samples": samples,
            "samples_per_s": samples / last_s,
            "client_cpu_ms_per_sample": 1e3 * cpu_s / samples,
            "first_batch_s": first_s,
            "peak_rss_mb": meter.peak_rss_bytes() / 1e6,
            "above_idle_mb": (meter.peak_rss_bytes() - idle_bytes) / 1e6,
        }


def bounded(work: Work, pair_bytes: float) -> Work:
    """The same work, with no more pairs at once than fit into memory, nor requests than these have."""
    most = together(pair_bytes, work.workers)
    return dataclasses.replace(work, together=most, in_flight=min(work.in_flight, 2 * most))


def drain(batches: Iterator[Tensors], work: Work) -> tuple[int, float, float]:
    """Samples of an epoch, and the seconds from now to its first and to its last batch."""
    started = time.perf_counter()
    samples, first_s, last_s = 0, 0.0, 0.0
    for image, label in batches:
        samples += len(image)
        last_s = time.perf_counter() - started
        first_s = first_s or last_s
        if tuple(image.shape[2:]) != work.patch or image.shape != label.shape:
            raise ConfigError(f"expected samples of {work.patch}, found {image.shape} and {label.shape}")
    return samples, first_s, last_s


def fitting(warm: tuple[int, float, float], seconds: float, batch: int, least: int, most: int) -> int:
    """So many pairs, in whole batches, as a loader should take in that time, by what it did in a shorter epoch.

    Its start counts: some loaders do all of their work before the first batch.
    """
    given, _, last_s = warm
    return min(most, max(least, round(seconds * given / last_s / batch) * batch))


def size_of(work: Work) -> tuple[int, float]:
    """How many pairs there are, and the mean bytes of one."""
    manifest = index_cases(work.images, work.labels).manifest
    return len(manifest), float(manifest.case_bytes().mean())


def into_page_cache(folder: Path) -> None:
    """Read all files below a folder, so that no loader is measured on a disk: kernels drop pages that nobody reads."""
    for path in folder.rglob("*.npy"):
        path.read_bytes()


def settle(meter: TreeMeter, longest_s: float = 5.0) -> None:
    """Wait until the processes that were started (Ray's agents import for seconds) use next to no CPU."""
    deadline = time.monotonic() + longest_s
    quiet = False
    while not quiet and time.monotonic() < deadline:
        before_s = meter.cpu_s()
        time.sleep(0.5)
        quiet = meter.cpu_s() - before_s < 0.05


def run(config: ThroughputConfig, console: Console, child: Child = in_child) -> int:
    """Measure, print, and write the results.

    A loader that fails is left out of the rounds that follow. What the others gave is kept, and the status is 1.

    Args:
        config: what to measure.
        console: where to print.
        child: calls `measure` in a process of its own.

    Raises:
        ConfigError: no loader can read the place, or the machine has no room for the pairs.
        MissingDependencyError: a loader's package is missing.
    """
    meta = meta_of(config.seed, transform=config.transform, batch=config.batch, rounds=config.rounds)
    rng = random.Random(config.seed)
    rows: list[Row] = []
    generated = not config.images
    if generated or config.images.startswith("gs://"):
        check_needs(config.loaders)
    for pair_kb in config.pair_kb if generated else ():
        batch_bytes = 5 * config.batch * math.prod(patch_of(side_of(pair_kb)))
        check_room(
            pairs=config.pairs,
            pair_bytes=pair_kb * 1024,
            batch_bytes=batch_bytes,
            workers=config.workers,
            folder=folder_of(config.pairs, pair_kb),
            made=are_made(config.pairs, pair_kb),
        )
    for pair_kb in config.pair_kb if generated else (0,):
        for latency_ms in config.latency_ms if generated else (0.0,):
            place = opened(
                images=config.images,
                labels=config.labels,
                pairs=config.pairs,
                pair_kb=pair_kb,
                latency_ms=latency_ms,
            )
            with place as where:
                rows += _rounds(config, where, pair_kb, latency_ms, rng, console, child)
    if not rows:
        raise ConfigError(
            f"expected loaders that can read {config.images}, found {', '.join(config.loaders)}; choose "
            f"{', '.join(LOCAL)} for local files, and any other for gs://"
        )
    return _reported(config, console, rows, meta)


def _reported(config: ThroughputConfig, console: Console, rows: list[Row], meta: dict[str, Any]) -> int:
    """Print and write the rows; the exit status."""
    measured = [row for row in rows if "samples_per_s" in row]
    failed = [row for row in rows if "failed" in row]
    found = targets(measured)
    report = Report(name="throughput", rows=rows, meta={**meta, "targets": found})
    report.print(console, FIELDS | ({"failed": "{}"} if failed else {}))
    table = Table("target", "wanted", "found", "held", title="Ratios of one run")
    for target in found:
        table.add_row(target["name"], target["wanted"], f"{target['found']:.2f}", "yes" if target["held"] else "NO")
    console.print(table)
    for path in report.save(config.json, lambda axes: draw(axes, measured)):
        console.print(f"wrote {path}")
    for row in failed:
        print(
            f"error: expected a measurement of {row['loader']} at {row['latency_ms']:g} ms, found: {row['failed']}; "
            "its own error stands above. Leave it out of --loaders, or mend it",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _rounds(
    config: ThroughputConfig,
    place: Place,
    pair_kb: int,
    latency_ms: float,
    rng: random.Random,
    console: Console,
    child: Child,
) -> list[Row]:
    on_gs = place.images.startswith("gs://")
    loaders = [
        name
        for name in config.loaders
        if (name not in LOCAL and on_gs) or (name in LOCAL and (not on_gs or (place.folder and latency_ms == 0)))
        if name not in IN_PART or not place.folder or pair_kb >= LARGE_KB
    ]
    found: dict[Loader, list[dict[str, Any]]] = {name: [] for name in loaders}
    failed: dict[Loader, str] = {}
    for number in range(config.rounds):
        for name in rng.sample(loaders, len(loaders)):
            if name in failed:
                continue
            local = name in LOCAL
            work = Work(
                images=str(place.folder / "images") if local and place.folder else place.images,
                labels=str(place.folder / "labels") if local and place.folder else place.labels,
                patch=place.patch,
                batch=config.batch,
                transform=config.transform,
                workers=config.workers,
                in_flight=IN_FLIGHT_FAR if latency_ms else IN_FLIGHT_NEAR,
                seed=config.seed + number,
            )
            if place.folder:
                into_page_cache(place.folder)
            try:
                place.check()
                result = child(
                    "benchmarks.throughput:measure",
                    place.env,
                    own_venv.python_of(name) if name in own_venv.REQUIREMENTS else None,
                    loader=name,
                    work=dataclasses.asdict(work),
                    seconds=config.seconds,
                )
            except IngestError as error:
                failed[name] = f"in round {number + 1}: {_briefly(error)}"
                console.print(f"round {number + 1}, {latency_ms:g} ms, {name}: failed, and is left out from now on")
                continue
            found[name].append(result)
            console.print(
                f"round {number + 1}, {latency_ms:g} ms, {name}: {result['samples_per_s']:,.0f} samples/s, "
                f"{result['client_cpu_ms_per_sample']:.2f} ms of CPU a sample"
            )
    return [
        _row(name, results, pair_kb, latency_ms, config) | ({"failed": failed[name]} if name in failed else {})
        for name, results in found.items()
    ]


def _briefly(error: IngestError) -> str:
    """The end of an error in one line: the server's own, or the status of the process that measured."""
    text = " ".join(str(error).split())
    return text.rpartition("found ")[2].partition(";")[0] if "to end well" in text else text[:300]


def _row(
    name: str, results: list[dict[str, Any]], pair_kb: int, latency_ms: float, config: ThroughputConfig
) -> dict[str, Any]:
    if not results:
        return {"loader": name, "latency_ms": latency_ms, "pair_kb": pair_kb}
    pair_kb = pair_kb or results[0]["pair_kb"]
    row: dict[str, Any] = {
        "loader": name,
        "latency_ms": latency_ms,
        "pair_kb": pair_kb,
        "pairs": results[0]["pairs"],
    }
    for field in ("samples_per_s", "client_cpu_ms_per_sample", "first_batch_s", "peak_rss_mb", "above_idle_mb"):
        values = spread([result[field] for result in results])
        row |= {field: values["median"], f"{field}_low": values["low"], f"{field}_high": values["high"]}
    row["mb_per_s"] = row["samples_per_s"] * pair_kb * 1024 / 1e6
    return row | {"transform": config.transform, "rounds": len(results)}


def targets(rows: list[Row]) -> list[dict[str, Any]]:
    """The ratios that the project holds itself to, of rows of one run; those whose rows are there.

    Returns:
        For each its `name`, what is `wanted`, the value `found`, and whether it is `held`.
    """
    small, large = (
        {(row["loader"], row["latency_ms"]): row for row in rows if (row["pair_kb"] >= LARGE_KB) == in_part}
        for in_part in (False, True)
    )
    found: list[dict[str, Any]] = []

    def ratio(
        name: str, field: str, ours: tuple[str, float], other: tuple[str, float], least: float, most: float
    ) -> None:
        if ours in small and other in small:
            value = small[ours][field] / small[other][field]
            wanted = f">= {least:g}" if least else f"<= {most:g}"
            found.append({"name": name, "wanted": wanted, "found": value, "held": least <= value <= most})

    speed, cpu, no_end = "samples_per_s", "client_cpu_ms_per_sample", float("inf")
    for latency_ms in sorted({latency_ms for _, latency_ms in small if latency_ms}):
        ours, at = ("ours-auto", latency_ms), f"samples/s at {latency_ms:g} ms, auto against"
        ratio(f"{at} reference", speed, ours, ("reference", latency_ms), 2.5, no_end)
        ratio(f"{at} reference without write permission", speed, ours, ("reference-readonly", latency_ms), 15, no_end)
        ratio(f"{at} ray-stock", speed, ours, ("ray-stock", latency_ms), 5, no_end)
        others = [(name, at_ms) for name, at_ms in small if at_ms == latency_ms and name in OTHER_PEERS]
        if others:
            best = max(others, key=lambda other: small[other][speed])
            ratio(f"{at} {best[0]}, the best other peer", speed, ours, best, 1.2, no_end)
    auto, at = ("ours-auto", 0.0), "client CPU a sample at 0 ms, auto against"
    ratio(f"{at} floor", cpu, auto, ("floor", 0.0), 0, 1.5)
    ratio(f"{at} reference", cpu, auto, ("reference", 0.0), 0, 0.6)
    ratio(f"{at} reference without write permission", cpu, auto, ("reference-readonly", 0.0), 0, 0.25)
    local = small.get(("ours-local", 0.0))
    if local:
        per_core = 1e3 / local[cpu]
        found.append(
            {
                "name": "local files, samples/s of a core's CPU",
                "wanted": ">= 1000",
                "found": per_core,
                "held": per_core >= 1000,
            }
        )
    if local and ("local-loop", 0.0) in small:
        share = small["local-loop", 0.0][cpu] / local[cpu]
        name = "local files, samples a CPU second against a np.load loop"
        found.append({"name": name, "wanted": ">= 0.6", "found": share, "held": share >= 0.6})
    return found + _targets_of_large(large)


def _targets_of_large(large: dict[tuple[str, float], Row]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for latency_ms in sorted({latency_ms for _, latency_ms in large}):
        slabs, whole = (large.get((name, latency_ms)) for name in ("ours-boxes", "ours-whole"))
        if slabs:
            name, above_mb = f"large volumes at {latency_ms:g} ms, MB above idle", slabs["above_idle_mb"]
            found.append({"name": name, "wanted": "<= 2000", "found": above_mb, "held": above_mb <= 2000})
        if slabs and whole:
            value = slabs["samples_per_s"] / whole["samples_per_s"]
            name = f"large volumes at {latency_ms:g} ms, samples/s of slabs against whole reads"
            found.append({"name": name, "wanted": ">= 3", "found": value, "held": value >= 3})
    return found


def draw(axes: Axes, rows: list[Row]) -> None:
    """Samples a second, a bar a loader and latency."""
    names = list(dict.fromkeys(row["loader"] for row in rows))
    groups = list(dict.fromkeys((row["latency_ms"], row["pair_kb"]) for row in rows))
    if not groups:
        axes.set_title("every loader failed")
        return
    height = 0.8 / len(groups)
    for number, (latency_ms, pair_kb) in enumerate(groups):
        some = {row["loader"]: row for row in rows if (row["latency_ms"], row["pair_kb"]) == (latency_ms, pair_kb)}
        places = [names.index(name) + number * height for name in some]
        values = [row["samples_per_s"] for row in some.values()]
        spans = [
            [abs(row["samples_per_s"] - row[f"samples_per_s_{end}"]) for row in some.values()]
            for end in ("low", "high")
        ]
        axes.barh(places, values, height, xerr=spans, label=f"{latency_ms:g} ms, pairs of {pair_kb} KiB")
    axes.set_yticks([place + height * (len(groups) - 1) / 2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("samples/s, median and range of the rounds")
    axes.legend()
