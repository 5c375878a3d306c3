"""Configuration to finished output: list what is there, make what is missing, in parallel on Ray."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import ConfigError
from ..stores.base import open_store
from .case import IMAGES, LABELS, CaseSource
from .kits19 import FIRST_UNLABELLED, Kits19Source, OnMismatch, check_files, find_cases, import_nibabel
from .mni152 import Mni152Source, load_template
from .output import Job, claim, list_pairs, plan_jobs, run_job
from .resample import Resample, Shape, Spacing

KITS19_SPACING_MM: Spacing = (1.6, 1.2, 1.2)
KITS19_SHAPE: Shape = (128, 128, 128)
MNI152_SHAPE: Shape = (48, 48, 48)
MNI152_SMALLEST = 16
MNI152_CASES = 240
MOST = 100_000
"""Numbers in names have five digits."""

LINE_EVERY_S = 10.0
"""Where the output is no terminal, progress is a plain line as often as this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Makes paired .npy cases out of KiTS19 or of the MNI152 template, anywhere a store reaches."""

    source: Literal["kits19", "mni152"]
    """`kits19`: scans in KiTS19's layout, read from `input`; `mni152`: warped cases of the real T1 template
    that nilearn carries."""

    output: str
    """URI to write to: OUTPUT/images/case_00000_x.npy and OUTPUT/labels/case_00000_y.npy."""

    input: str | None = None
    """kits19: the folder that holds case_00000, case_00001, ...; seen under this path by every node."""

    cases: int | None = None
    """How many cases. None: kits19 all labelled ones (at most 210), mni152 240."""

    copies: int = 1
    """How many of each case there shall be, itself included: above 1, further ones of the same bytes are
    written as case_00000_copy_00001_x.npy and so on."""

    seed: int = 0
    """Which cases. mni152: the seed of the subjects. kits19: which ones are chosen where `cases` is fewer
    than there are."""

    spacing: tuple[float, float, float] | None = None
    """kits19: millimetres between voxels along D, H and W. None: 1.6 1.2 1.2. mni152 has none: its voxels are
    as large as it takes for the whole head to be inside."""

    shape: tuple[int, int, int] | None = None
    """Voxels along D, H and W. kits19: what smaller volumes are padded to; None: 128 128 128. mni152: what
    every volume has; None: 48 48 48."""

    resample: Resample = "grid"
    """`grid` puts image and label on one grid, with voxels exactly --spacing apart. Each voxel of the label takes the
    class with the largest share of it. `mlperf`, for kits19 only, uses MLPerf's own two formulas, for comparison with
    its published result: the image keeps its corner voxels, and the label lies about half a source voxel away from
    it. mni152 always draws image and label on one grid."""

    on_mismatch: OnMismatch = "fail"
    """kits19: treatment of a label that does not lie on its image's grid, by the two affines and shapes. `fail` stops
    and prints both. `resample` puts the label onto the image's grid in world coordinates. A label that lies partly
    outside the image is refused either way."""

    workers: int | None = None
    """Cases made at the same time, each in a Ray task. None: as many as the cluster has CPUs for. 0: in this
    process, without Ray."""

    num_cpus: float = 1.0
    """CPUs that Ray sets aside for one case."""

    manifest: str | None = None
    """URI to write a manifest of the output to, with every case's shape and foreground boxes, as `index --boxes`
    does. None writes none."""

    def __post_init__(self) -> None:
        if self.source not in ("kits19", "mni152"):
            raise ConfigError(f"expected --source kits19 or mni152, found {self.source!r}; choose one of them")
        open_store(self.output)  # refuses what is no URI
        if self.source == "kits19":
            if not self.input:
                raise ConfigError("expected the folder of KiTS19, found none; give --input DIR")
        elif self.input is not None:
            raise ConfigError(f"expected no --input for mni152, found {self.input!r}; leave it out")
        most = FIRST_UNLABELLED if self.source == "kits19" else MOST
        _check_range("cases", self.cases, 1, most)
        _check_range("copies", self.copies, 1, MOST)
        _check_range("seed", self.seed, 0, 2**64 - 1)
        _check_range("workers", self.workers, 0, MOST)
        if not 0 < self.num_cpus < float("inf"):
            raise ConfigError(f"expected --num-cpus above 0, found {self.num_cpus}; give for example 1")
        if self.spacing is not None:
            if self.source == "mni152":
                raise ConfigError(
                    f"expected no --spacing for mni152, found {self.spacing}; leave it out: the whole head "
                    "is always inside, and --shape says how finely"
                )
            if len(self.spacing) != 3 or not all(0 < size < float("inf") for size in self.spacing):
                raise ConfigError(f"expected a --spacing of three numbers above 0 mm, found {self.spacing}")
        if self.resample not in ("grid", "mlperf"):
            raise ConfigError(f"expected --resample grid or mlperf, found {self.resample!r}; choose one of them")
        if self.on_mismatch not in ("fail", "resample"):
            raise ConfigError(f"expected --on-mismatch fail or resample, found {self.on_mismatch!r}; choose one")
        if self.source == "mni152" and self.resample != "grid":
            raise ConfigError(
                f"expected --resample grid for mni152, found {self.resample!r}; leave it out: MLPerf's formulas "
                "are for kits19 only"
            )
        if self.source == "mni152" and self.on_mismatch != "fail":
            raise ConfigError(
                f"expected no --on-mismatch for mni152, found {self.on_mismatch!r}; leave it out: image and label are "
                "drawn on one grid"
            )
        least = MNI152_SMALLEST if self.source == "mni152" else 1
        if self.shape is not None and (len(self.shape) != 3 or min(self.shape) < least):
            raise ConfigError(
                f"expected a --shape of three numbers of {least} or more for {self.source}, found {self.shape}"
            )

    def settings(self, cases: int) -> dict[str, Any]:
        """What decides the bytes of an output, as JSON values, defaults put in; kept as its prepare.json."""
        kits19 = self.source == "kits19"
        return {
            "source": self.source,
            "input": str(Path(self.input).absolute()) if self.input else None,
            "seed": self.seed,
            "spacing": list(self.spacing or KITS19_SPACING_MM) if kits19 else None,
            **({"resample": self.resample} if kits19 else {}),
            "shape": list(self.shape or (KITS19_SHAPE if kits19 else MNI152_SHAPE)),
            "cases": cases,
            "copies": self.copies,
        }


class PrepareResult(NamedTuple):
    """What a run did, counted in pairs of image and label.

    Attributes:
        made: cases written.
        copied: further copies of cases written.
        already_there: pairs found complete, cases and copies.
        images_uri: where the images lie.
        labels_uri: where the labels lie.
    """

    made: int
    copied: int
    already_there: int
    images_uri: str
    labels_uri: str


def prepare(config: PrepareConfig) -> PrepareResult:
    """Make every case and copy that the output lacks.

    Run again after an interruption it goes on where it was. The same settings give the same bytes, whatever
    the number of workers and of cases. Uses the Ray that is running, or starts one and ends it again.

    Raises:
        ConfigError: settings that cannot work, or an output begun with others.
        PlaceNotFoundError, EmptyListingError, PairingError: kits19's folder is not what it must be.
        DecodeError: a case's files are not; what other cases were finished is kept.
        StoreError: the output cannot be listed or written.
        MissingDependencyError: nibabel or nilearn is not installed.
        KeyboardInterrupt: Ctrl-C; finished cases are kept.
    """
    cases = _choose_cases(config)
    settings = config.settings(len(cases))
    store = open_store(config.output)
    found = list_pairs(store)
    claim(store, settings, found)
    jobs = plan_jobs(found, cases, config.copies)
    missing = sum(len(job.missing) for job in jobs)
    made = sum(0 in job.missing for job in jobs)
    already_there = len(cases) * config.copies - missing
    if jobs:
        run = _run_here if config.workers == 0 else _run_on_ray
        done = run(_open_source(config), jobs, config)
        _show_progress(done, already_there, len(cases) * config.copies)
    return PrepareResult(made, missing - made, already_there, store.uri + IMAGES, store.uri + LABELS)


def _choose_cases(config: PrepareConfig) -> list[int]:
    """The numbers of the cases wanted, in order; of the same seed, fewer are always a part of more."""
    if config.source == "mni152":
        return list(range(config.cases or MNI152_CASES))
    folder = config.input or ""
    import_nibabel()
    cases = find_cases(folder)
    wanted = config.cases or len(cases)
    if wanted > len(cases):
        raise ConfigError(
            f"{folder}: expected {wanted} labelled cases, found {len(cases)}; lower --cases, or raise --copies"
        )
    if wanted < len(cases):

        def lot(case: int) -> float:
            return float(np.random.Generator(np.random.Philox(key=np.array([config.seed, case], np.uint64))).random())

        cases = sorted(sorted(cases, key=lot)[:wanted])
    check_files(folder, cases)
    return cases


def _open_source(config: PrepareConfig) -> CaseSource:
    if config.source == "kits19":
        return Kits19Source(
            folder=str(Path(config.input or "").absolute()),
            spacing_mm=config.spacing or KITS19_SPACING_MM,
            shape=config.shape or KITS19_SHAPE,
            resample=config.resample,
            on_mismatch=config.on_mismatch,
        )
    shape_DHW = config.shape or MNI152_SHAPE
    return Mni152Source(template=load_template(shape_DHW), shape=shape_DHW, seed=config.seed)


def _run_here(source: CaseSource, jobs: Sequence[Job], config: PrepareConfig) -> Iterator[Job]:
    for job in jobs:
        yield run_job(source, config.output, job)


def _run_on_ray(source: CaseSource, jobs: Sequence[Job], config: PrepareConfig) -> Iterator[Job]:
    """Run jobs as Ray tasks, a bounded number in flight; yields each as it ends, in any order."""
    import ray
    import ray.exceptions

    from ..cluster import connected_ray

    with connected_ray():
        in_flight: list[Any] = []
        try:
            cpus = float(ray.cluster_resources().get("CPU", 1.0))  # type: ignore[no-untyped-call]
            workers = config.workers or max(1, int(cpus / config.num_cpus))
            if config.num_cpus > cpus:
                raise ConfigError(
                    f"expected --num-cpus of at most the {cpus:g} CPUs that the cluster has, found "
                    f"{config.num_cpus:g}; lower it: the tasks would wait for ever"
                )
            task = ray.remote(num_cpus=config.num_cpus)(run_job)
            shared = ray.put(source)
            waiting = iter(jobs)
            while True:
                while len(in_flight) < workers and (job := next(waiting, None)) is not None:
                    in_flight.append(task.remote(shared, config.output, job))
                if not in_flight:
                    return
                ended, in_flight = ray.wait(in_flight, num_returns=1)
                for reference in ended:
                    yield ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from None  # the error itself, without Ray's text of the worker's traceback
            raise
        finally:
            for reference in in_flight:
                ray.cancel(reference, force=True)


def _show_progress(done: Iterator[Job], already_there: int, total: int) -> None:
    """Drain `done`, telling on stderr how far it is: a bar on a terminal, now and then a line elsewhere."""
    if sys.stderr.isatty():
        _show_bar(done, already_there, total)
        return
    began_s = told_s = time.monotonic()
    pairs = already_there
    for job in done:
        pairs += len(job.missing)
        now_s = time.monotonic()
        if now_s - told_s >= LINE_EVERY_S or pairs == total:
            told_s = now_s
            print(f"prepare: {pairs:,} of {total:,} pairs, {now_s - began_s:.0f} s", file=sys.stderr, flush=True)


def _show_bar(done: Iterator[Job], already_there: int, total: int) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("prepare", total=total, completed=already_there)
        for job in done:
            progress.advance(bar, len(job.missing))


def _check_range(name: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise ConfigError(f"expected --{name} from {least} to {most}, found {value}; choose one of these")
