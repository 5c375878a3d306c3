"""Builds and runs a training job: data, checks, trainer, and what the run leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import ray.train
import ray.train.torch
from rich.console import Console

from ingest.cluster import connected_ray
from ingest.errors import ConfigError
from ingest.index import index_cases
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig, execution_options, training_dataset
from ingest.plan import split_holdout
from ingest.stores import open_store
from ingest.unwrap import own_error

from . import preflight
from .config import Recipe
from .loop import CHECKPOINT_FILE, LoopJob, train_loop
from .metrics import METRICS_FILE, MetricsWriter, Row, read_metrics
from .report import epoch_table, plot_curves

RECIPE_FILE = "recipe.json"
POLL_S = 1.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
        run_dir: its folder or gs:// place.
        rows: of metrics.json.
        checkpoint: the newest checkpoint's place.
        pictures: local files, where the run is local.
    """

    run_dir: str
    rows: list[Row]
    checkpoint: str | None
    pictures: list[str]


def run(recipe: Recipe, name: str, console: Console) -> Outcome:
    """Run a recipe to its end.

    Raises:
        IngestError: with what was expected, found, and to do, from wherever in the run it came.
    """
    preflight.check_model(recipe)
    run_dir = resolve_run_dir(recipe, name)
    preflight.check_space(recipe, run_dir)
    with contextlib.ExitStack() as stack:
        recipe = dataclasses.replace(recipe, run_dir=run_dir)
        recipe = stack.enter_context(data_of(recipe, console))
        stack.enter_context(connected_ray())
        use_gpu = preflight.check_cluster(recipe)
        manifest, recipe = open_data(recipe, console)
        train, held_out = split_holdout(recipe.data.seed, manifest.subjects(), recipe.data.holdout_fraction)
        preflight.check_amount(recipe, len(train))
        preflight.check_smallest(recipe, manifest)
        open_store(run_dir).put(RECIPE_FILE, recipe.to_json().encode())
        job = LoopJob(
            recipe=recipe,
            holdout=Manifest(manifest.take(held_out), manifest.images_uri, manifest.labels_uri),
            holdout_indices=held_out,
            train_cases=len(train),
        )
        console.print(
            f"{len(train)} cases to train on, {len(held_out)} held out; {recipe.trainer.num_workers} "
            f"{'GPU' if use_gpu else 'CPU'} ranks of batch {recipe.trainer.batch_size}; run folder {run_dir}"
        )
        with following(run_dir, recipe.trainer.epochs, console):
            result = fit(job, manifest, run_dir, use_gpu=use_gpu)
        rows = read_metrics(run_dir)
        console.print(epoch_table(rows))
        pictures = draw(job, rows, run_dir, result) if "://" not in run_dir else []
    checkpoint = result.checkpoint.path if result.checkpoint is not None else None
    return Outcome(run_dir, rows, checkpoint, pictures)


def fit(job: LoopJob, manifest: Manifest, run_dir: str, *, use_gpu: bool) -> ray.train.Result:
    """Run the trainer; our own errors come out as they were raised, wherever that was."""
    recipe = job.recipe
    storage_path, _, name = run_dir.rstrip("/").rpartition("/")
    trainer = ray.train.torch.TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        datasets={
            "train": functools.partial(
                training_dataset,
                manifest,
                recipe.data,
                multiple=recipe.trainer.batch_size * recipe.trainer.num_workers,
                batch=recipe.trainer.batch_size,
            )
        },
        dataset_config=ray.train.DataConfig(execution_options=execution_options()),
        scaling_config=ray.train.ScalingConfig(
            num_workers=recipe.trainer.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": recipe.trainer.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage_path,
            failure_config=ray.train.FailureConfig(max_failures=recipe.trainer.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=recipe.trainer.checkpoints_kept),
            callbacks=[MetricsWriter(run_dir)],  # type: ignore[list-item]  # Ray's stub speaks of Train V1
        ),
    )
    try:
        return trainer.fit()
    except Exception as error:
        ours = own_error(error)
        if ours is not None:
            raise ours from error
        raise


def resolve_run_dir(recipe: Recipe, name: str) -> str:
    """An absolute folder or a gs:// place, without a trailing slash; a new one where none was given."""
    given = recipe.run_dir or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}"
    if "://" in given:
        return given.rstrip("/")
    return str(Path(given).expanduser().resolve())


