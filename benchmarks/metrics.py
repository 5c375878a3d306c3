"""What a run's own account of itself costs a sample: counting, telling the monitor, and the monitor's metrics.

It does all that a run does for its metrics and nothing else: data workers count chunks and batches and tell the
monitor, a rank tells it of its steps. Both tell at each block here, where a run's ranks tell once a second and its data
workers at each task's end and once a second: the figure is an upper bound.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from rich.console import Console

from ingest.cluster import connected_ray
from ingest.errors import ConfigError
from ingest.stall import StallMeter
from ingest.tally import TALLY
from train.monitor import Monitor, start_monitor
from train.pulse import Pulses

from .report import Report, Row, meta_of
from .tree import TreeMeter

BATCH = 32
SAMPLE_BYTES = 160 * 1024
FIELDS = {
    "round": "{}",
    "here_us_per_sample": "{:.1f}",
    "others_us_per_sample": "{:.1f}",
    "cpu_us_per_sample": "{:.1f}",
}
"""`here` is what data workers and ranks spend, `others` the monitor and Ray, above what they take when idle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Measure what a run's metrics cost a sample."""

    json: Path | None = None
    """Where the JSON goes; the picture goes beside it. None is benchmarks/results/metrics.json."""

    blocks: int = 300
    """Blocks of a round."""

    batches: int = 6
    """Batches of a block; 6 of 32 patches of 32³ are the 32 MiB of a run's blocks."""

    rounds: int = 5
    """Times that it is measured; the median counts."""

    def __post_init__(self) -> None:
        for field in ("blocks", "batches", "rounds"):
            if getattr(self, field) < 1:
                raise ConfigError(f"expected {field} of 1 or more, found {getattr(self, field)}")


def run(config: MetricsConfig, console: Console) -> int:
    """Measure, print, and write the JSON and the picture."""
    meta = meta_of(0, blocks=config.blocks, batches=config.batches)
    with connected_ray(), tempfile.TemporaryDirectory() as folder, TreeMeter() as tree:
        monitor = start_monitor(folder)
        measured(monitor, tree, config, epoch=0)  # the monitor's process has started, and Ray's tables are there
        rows = [{"round": number, **measured(monitor, tree, config, epoch=number)} for number in range(config.rounds)]
    middle = statistics.median(row["cpu_us_per_sample"] for row in rows)
    report = Report(name="metrics", rows=rows, meta=meta | {"median_us_per_sample": middle})
    report.print(console, FIELDS)
    console.print(f"a run's metrics cost {middle:.1f} µs of CPU a sample, told at each block")
    for file in report.save(config.json, lambda axes: draw(axes, rows)):
        console.print(f"wrote {file}")
    return 0


def measured(monitor: Monitor, tree: TreeMeter, config: MetricsConfig, *, epoch: int) -> dict[str, float]:
    """CPU microseconds a sample of one round: of this process, of all others of the tree, and of both."""
    samples = config.blocks * config.batches * BATCH
    monitor.ask("progress")
    before_s, here_s, began_s = tree.cpu_s(), time.process_time(), time.monotonic()
    tell_all(monitor, config, epoch)
    monitor.ask("progress")  # it answers when it has done all that it was told
    here_s, took_s = time.process_time() - here_s, time.monotonic() - began_s
    after_s = tree.cpu_s()
    time.sleep(took_s)
    idle_s = tree.cpu_s() - after_s
    others_s = max(0.0, after_s - before_s - here_s - idle_s)
    return {
        "here_us_per_sample": here_s / samples * 1e6,
        "others_us_per_sample": others_s / samples * 1e6,
        "cpu_us_per_sample": (here_s + others_s) / samples * 1e6,
    }


def tell_all(monitor: Monitor, config: MetricsConfig, epoch: int) -> None:
    """What an epoch tells the monitor, by the same functions as in a run."""
    steps = config.blocks * config.batches
    pulses, meter = Pulses(monitor, 0, 1), StallMeter()
    pulses.begin(epoch, meter, steps, lambda: None)
    for step in meter.steps(range(1, steps + 1)):
        if step % config.batches == 1 or config.batches == 1:
            TALLY.begin(epoch)
        TALLY.fetched(epoch, bytes_read=BATCH * SAMPLE_BYTES, waited_s=0.001)
        TALLY.transformed(np.full(BATCH, epoch), 0.001)
        pulses.step(step=step, done=step, loss=0.5, learning_rate=0.1, samples=BATCH)
        if step % config.batches == 0:
            TALLY.tell(monitor, now=True)
            pulses.tell()
    pulses.tell()  # of the last step, whose body has ended now
    monitor.tell("epoch_done", {"epoch": epoch, "step": steps})


def draw(axes: Axes, rows: list[Row]) -> None:
    """One bar a round, of two parts."""
    places = range(len(rows))
    here = [row["here_us_per_sample"] for row in rows]
    axes.bar(places, here, label="data workers and ranks")
    axes.bar(places, [row["others_us_per_sample"] for row in rows], bottom=here, label="monitor and Ray")
    axes.set(xlabel="round", ylabel="CPU µs a sample", title="What a run's metrics cost")
    axes.legend(fontsize="small")
