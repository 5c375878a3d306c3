"""Builds and runs a training job: data, checks, trainer, and what the run leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pyarrow.fs
import ray
import ray.train
import ray.train.torch
from rich.console import Console

from ingest.clean import sweep_run
from ingest.cluster import connected_ray, environment
from ingest.errors import ConfigError
from ingest.execution import execution_options
from ingest.index import index_cases
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig
from ingest.plan import Indices
from ingest.quarantine import summary
from ingest.quarantine_actor import start_quarantine
from ingest.stores import open_store
from ingest.unwrap import own_error

from . import preflight
from .check_folder import check_run_folder
from .checkpoint import read_position
from .config import Recipe
from .finish import ending, leave_behind
from .flag import make_flag
from .follow import following
from .holdout import Holdout, RankData, save_held_out, split_of
from .ledger import absolute_place
from .loop import LoopJob, train_loop
from .metrics import METRICS_FILE, MetricsWriter, Row, read_metrics
from .monitor import start_monitor
from .nodes import alive_nodes, check_visible, with_readers
from .planned import datasets_of, most_together
from .report import epoch_table
from .run_folder import RECIPE_FILE, checks_of_run_dir, resolve_run_dir
from .stop import in_thread, on_signals
from .tracking import reach, tracked
from .waits import why

MANIFEST_FILE = "manifest.parquet"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
        run_dir: its folder or gs:// place.
        rows: of metrics.json.
        checkpoint: the newest checkpoint's place.
        pictures: local files, where the run is local.
        page: the run page's place; None where it could not be written.
        signal_number: of the signal that ended it early; None where it came to its end.
    """

    run_dir: str
    rows: list[Row]
    checkpoint: str | None
    pictures: list[str]
    signal_number: int | None = None
    page: str | None = None


def run(recipe: Recipe, name: str, console: Console) -> Outcome:
    """Run a recipe to its end, or until SIGINT or SIGTERM asks it to save and stop.

    Raises:
        IngestError: with what was expected, found, and to do, from wherever in the run it came.
        KeyboardInterrupt: a second signal came.
    """
    preflight.check_model(recipe)
    run_dir = resolve_run_dir(recipe, name)
    if recipe.trainer.resume is not None:
        for words in check_run_folder(run_dir):
            console.print(f"warning: {words}", markup=False)
    resumed = checks_of_run_dir(recipe, run_dir)
    preflight.check_space(recipe, run_dir)
    tracking = reach(recipe.trainer.mlflow, run_dir, resumed=resumed)
    if recipe.trainer.check_resources and not ray.is_initialized():
        check_early(recipe)
    with contextlib.ExitStack() as stack:
        recipe = dataclasses.replace(recipe, run_dir=run_dir)
        if recipe.trainer.ledger:  # relative to here: a rank's working directory is another one
            trainer = dataclasses.replace(recipe.trainer, ledger=absolute_place(recipe.trainer.ledger))
            recipe = dataclasses.replace(recipe, trainer=trainer)
        served = not recipe.data.images and not recipe.data.manifest
        recipe = stack.enter_context(data_of(recipe, console))
        composed: list[str] = []
        store = dataclasses.replace(recipe.data.store, run_id=recipe.data.store.run_id or uuid.uuid4().hex)
        unresolved = store
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, store=store))
        stack.callback(lambda: sweep_run(composed, store.run_id, store))  # after Ray's processes have ended
        stack.enter_context(connected_ray())
        nodes = alive_nodes()
        recipe = with_readers(recipe, nodes)
        use_gpu = preflight.check_cluster(recipe, nodes)
        before_s = time.perf_counter()
        of_run = f"{run_dir}/{MANIFEST_FILE}" if resumed else None
        manifest, recipe = open_data(recipe, of_run, console, served=served)
        listing_s = time.perf_counter() - before_s
        split = split_of(recipe.data, manifest, run_dir if resumed else None)
        train, held_out = split.train, split.held_out
        held_out_data = recipe.data
        if recipe.data.eval_images:
            held_out_data = resolve(dataclasses.replace(recipe.data, store=unresolved), held_out, console)
        for data in (recipe.data, held_out_data):
            composed += [data.images, data.labels] if data.store.transport == "compose" else []
        preflight.check_amount(recipe, len(train), len(held_out))
        preflight.check_smallest(recipe, manifest)
        check_visible(recipe, [manifest, held_out], run_dir, nodes)
        if not resumed:
            manifest.save(f"{run_dir}/{MANIFEST_FILE}")
            save_held_out(run_dir, split)
        # Also of a run that goes on: with more epochs, say; what must be as it was has been checked.
        open_store(run_dir).put(RECIPE_FILE, recipe.to_json().encode())
        bad = recipe.data.bad
        quarantine = start_quarantine(run_dir, bad, len(manifest)) if bad.quarantines else None
        monitor = start_monitor(run_dir, tensorboard=recipe.trainer.tensorboard)
        job = LoopJob(
            recipe=recipe,
            run_dir=run_dir,
            holdout=Holdout(held_out, split.indices, held_out_data, quarantine),
            train_cases=len(train),
            together=most_together(recipe, manifest, train),
            total_cases=len(manifest),
            stop_flag=make_flag(),
            quarantine=quarantine,
            monitor=monitor,
        )
        trainer = recipe.trainer
        batch = f"{trainer.accumulate} x {trainer.batch_size}" if trainer.accumulate > 1 else f"{trainer.batch_size}"
        copies = f", {split.copies} copies of held-out ones left out" if split.copies else ""
        console.print(
            f"{len(train)} cases to train on, {len(held_out)} held out{copies}; {recipe.trainer.num_workers} "
            f"{'GPU' if use_gpu else 'CPU'} ranks of batch {batch}; run folder {run_dir}"
        )
        if resumed:
            position = read_position(run_dir)
            console.print(
                f"going on from {position.checkpoint or 'the start'}: epoch {position.epoch + 1}, "
                f"step {position.step}, {len(position.before.indices)} cases of the epoch done"
            )

        def ask() -> None:
            console.print("asked to stop: saving after this step; a second signal ends at once")
            job.stop_flag.set.remote()
            monitor.tell("event", "stop", "asked to stop")

        with (
            on_signals(ask) as stopped,
            ending(run_dir, monitor, console),
            tracked(tracking, recipe, run_dir, console, stopped) as mlflow_run,
            following(job, console, mlflow_run),
        ):
            result = in_thread(lambda: fit(job, manifest, train, run_dir, use_gpu=use_gpu, listing_s=listing_s))
        rows = read_metrics(run_dir)
        console.print(epoch_table(rows))
        console.print(why(rows))
        if quarantine is not None:
            console.print(summary(quarantine.entries(), run_dir))
        ended = stopped.signal_number is None
        pictures, page = leave_behind(job, rows, result, console, ended=ended)
    checkpoint = result.checkpoint.path if result.checkpoint is not None else None
    return Outcome(run_dir, rows, checkpoint, pictures, stopped.signal_number, page)


