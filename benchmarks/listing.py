"""How fast a bucket is listed: page by page, in parallel, and as `auto` does it; where the one overtakes the other."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console

from ingest.emulator import EMULATOR_VARIABLE
from ingest.errors import ConfigError
from ingest.listing import list_objects
from ingest.stores import open_store
from ingest.stores.base import StoreConfig

from .child import in_child
from .listing_server import BUCKET, FOLDER, listing_server, object_name, object_size
from .report import Report, Row, keeping, meta_of, status_of

FIELDS = {
    "objects": "{:,}",
    "latency_ms": "{:g}",
    "method": "{}",
    "seconds": "{:.2f}",
    "seconds_low": "{:.2f}",
    "seconds_high": "{:.2f}",
    "client_cpu_s": "{:.2f}",
    "objects_per_s": "{:,.0f}",
    "complete": "{}",
    "fell_back": "{}",
}
# What makes `list_objects` list so: above how many objects Dataflux's parallel listing takes over.
ABOVE = {"plain": 2**62, "fast": 1, "auto": StoreConfig().fast_listing_above}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListingConfig:
    """Compare plain and parallel listing, by default on a synthetic server whose objects need no disk."""

    json: Path | None = None
    """Where the JSON goes; the picture goes beside it. None is benchmarks/results/listing.json."""

    seed: int = 0
    """Noted with the results; a listing has no randomness."""

    images: str = ""
    """URI of a place of yours to list as it is; empty lists the synthetic bucket."""

    objects: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    """Objects of the synthetic bucket."""

    latencies_ms: tuple[float, ...] = (0.0, 50.0)
    """Of every request to the synthetic server."""

    rounds: int = 3
    """Times that each is measured, in turn; the median counts."""

    few_rounds_from: int = 1_000_000
    """From so many objects on one round must do."""

    processes: int = StoreConfig().fast_listing_processes
    """Processes of the parallel listing."""

    def __post_init__(self) -> None:
        if any(not 0 < count <= 10**8 for count in self.objects) or any(ms < 0 for ms in self.latencies_ms):
            raise ConfigError(
                f"expected 1 to 100,000,000 objects and latencies of 0 or more, found {self.objects}, "
                f"{self.latencies_ms}"
            )
        if self.rounds < 1 or self.processes < 1:
            raise ConfigError(f"rounds and processes must be 1 or more; got {self.rounds}, {self.processes}")


def run(config: ListingConfig, console: Console) -> int:
    """Measure, print, and write the JSON and the picture."""
    meta = meta_of(config.seed, processes=config.processes, page=StoreConfig().list_page_size)
    rows: list[Row] = []
    failed: list[str] = []
    if config.images:
        rows += measure(config, config.images, config.rounds, {"latency_ms": None})
    else:
        with keeping(rows, failed):
            for latency_ms, objects in itertools.product(config.latencies_ms, config.objects):
                rounds = 1 if objects >= config.few_rounds_from else config.rounds
                console.print(f"{objects:,} objects, {latency_ms:g} ms a request", style="dim")
                with listing_server(objects, latency_ms) as url:
                    about = {"latency_ms": latency_ms}
                    rows += measure(config, f"gs://{BUCKET}/{FOLDER}", rounds, about, url=url, objects=objects)
    verdicts = verdicts_of(rows)
    report = Report(name="listing", rows=rows, meta=meta | {"verdicts": verdicts})
    report.print(console, FIELDS)
    for line in verdicts:
        console.print(line)
    for file in report.save(config.json, lambda axes: draw(axes, rows)):
        console.print(f"wrote {file}")
    return status_of(failed)


def measure(
    config: ListingConfig,
    uri: str,
    rounds: int,
    about: dict[str, Any],
    *,
    url: str | None = None,
    objects: int | None = None,
) -> list[Row]:
    """A row a method; each listing is in a process of its own, and the methods take turns."""
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in ABOVE}
    for _ in range(rounds):
        for method in ABOVE:
            env = {} if url is None else {EMULATOR_VARIABLE: url}
            found[method].append(
                in_child(
                    "benchmarks.listing:measure_once",
                    env,
                    uri=uri,
                    above=ABOVE[method],
                    processes=config.processes,
                    objects=objects,
                )
            )
    rows: list[Row] = []
    for method, each in found.items():
        seconds = [one["seconds"] for one in each]
        count = each[0]["found"] if objects is None else objects
        rows.append(
            {
                "objects": count,
                **about,
                "method": method,
                "seconds": statistics.median(seconds),
                "seconds_low": min(seconds),
                "seconds_high": max(seconds),
                "client_cpu_s": statistics.median(one["client_cpu_s"] for one in each),
                "objects_per_s": count / statistics.median(seconds),
                "complete": all(one["complete"] for one in each),
                "fell_back": any(one["fell_back"] for one in each),
            }
        )
    return rows


def measure_once(*, uri: str, above: int, processes: int, objects: int | None) -> dict[str, Any]:
    """In a process of its own: one listing, by `list_objects` as everybody calls it.

    Args:
        uri: of the place.
        above: how many objects are listed plainly first.
        processes: of the parallel listing.
        objects: that the synthetic bucket holds, against which the answer is held; None only looks for repetitions.
    """
    warned = _Warnings()
    logging.getLogger("ingest").addHandler(warned)
    config = StoreConfig(fast_listing_above=above, fast_listing_processes=processes)
    # By what the process and the children that it has waited for used: Dataflux forks, and waits for its workers.
    used_before, started = _used_s(), time.perf_counter()
    listed = list_objects(open_store(uri, config), progress=False)
    seconds, used_s = time.perf_counter() - started, _used_s() - used_before
    names = [meta.name for meta in listed]
    complete = len(set(names)) == len(names)
    if objects is not None:
        cut = len(FOLDER)
        complete = [(meta.name, meta.size_bytes) for meta in listed] == [
            (object_name(number)[cut:], object_size(number)) for number in range(objects)
        ]
    return {
        "seconds": seconds,
        "client_cpu_s": used_s,
        "found": len(names),
        "complete": complete,
        "fell_back": any("takes over" in message for message in warned.messages),
    }


class _Warnings(logging.Handler):
    """Keeps what was warned of: that a plain listing finished the parallel one's work is said there only."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _used_s() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def verdicts_of(rows: Sequence[Row]) -> list[str]:
    """For each latency the crossover, and for each size whether `auto` chose the quicker method."""
    above = ABOVE["auto"]
    lines: list[str] = []
    for latency_ms in dict.fromkeys(row["latency_ms"] for row in rows):
        by_size: dict[int, dict[str, float]] = {}
        for row in rows:
            if row["latency_ms"] == latency_ms:
                by_size.setdefault(row["objects"], {})[row["method"]] = row["seconds"]
        won = [objects for objects, seconds in sorted(by_size.items()) if seconds["fast"] < seconds["plain"]]
        what = (
            f"the parallel listing is quicker from {won[0]:,} objects on" if won else "plain listing is always quicker"
        )
        lines.append(f"{'given place' if latency_ms is None else f'{latency_ms:g} ms a request'}: {what}")
        for objects, seconds in sorted(by_size.items()):
            quicker = min(("plain", "fast"), key=lambda method: seconds[method])
            chosen = "fast" if objects > above else "plain"
            verdict = "right" if chosen == quicker else f"{quicker} would have been quicker"
            lines.append(
                f"  {objects:,} objects: auto (plain up to {above:,}) takes {chosen}, {seconds['auto']:.2f} s against "
                f"{seconds['plain']:.2f} s plain and {seconds['fast']:.2f} s fast: {verdict}"
            )
    return lines


def draw(axes: Axes, rows: Sequence[Row]) -> None:
    """Seconds against objects, a line a method and latency."""
    for latency_ms in dict.fromkeys(row["latency_ms"] for row in rows):
        for method, marker in (("plain", "o"), ("fast", "s"), ("auto", "x")):
            mine = [row for row in rows if (row["latency_ms"], row["method"]) == (latency_ms, method)]
            where = "" if latency_ms is None else f", {latency_ms:g} ms"
            axes.plot(
                [row["objects"] for row in mine],
                [row["seconds"] for row in mine],
                marker=marker,
                linestyle="--" if latency_ms else "-",
                label=method + where,
            )
    axes.set(xscale="log", yscale="log", xlabel="objects", ylabel="seconds", title="Listing a bucket")
    axes.legend(fontsize="small")
