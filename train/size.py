"""The command `size`: how many data workers a training job calls for, by what a sample costs."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from ingest.errors import ConfigError
from ingest.terminal import plain_console

from .cluster_file import CPUS_PER_DATA_WORKER, CPUS_PER_GPU_WORKER, GPUS_PER_WORKER
from .config import Recipe
from .recipes import DEMO

BUSY = 0.75
"""Share of CPUs that is planned with: what is above it is for peaks, and Ray Data asks for nodes beyond it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """Say how many data workers keep the GPUs busy."""

    gpus: int
    """Ranks, one a GPU."""

    step_s: float
    """Seconds that a GPU computes one step."""

    batch: int
    """Samples of a rank's step."""

    cpu_ms_per_sample: float | None = None
    """CPU milliseconds to read and transform a sample; None measures it on this machine."""

    images: str = ""
    """URI of the images to measure with; empty takes the demo's, made on the spot."""

    labels: str = ""
    """URI of their labels."""

    patch: tuple[int, int, int] = (32, 32, 32)
    """(D, H, W) of a sample, for the measurement."""

    samples: int = 2000
    """Measured at the least, after as many again to warm up."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.batch < 1 or self.samples < 1 or not 0 < self.step_s < math.inf:
            raise ConfigError(
                f"gpus, batch, samples and step_s must be above 0; got {self.gpus}, {self.batch}, {self.samples} and "
                f"{self.step_s}"
            )
        if self.cpu_ms_per_sample is not None and not 0 < self.cpu_ms_per_sample < math.inf:
            raise ConfigError(f"cpu_ms_per_sample must be above 0; got {self.cpu_ms_per_sample}")
        if bool(self.images) != bool(self.labels):
            raise ConfigError(f"expected both --images and --labels or neither, found {self.images!r}, {self.labels!r}")


@dataclasses.dataclass(frozen=True)
class Size:
    """What a job calls for.

    Attributes:
        samples_per_s: that the GPUs take together: gpus * batch / step_s.
        cpus: that reading and transforming take at that rate, of which BUSY is used.
        gpu_workers: machines that hold the GPUs.
        spare_cpus: of those machines, without one a rank.
        data_workers: machines for the CPUs that the GPU workers cannot spare; 0 where these have enough.
    """

    samples_per_s: float
    cpus: float
    gpu_workers: int
    spare_cpus: int
    data_workers: int


def size_of(config: SizeConfig, cpu_ms_per_sample: float) -> Size:
    """The arithmetic; data workers, where there are any, do all of the reading, as `cluster` labels them."""
    samples_per_s = config.gpus * config.batch / config.step_s
    cpus = samples_per_s * cpu_ms_per_sample / 1000 / BUSY
    gpu_workers = math.ceil(config.gpus / GPUS_PER_WORKER)
    spare = gpu_workers * CPUS_PER_GPU_WORKER - config.gpus
    data_workers = 0 if cpus <= spare else math.ceil(cpus / CPUS_PER_DATA_WORKER)
    return Size(samples_per_s, cpus, gpu_workers, spare, data_workers)


def print_size(arguments: list[str]) -> int:
    """`voxflux size --gpus N --step-s S --batch B`."""
    config = tyro.cli(SizeConfig, prog="voxflux size", args=arguments)
    console = plain_console()
    cost_ms, source = config.cpu_ms_per_sample, "given"
    if cost_ms is None:
        cost_ms, source = measured(config, console), "measured on this machine"
    size = size_of(config, cost_ms)
    table = Table("what", "how much", "by")
    table.add_row("samples demanded", f"{size.samples_per_s:,.0f}/s", "gpus x batch / step_s")
    table.add_row("CPU time of a sample", f"{cost_ms:.2f} ms", source)
    table.add_row("CPUs to read and transform", f"{size.cpus:.1f}", f"of which {BUSY:.0%} are used")
    table.add_row("GPU workers", str(size.gpu_workers), f"{GPUS_PER_WORKER} GPUs and {CPUS_PER_GPU_WORKER} CPUs each")
    table.add_row("CPUs that they can spare", str(size.spare_cpus), "all but one a rank")
    table.add_row("data workers", str(size.data_workers), f"{CPUS_PER_DATA_WORKER} CPUs each")
    console.print(table)
    console.print(
        f"voxflux cluster --project … --zone … --gpu-workers {size.gpu_workers} "
        f"--data-workers {size.data_workers} > my-cluster.yaml"
    )
    return 0


def measured(config: SizeConfig, console: Console) -> float:
    """CPU milliseconds of a sample: all processes of Ray and this one, over whole epochs of a warm pipeline.

    Raises:
        IngestError: the data cannot be read.
    """
    # Ray loads here, so that --help answers at once.
    from ingest.cluster import check_before_ray, connected_ray, starts_here
    from ingest.pipeline import training_dataset

    from .launch import data_of, open_data

    data = dataclasses.replace(
        DEMO.data,
        images=config.images,
        labels=config.labels,
        holdout_fraction=0.0,
        crop=dataclasses.replace(DEMO.data.crop, patch=config.patch),
    )
    recipe = Recipe(data=data, demo=None if config.images else DEMO.demo)
    if not starts_here():
        raise ConfigError(
            f"expected a Ray of this machine to measure, found RAY_ADDRESS={os.environ['RAY_ADDRESS']}; unset it, or "
            "give --cpu-ms-per-sample"
        )
    check_before_ray()  # before a demo's data is made
    with data_of(recipe, console) as placed, connected_ray():
        manifest, placed = open_data(placed, None, console)
        samples = training_dataset(manifest, placed.data, batch=min(config.batch, len(manifest)))
        for _ in range(2):  # the first time to start processes and warm up
            count, before_s = 0, cpu_seconds()
            while count < config.samples:
                for batch in samples.iter_batches(batch_size=config.batch, batch_format="numpy"):
                    count += len(batch["index"])
            spent_s = cpu_seconds() - before_s
    return 1000 * spent_s / count


def cpu_seconds() -> float:
    """CPU time of this process and of all below it, but for the embedded server, since they started."""
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            head, _, rest = (folder / "stat").read_text().rpartition(") ")
        except OSError:  # it has ended since
            continue
        if "fake-gcs" in head:
            continue
        fields = rest.split()
        # proc(5): the parent, then user and system time of the process and of its children that have ended.
        parents[int(folder.name)] = int(fields[1])
        seconds[int(folder.name)] = sum(map(int, fields[11:15])) / ticks_per_s
    return sum(spent for pid, spent in seconds.items() if _below(pid, parents))


def _below(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        if pid == os.getpid():
            return True
        pid = parents[pid]
    return False