def fit(
    job: LoopJob, manifest: Manifest, train: Indices, run_dir: str, *, use_gpu: bool, listing_s: float
) -> ray.train.Result:
    """Run the trainer; our own errors come out as they were raised, wherever that was."""
    recipe = job.recipe
    ranks = recipe.trainer.num_workers
    storage_path, _, name = run_dir.rstrip("/").rpartition("/")
    filesystem = emulated_filesystem(run_dir)
    if filesystem is not None:
        storage_path = storage_path.removeprefix("gs://")
    trainer = ray.train.torch.TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        datasets=datasets_of(job, manifest, train),
        dataset_config=RankData(execution_options=execution_options(recipe.data.label_selector)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=ranks if recipe.trainer.max_workers is None else (ranks, recipe.trainer.max_workers),  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker={"CPU": recipe.trainer.cpus_per_worker}
            | ({"GPU": 1} if use_gpu else {})
            | (recipe.trainer.resources_per_worker or {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=recipe.trainer.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=recipe.trainer.checkpoints_kept),
            callbacks=[MetricsWriter(run_dir, job.monitor, listing_s)],  # type: ignore[list-item]  # Ray's stub speaks of Train V1
        ),
    )
    try:
        with environment({name: value for name, value in controller_settings().items() if name not in os.environ}):
            return trainer.fit()
    except Exception as error:
        ours = own_error(error)
        if ours is not None:
            raise ours from error
        raise


def controller_settings() -> dict[str, str]:
    """What Ray's controller is told by environment variables, unless the user tells it otherwise."""
    # A rank that reports waits until the controller looks, by default every 2 s: at 0.5 s an epoch's end costs less.
    settings = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    if len(alive_nodes()) == 1:
        # On a cluster of this node only, nobody is left to hear that it goes away, and a process to watch for it takes
        # the ranks about 2 s of CPU time as they start.
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    return settings


def emulated_filesystem(run_dir: str) -> pyarrow.fs.FileSystem | None:
    """Where STORAGE_EMULATOR_HOST points, for checkpoints on gs://; pyarrow does not go by it of itself."""
    url = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if not run_dir.startswith("gs://") or not url:
        return None
    scheme, _, endpoint = url.rpartition("://")
    return pyarrow.fs.GcsFileSystem(
        anonymous=True,
        scheme=scheme or "http",
        endpoint_override=endpoint.rstrip("/"),
        retry_time_limit=timedelta(seconds=30),
    )


def check_early(recipe: Recipe) -> None:
    """What can be known of CPUs and GPUs before a demo's data is made, which takes longer than anybody waits.

    Raises:
        ConfigError: there are too few.
    """
    if not os.environ.get("RAY_ADDRESS"):
        preflight.check_cpus(recipe, os.cpu_count() or 1)  # a Ray that starts here has no more
    elif not recipe.data.images and not recipe.data.manifest and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        # A look at the cluster: the connection of the run itself has to wait for the server's port. `submit` has asked.
        with connected_ray():
            nodes = alive_nodes()
            preflight.check_cluster(with_readers(recipe, nodes), nodes)


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
    root = Path(recipe.demo.data_dir).expanduser().resolve()
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


def open_data(recipe: Recipe, of_run: str | None, console: Console, *, served: bool = False) -> tuple[Manifest, Recipe]:
    """The manifest, loaded or made, and the recipe with its transport resolved.

    Args:
        recipe: names the data.
        of_run: the manifest of the run that is gone on with, so that every case keeps its index.
        console: is told of the transport.
        served: by an embedded server of this run's own, which gives its objects new generations at each start.

    Raises:
        ManifestError: the saved manifest cannot be read, or a demo's cases are not those that the run began with.
    """
    data = recipe.data if of_run is None else dataclasses.replace(recipe.data, manifest=of_run)
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
        if served:
            listed = index_cases(manifest.images_uri, manifest.labels_uri, data.store, data.pairing).manifest
            manifest = manifest.with_generations(listed)
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
        store=choice.store,
    )


__all__ = ["METRICS_FILE", "Outcome", "run"]
