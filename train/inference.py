"""The commands `evaluate` and `predict`: a trained network on whole volumes, through Ray Data."""

from __future__ import annotations

import dataclasses
import posixpath
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from ingest.cluster import connected_ray
from ingest.errors import ConfigError
from ingest.geometry import from_json, geometry_uri, list_geometry, nifti_bytes
from ingest.holdout import part_of, pick_cases, read_case_list
from ingest.images import list_images
from ingest.index import index_cases
from ingest.manifest import Manifest
from ingest.pairing import PairingConfig
from ingest.plan import ShardConfig
from ingest.quarantine import BadCaseConfig
from ingest.stores import StoreConfig, open_store
from ingest.terminal import literal, plain_console
from ingest.volumes import case_volumes, image_volumes

from .holdout import load_held_out
from .validate import CaseScore, Scores, merge, to_parquet
from .weights import Trained, load_trained
from .workers import Predictor, Scorer, WorkersConfig, infer

HELD_OUT_CASES = "held-out"
Workers = Annotated[WorkersConfig, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a trained network on labelled cases: per-case and mean Dice. Exit status 0 whatever the score."""

    checkpoint: str
    """A run's folder, of which the best checkpoint is taken, or one checkpoint's; local or gs://."""

    images: str = ""
    """URI of the images; with --labels left out too, the run's own held-out cases, from where they lay."""

    labels: str = ""
    """URI of the labels."""

    cases: str | None = None
    """Score only some: a file of case ids, `kits19-mlperf`, or `held-out` for those that the run held out."""

    output: str | None = None
    """Parquet file to write the scores to, local or gs://."""

    workers: Workers = dataclasses.field(default_factory=WorkersConfig)
    pairing: PairingConfig = dataclasses.field(default_factory=PairingConfig)
    store: StoreConfig = dataclasses.field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        if bool(self.images) != bool(self.labels):
            raise ConfigError(
                f"expected --images and --labels together, found images {self.images!r} and labels {self.labels!r}; "
                "give both, or neither to score the run's own held-out cases"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Write the label map of every image of a place: `.npy`, and NIfTI where the case's affine is known."""

    checkpoint: str
    """A run's folder, of which the best checkpoint is taken, or one checkpoint's; local or gs://."""

    images: str
    """URI of the images: names ending in `_x.npy` where there is one, else all `.npy`."""

    output: str
    """URI to write to: OUTPUT/CASE_y.npy for an image CASE_x.npy, (1, D, H, W) uint8, and OUTPUT/CASE.nii.gz. Equal
    names stay equal. So images and output pair up again as images and labels."""

    pattern: str | None = None
    """Regular expression with one group, the case id, matched against an image's whole name."""

    geometry: str | None = None
    """URI of the cases' affines, CASE.json; None looks for `geometry` beside a folder `images`, where `prepare` puts
    them."""

    nifti: bool = True
    """Write NIfTI where an affine is known."""

    workers: Workers = dataclasses.field(default_factory=WorkersConfig)
    store: StoreConfig = dataclasses.field(default_factory=StoreConfig)


def evaluate(config: EvaluateConfig, console: Console) -> Scores:
    """Score every case exactly once; to the last bit what training reports for the same cases and window.

    Raises:
        IngestError: with what was expected, found, and to do.
    """
    trained = load_trained(config.checkpoint)
    config.workers.window(trained)
    store = _direct(config.store)
    cases = _cases(config, trained)
    console.print(f"scoring {trained.uri} on {len(cases)} cases of {cases.images_uri}")
    data = dataclasses.replace(
        trained.recipe.data,
        store=store,
        bad=BadCaseConfig(),
        label_selector=None,  # of the cluster that it was trained on
    )
    with connected_ray():
        data = dataclasses.replace(data, task_cpus=config.workers.cpus()[1])
        volumes = case_volumes(cases, np.arange(len(cases)), data)
        rows = infer(volumes, Scorer, config.workers, trained, data=data)
    scores = merge(
        [[CaseScore(row["index"], row["case_id"], list(row["dice"]), list(row["present"])) for row in rows]], len(cases)
    )
    if config.output is not None:
        _put(config.output, to_parquet(scores.by_case), store)
    return scores


def predict(config: PredictConfig, console: Console) -> list[str]:
    """Write the label maps, and return the names of the files written, sorted.

    Raises:
        IngestError: with what was expected, found, and to do.
    """
    trained = load_trained(config.checkpoint)
    config.workers.window(trained)
    store = _direct(config.store)
    images = list_images(config.images, store, config.pattern)
    equal = config.pattern is None and not images[0].meta.name.endswith("_x.npy")
    geometry = config.geometry or geometry_uri(config.images)
    affines = {}
    if config.nifti and geometry is not None:
        wanted = list_geometry(geometry, store)
        opened = open_store(geometry, store)
        bodies = opened.fetch(list(wanted.values()))
        affines = {
            case: from_json(body, opened.uri_of(meta.name))
            for (case, meta), body in zip(wanted.items(), bodies, strict=True)
        }
    if affines:
        nifti_bytes(np.zeros((1, 1, 1), np.uint8), next(iter(affines.values())))  # nibabel is missed here, not later
    console.print(
        f"predicting {len(images)} images of {config.images} with {trained.uri}; affines of {len(affines)} cases known"
    )
    with connected_ray():
        volumes = image_volumes(images, config.images, store, ShardConfig(), config.workers.cpus()[1])
        rows = infer(
            volumes,
            Predictor,
            config.workers,
            trained,
            output=config.output,
            store=store,
            names="{}.npy" if equal else "{}_y.npy",
            affines=affines,
        )
    if sorted(row["case_id"] for row in rows) != sorted(image.case_id for image in images):
        raise RuntimeError(
            f"expected {len(images)} label maps, one a case, found {len(rows)}; report this with the log"
        )
    return sorted(name for row in rows for name in row["written"])


def scores_table(scores: Scores) -> Table:
    """Each case's Dice by class, and the means last."""
    table = Table(title="Dice by case")
    table.add_column("case")
    for number in range(len(scores.by_class)):
        table.add_column(f"class {number + 1}", justify="right")
    table.add_column("mean", justify="right")
    table.add_column("mean of present", justify="right")
    for score in scores.by_case:
        present = "empty label" if score.mean_dice_present is None else f"{score.mean_dice_present:.4f}"
        table.add_row(
            literal(score.case_id), *(f"{value:.4f}" for value in score.dice), f"{score.mean_dice:.4f}", present
        )
    table.add_section()
    table.add_row("mean", *(f"{value:.4f}" for value in scores.by_class), f"{scores.mean_dice:.4f}", _four(scores))
    return table


def absent_classes(scores: Scores) -> str:
    """How absent classes count, and the mean without them."""
    return (
        "a class absent from a label scores 1 if it is not predicted either, and 0 otherwise; over the classes "
        f"present, mean Dice is {_four(scores)}; {scores.empty} of {scores.cases} cases have an empty label"
    )


def _four(scores: Scores) -> str:
    return "-" if scores.mean_dice_present is None else f"{scores.mean_dice_present:.4f}"


def evaluate_command(arguments: list[str]) -> int:
    """`voxflux evaluate --checkpoint … --images … --labels …`."""
    config = tyro.cli(EvaluateConfig, prog="voxflux evaluate", args=arguments)
    console = plain_console()
    scores = evaluate(config, console)
    console.print(scores_table(scores))
    # All digits: the number can be held against mean_dice in metrics.json.
    console.print(f"mean Dice on {scores.cases} cases: {scores.mean_dice!r}")
    console.print(absent_classes(scores))
    if config.output is not None:
        console.print(f"scores: {config.output}")
    return 0


def predict_command(arguments: list[str]) -> int:
    """`voxflux predict --checkpoint … --images … --output …`."""
    config = tyro.cli(PredictConfig, prog="voxflux predict", args=arguments)
    console = plain_console()
    written = predict(config, console)
    nifti = sum(name.endswith(".nii.gz") for name in written)
    console.print(f"{len(written) - nifti} label maps in {config.output}, {nifti} of them also as NIfTI")
    return 0


def _cases(config: EvaluateConfig, trained: Trained) -> Manifest:
    """The cases to score."""
    if not config.images:
        cases = load_held_out(trained.run_dir)
    else:
        cases = index_cases(config.images, config.labels, config.store, config.pairing).manifest
    if config.cases is None or (config.cases == HELD_OUT_CASES and not config.images):
        return cases
    if config.cases == HELD_OUT_CASES:
        names = load_held_out(trained.run_dir).table["case_id"].to_pylist()
    else:
        names = read_case_list(config.cases, config.store)
    return part_of(cases, pick_cases(cases, names, f"--cases {config.cases}"))


def _direct(store: StoreConfig) -> StoreConfig:
    """Whole volumes are large: there is nothing to compose."""
    return dataclasses.replace(store, transport="direct") if store.transport == "auto" else store


def _put(uri: str, data: bytes, store: StoreConfig) -> None:
    place, name = posixpath.split(uri)
    open_store(place or ".", store).put(name, data)