@contextlib.contextmanager
def data_of(recipe: Recipe, console: Console) -> Iterator[Recipe]:
    """The recipe with its URIs: the given ones, or, for a demo, those of cases made on the spot and served."""
    data = recipe.data
    if (data.images and data.labels) or data.manifest:
        yield recipe
        return
    if recipe.demo is None or data.images or data.labels:
        raise ConfigError(
            f"expected two URIs, --data.images and --data.labels, found images {data.images!r} and labels "
            f"{data.labels!r}; give both, or try `python -m train run demo`, which makes its own data"
        )
    from ingest.emulator import EmbeddedServer
    from ingest.prepare import PrepareConfig, prepare

    bucket = "voxflux-demo"
    root = Path(recipe.demo.data_dir).resolve()
    shape = "x".join(map(str, recipe.demo.shape))
    place = f"mni152-{shape}-{recipe.demo.cases}"
    console.print(f"making or finding {recipe.demo.cases} MNI152-derived cases of {shape} in {root}")
    prepare(
        PrepareConfig(
            source="mni152",
            output=str(root / bucket / place),
            cases=recipe.demo.cases,
            shape=recipe.demo.shape,
            seed=0,
        )
    )
    with EmbeddedServer(data=root) as server, environment(server.env()):
        console.print(f"serving them at {server.url} as gs://{bucket}/{place}/")
        yield dataclasses.replace(
            recipe,
            data=dataclasses.replace(
                data, images=f"gs://{bucket}/{place}/images/", labels=f"gs://{bucket}/{place}/labels/"
            ),
        )


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables, and put back what was there."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def open_data(recipe: Recipe, console: Console) -> tuple[Manifest, Recipe]:
    """The manifest, loaded or made, and the recipe with its transport resolved."""
    data = recipe.data
    if data.manifest:
        manifest = Manifest.load(data.manifest, data.store)
        for role, given, found in (
            ("images", data.images, manifest.images_uri),
            ("labels", data.labels, manifest.labels_uri),
        ):
            if given and open_store(given).uri != found:
                raise ConfigError(
                    f"expected {role} at {given}, found a manifest of {found}; leave --data.{role} out, or "
                    "make a manifest of these URIs with `python -m ingest index`"
                )
    else:
        manifest = index_cases(data.images, data.labels, data.store, data.pairing).manifest
    return manifest, dataclasses.replace(recipe, data=resolve(data, manifest, console))


def resolve(data: DataConfig, manifest: Manifest, console: Console) -> DataConfig:
    """Fix the transport once, so that every worker uses the same."""
    from ingest.transport import choose_transport

    choice = choose_transport(manifest, data.store)
    console.print(f"reading by {choice.transport}: {choice.reason}")
    return dataclasses.replace(
        data,
        images=manifest.images_uri,
        labels=manifest.labels_uri,
        store=dataclasses.replace(data.store, transport=choice.transport),
    )


def epoch_line(row: Row, epochs: int) -> str:
    """One epoch in one line, as the run goes."""
    dice = "" if row["mean_dice"] is None else f", mean Dice {row['mean_dice']:.4f}"
    return (
        f"epoch {row['epoch'] + 1}/{epochs}: loss {row['train_loss']:.4f}{dice}, "
        f"{row['samples_per_s']:.1f} samples/s, stall {row['stall_share']:.1%}"
    )


@contextlib.contextmanager
def following(run_dir: str, epochs: int, console: Console) -> Iterator[None]:
    """Print a line for each epoch as its row appears."""
    done = threading.Event()
    shown = 0

    def follow() -> None:
        nonlocal shown
        finished = False
        while not finished:
            finished = done.wait(POLL_S)
            rows = read_metrics(run_dir)
            for row in rows[shown:]:
                console.print(epoch_line(row, epochs))
            shown = len(rows)

    thread = threading.Thread(target=follow, name="follow-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def draw(job: LoopJob, rows: list[Row], run_dir: str, result: ray.train.Result) -> list[str]:
    """The run's pictures: its curves, and one held-out case with truth and prediction."""
    from .pictures import draw_prediction

    curves = Path(run_dir) / "curves.png"
    plot_curves(rows, curves)
    pictures = [str(curves)]
    if result.checkpoint is not None and len(job.holdout):
        with result.checkpoint.as_directory() as folder:
            pictures.append(draw_prediction(job, Path(folder) / CHECKPOINT_FILE, Path(run_dir)))
    return pictures


__all__ = ["METRICS_FILE", "Outcome", "run"]
