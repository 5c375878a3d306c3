"""Builds and runs a training job: data, checks, trainer, and what the run leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
from rich.console import Console

from ingest.clean import sweep_run
from ingest.cluster import check_before_ray, connected_ray, environment, starts_here
from ingest.errors import ConfigError, PlaceNotFoundError
from ingest.execution import execution_options
from ingest.foreign_names import refuse_foreign_modules
from ingest.holdout import Split
from ingest.home import expanded
from ingest.index import index_cases
from ingest.listing import list_objects
from ingest.manifest import Manifest, cases_of
from ingest.pipeline import DataConfig
from ingest.plan import Indices
from ingest.quarantine import load_entries, summary
from ingest.quarantine_actor import start_quarantine
from ingest.stores import ObjectMeta, open_store
from ingest.unwrap import own_error

from . import preflight
from .check_folder import check_run_folder
from .checkpoint import read_position
from .config import Recipe
from .derive import derive, derived_line, warm_up_warning, with_cpus
from .disk_full import disk_full
from .finish import ending, leave_behind
from .flag import counted_failures, given_up, make_flag
from .follow import following
from .holdout import Holdout, RankData, save_held_out, split_of
from .lease import Lease, LeaseGuard, held
from .ledger import absolute_place
from .loop import LoopJob, train_loop
from .memory_killed import out_of_memory
from .metrics import METRICS_FILE, MetricsWriter, Row, read_metrics
from .monitor import start_monitor
from .nodes import alive_nodes, check_visible, gpus_of_machine, with_readers
from .passwords import recipe_without_password
from .planned import datasets_of, most_together
from .ray_compat import FailureCallback
from .ray_record import drop_damaged_record
from .report import epoch_table
from .restarts import Restarts, controller_died, process_died
from .resume_rules import Change, record
from .run_folder import RECIPE_FILE, checks_of_run_dir, drop_cases_of_before, run_folder
from .run_storage import storage_of
from .stop import in_thread, on_signals
from .tracking import reach, tracked
from .vitals import Vitals, guarded, vitals_of_ray
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
    if not ray.is_initialized():
        check_before_ray()
    preflight.check_model(recipe)
    if not ray.is_initialized():
        refuse_foreign_modules()  # again where Ray starts, but a demo's data is made before that
    with (
        run_folder(recipe, name) as run_dir,
        held(run_dir, lambda words: console.print(words, markup=False)) as lease,
    ):
        return run_in(run_dir, lease, recipe, console)


def run_in(run_dir: str, lease: Lease, recipe: Recipe, console: Console) -> Outcome:
    """Run a recipe in a folder that this process holds; see `run`."""
    given, recipe = recipe, derive(recipe)
    # From here on no part of the run knows a password.
    mlflow, recipe = recipe.trainer.mlflow, recipe_without_password(recipe)
    if recipe.trainer.ledger:  # relative to here: a rank's working directory is another one
        ledger = absolute_place(recipe.trainer.ledger)
        recipe = dataclasses.replace(recipe, trainer=dataclasses.replace(recipe.trainer, ledger=ledger))
    changes = checked_folder(recipe, run_dir, console)
    resumed = changes is not None
    tracking = reach(mlflow, run_dir, resumed=resumed)
    if recipe.trainer.check_resources and not ray.is_initialized():
        check_early(recipe)
    with contextlib.ExitStack() as stack:
        recipe = dataclasses.replace(recipe, run_dir=run_dir)
        served = not recipe.data.images and not recipe.data.manifest
        vitals = Vitals()
        recipe = stack.enter_context(data_of(recipe, console, vitals))
        composed: list[str] = []
        store = dataclasses.replace(recipe.data.store, run_id=recipe.data.store.run_id or uuid.uuid4().hex)
        unresolved = store
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, store=store))
        stack.callback(lambda: sweep_run(composed, store.run_id, store))  # after Ray's processes have ended
        here = stack.enter_context(connected_ray())
        vitals.watch(vitals_of_ray(run_dir, here=here))
        nodes = alive_nodes()
        cpus = sum(node.resources.get("CPU", 0.0) for node in nodes)
        recipe = with_cpus(with_readers(recipe, nodes), cpus)
        for line in filter(None, (derived_line(given, recipe, cpus), warm_up_warning(recipe))):
            console.print(line, markup=False, highlight=False)
        use_gpu = preflight.check_cluster(recipe, nodes)
        before_s = time.perf_counter()
        of_run = f"{run_dir}/{MANIFEST_FILE}" if resumed else None
        quarantined = quarantined_of(recipe.data, run_dir)
        manifest, recipe = open_data(recipe, of_run, console, served=served, left_out=quarantined)
        listing_s = time.perf_counter() - before_s
        split = split_of(recipe.data, manifest, run_dir if resumed else None)
        kept = split.held_out
        if resumed:
            split = resumed_held_out(recipe.data, split)
        train, held_out = split.train, split.held_out
        held_out_data = recipe.data
        if recipe.data.eval_images:
            held_out_data = resolve(dataclasses.replace(recipe.data, store=unresolved), held_out, console)
        for data in (recipe.data, held_out_data):
            composed += [data.images, data.labels] if data.store.transport == "compose" else []
        preflight.check_amount(recipe, len(train), len(held_out))
        if (found := preflight.check_foreground(recipe, manifest, quarantined)) is not None:
            console.print(found, markup=False)
        if (found := preflight.check_smallest(recipe, manifest, train, quarantined)) is not None:
            console.print(found, markup=False)
        check_visible(recipe, [manifest, held_out], run_dir, nodes)
        save_start(recipe, run_dir, changes, manifest, split, kept, console)
        bad = recipe.data.bad
        holder = lease.holder.holder
        monitor = start_monitor(run_dir, tensorboard=recipe.trainer.tensorboard, holder=holder)
        quarantine = start_quarantine(run_dir, bad, len(manifest), monitor.warn) if bad.quarantines else None
        job = LoopJob(
            recipe=recipe,
            run_dir=run_dir,
            holdout=Holdout(held_out, split.indices, held_out_data, quarantine),
            train_cases=len(train),
            together=most_together(recipe, manifest, train),
            total_cases=len(manifest),
            stop_flag=make_flag(monitor.warn),
            quarantine=quarantine,
            monitor=monitor,
        )
        announce(job, split, console, use_gpu=use_gpu, resumed=resumed)
        with (
            on_signals(functools.partial(ask_to_stop, job, console)) as stopped,
            lease.on_loss(functools.partial(ask_to_stop, job, console)),
            ending(run_dir, monitor, console),
            tracked(tracking, recipe, run_dir, console, stopped) as mlflow_run,
            following(job, console, mlflow_run, stopped),
        ):
            trained = functools.partial(
                fit, job, manifest, train, run_dir, holder, use_gpu=use_gpu, listing_s=listing_s
            )
            result = in_thread(lambda: guarded(trained, vitals), vitals.look)
            lease.require()
        return conclude(job, result, stopped.signal_number, console)


def checked_folder(recipe: Recipe, run_dir: str, console: Console) -> list[Change] | None:
    """Check a run's folder before Ray starts, and print what is wrong in it and can be borne.

    Returns:
        The changes of settings of a run that goes on; None for a new run.

    Raises:
        IngestError: the run cannot begin, or go on, in this folder.
    """
    if recipe.trainer.resume is not None:
        for words in check_run_folder(run_dir):
            console.print(f"warning: {words}", markup=False)
    changes = checks_of_run_dir(recipe, run_dir)
    for words in drop_cases_of_before(run_dir) if changes is None else []:
        console.print(words, markup=False)
    preflight.check_space(recipe, run_dir)
    return changes


def save_start(
    recipe: Recipe,
    run_dir: str,
    changes: list[Change] | None,
    manifest: Manifest,
    split: Split,
    kept: Manifest,
    console: Console,
) -> None:
    """Save a run's recipe, and its cases or, if it goes on, its changes, which are printed too.

    Args:
        recipe: with all that was derived.
        run_dir: the run's folder.
        changes: of a run that goes on; None for a new run.
        manifest: all cases.
        split: the cases to train on, and those held out.
        kept: the held-out cases as the run's folder has them.
        console: where changes are printed.
    """
    if changes is None:
        manifest.save(f"{run_dir}/{MANIFEST_FILE}")
        save_held_out(run_dir, split)
    else:
        for line in keep_changes(run_dir, changes, manifest, split, kept):
            console.print(f"changed: {line}", markup=False)
    # A run that goes on saves its recipe too, because settings may change as far as `resume_rules` allows.
    open_store(run_dir).put(RECIPE_FILE, recipe.to_json().encode())


def conclude(job: LoopJob, result: ray.train.Result, signal_number: int | None, console: Console) -> Outcome:
    """Print a run's table and why it waited, write its page and pictures, and return what it left behind."""
    rows = read_metrics(job.run_dir)
    console.print(epoch_table(rows))
    console.print(why(rows))
    if job.quarantine is not None:
        console.print(summary(job.quarantine.entries(), job.run_dir))
    pictures, page = leave_behind(job, rows, result, console, ended=signal_number is None)
    return Outcome(job.run_dir, rows, newest_place(job.run_dir, result), pictures, signal_number, page)


def newest_place(run_dir: str, result: ray.train.Result) -> str | None:
    """The newest checkpoint's place, as commands take it: Ray's own path of a place on gs:// has no scheme."""
    newest = result.checkpoint
    return None if newest is None else f"{run_dir}/{PurePosixPath(newest.path).name}"


def announce(job: LoopJob, split: Split, console: Console, *, use_gpu: bool, resumed: bool) -> None:
    """Print the cases, ranks and folder of a run, and the position that a resumed run goes on from."""
    trainer = job.recipe.trainer
    batch = f"{trainer.accumulate} x {trainer.batch_size}" if trainer.accumulate > 1 else f"{trainer.batch_size}"
    others = f", {split.left_out} other cases of held-out subjects left out" if split.left_out else ""
    console.print(split.about)
    console.print(
        f"{job.train_cases} cases to train on, {len(split.held_out)} held out{others}; {trainer.num_workers} "
        f"{'GPU' if use_gpu else 'CPU'} ranks of batch {batch}; run folder {job.run_dir}"
    )
    if resumed:
        position = read_position(job.run_dir)
        at = f"epoch {position.epoch + 1}, step {position.step}, {len(position.before.indices)} cases of it done"
        if position.unscored is not None:
            at = f"step {position.step}, epoch {position.epoch + 1} is trained and is finished now"
        place = "the start" if position.checkpoint is None else f"{job.run_dir}/{position.checkpoint}"
        console.print(f"going on from {place}: {at}")


def ask_to_stop(job: LoopJob, console: Console, lost: str | None = None) -> None:
    """Ask the ranks to save after their step and to end.

    Args:
        job: the run.
        console: is told why.
        lost: why the lease of the run folder is lost; None where a signal asks.
    """
    asked, after = "asked to stop", "; a second signal ends at once"
    if lost is not None:
        asked, after = f"the lease of the run folder is lost: {lost}", ", then ending"
    console.print(f"{asked}: saving after this step{after}", markup=False)
    job.stop_flag.set.remote()
    if job.monitor is not None:
        job.monitor.tell("event", "stop", asked[:500])


def fit(
    job: LoopJob,
    manifest: Manifest,
    train: Indices,
    run_dir: str,
    holder: str,
    *,
    use_gpu: bool,
    listing_s: float,
    look: Callable[[], None] = lambda: None,
) -> ray.train.Result:
    """Run the trainer, and again where Ray's controller died, as often as `max_failures` allows.

    Our own errors come out as they were raised, wherever that was.

    Args:
        job: the run.
        manifest: of all cases.
        train: indices of those to train on.
        run_dir: the run's folder or gs:// place.
        holder: of the lease of the run's folder.
        use_gpu: whether ranks take a GPU each.
        listing_s: seconds that listing the cases took.
        look: raises the error of what the run cannot live without, where that died.
    """
    while True:
        before = counted_failures(job.stop_flag)
        restarts = restarts_of(job, run_dir, before)
        try:
            return fit_once(job, manifest, train, restarts, holder, use_gpu=use_gpu, listing_s=listing_s)
        except Exception as error:
            ours = disk_full(error, job) or own_error(error)
            ours = ours or out_of_memory(error, run_dir) or process_died(error, run_dir)
            if controller_died(error):
                look()  # it dies with the node, too
                allowed = job.recipe.trainer.max_failures
                failures = counted_failures(job.stop_flag)
                goes_on = (allowed < 0 or failures < allowed) and given_up(job.stop_flag) is None
                restarts_of(job, run_dir, failures)(error, goes_on)
                if goes_on:
                    continue
            if ours is not None:
                raise ours from error
            raise


def restarts_of(job: LoopJob, run_dir: str, before: int) -> Restarts:
    """What tells of a run's failures and counts them, after so many."""
    named = functools.partial(disk_full, job=job)
    return Restarts(run_dir, job.recipe.trainer.max_failures, job.monitor, job.stop_flag, named, before)


def fit_once(
    job: LoopJob,
    manifest: Manifest,
    train: Indices,
    restarts: Restarts,
    holder: str,
    *,
    use_gpu: bool,
    listing_s: float,
) -> ray.train.Result:
    """Run the trainer until Ray's controller ends; see `fit`."""
    recipe, run_dir = job.recipe, job.run_dir
    ranks = recipe.trainer.num_workers
    storage = storage_of(run_dir, recipe.data.store)
    dropped = drop_damaged_record(run_dir, read_position(run_dir).checkpoint)
    if dropped is not None and job.monitor is not None:
        job.monitor.warn(dropped)
    writer = MetricsWriter(run_dir, job.monitor, listing_s)
    callbacks: list[Any] = [LeaseGuard(run_dir, holder), writer, FailureCallback(restarts)]  # in this order
    trainer = ray.train.torch.TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        datasets=datasets_of(job, manifest, train),
        dataset_config=RankData(execution_options=execution_options(recipe.data.label_selector)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=ranks if recipe.trainer.max_workers is None else (ranks, recipe.trainer.max_workers),  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker={"CPU": recipe.trainer.rank_cpus}
            | ({"GPU": 1} if use_gpu else {})
            | (recipe.trainer.resources_per_worker or {}),
        ),
        run_config=ray.train.RunConfig(
            name=storage.name,
            storage_path=storage.path,
            storage_filesystem=storage.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=restarts.left),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=recipe.trainer.checkpoints_kept),
            callbacks=callbacks,
        ),
    )
    with environment({name: value for name, value in controller_settings().items() if name not in os.environ}):
        return trainer.fit()


def controller_settings() -> dict[str, str]:
    """What Ray's controller is told by environment variables, unless the user tells it otherwise."""
    # A rank that reports waits until the controller looks, by default every 2 s: at 0.5 s an epoch's end costs less.
    settings = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    if len(alive_nodes()) == 1:
        # On a cluster of this node only, nobody is left to hear that it goes away, and a process to watch for it takes
        # the ranks about 2 s of CPU time as they start.
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    return settings


def check_early(recipe: Recipe) -> None:
    """What can be known of CPUs and GPUs before a demo's data is made, which takes longer than anybody waits.

    Raises:
        ConfigError: there are too few.
    """
    if starts_here():
        preflight.check_gpus(recipe, gpus_of_machine())
        preflight.check_cpus(recipe, os.cpu_count() or 1)  # a Ray that starts here has no more
    elif not recipe.data.images and not recipe.data.manifest and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        # A look at the cluster: the connection of the run itself has to wait for the server's port. `submit` has asked.
        with connected_ray():
            nodes = alive_nodes()
            cpus = sum(node.resources.get("CPU", 0.0) for node in nodes)
            preflight.check_cluster(with_cpus(with_readers(recipe, nodes), cpus), nodes)


def quarantined_of(data: DataConfig, run_dir: str) -> Indices | None:
    """Indices of the cases that the run leaves out already; None where its policies quarantine none."""
    if not data.bad.quarantines:
        return None
    return np.array(sorted(entry.index for entry in load_entries(run_dir)), dtype=np.int64)


@contextlib.contextmanager
def data_of(recipe: Recipe, console: Console, vitals: Vitals | None = None) -> Iterator[Recipe]:
    """The recipe with its URIs: the given ones, or, for a demo, those of cases made on the spot and served.

    Args:
        recipe: names the data, or how to make it.
        console: is told what is made.
        vitals: watches the server that is started.
    """
    data = recipe.data
    if (data.images and data.labels) or data.manifest or (recipe.trainer.resume and recipe.demo is None):
        yield recipe
        return
    if recipe.demo is None or data.images or data.labels:
        raise ConfigError(
            f"expected two URIs, --data.images and --data.labels, found images {data.images!r} and labels "
            f"{data.labels!r}; give both, or try `voxflux run demo`, which makes its own data"
        )
    from ingest.emulator import EmbeddedServer
    from ingest.prepare import PrepareConfig, prepare

    bucket = "voxflux-demo"
    root = Path(expanded(recipe.demo.data_dir)).resolve()
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
        if vitals is not None:
            vitals.watch(functools.partial(server.check, f"go on with --trainer.resume {recipe.run_dir}"))
        yield dataclasses.replace(
            recipe,
            data=dataclasses.replace(
                data, images=f"gs://{bucket}/{place}/images/", labels=f"gs://{bucket}/{place}/labels/"
            ),
        )


def open_data(
    recipe: Recipe,
    of_run: str | None,
    console: Console,
    *,
    served: bool = False,
    left_out: Indices | None = None,
) -> tuple[Manifest, Recipe]:
    """The manifest, loaded or made, and the recipe with its transport resolved.

    A resumed run keeps its own manifest, so that every case keeps its index. If other URIs are given, or a manifest of
    other URIs, its cases are looked for there.

    Args:
        recipe: names the data.
        of_run: the manifest of the run that is gone on with.
        console: is told of the transport.
        served: by an embedded server of this run's own, which gives its objects new generations at each start.
        left_out: indices of the run's quarantined cases, which are not compared.

    Raises:
        ManifestError: a saved manifest cannot be read, or the cases are not those that the run began with.
        ConfigError: the URIs and the manifest are of different places, or the place of a run's data is gone.
    """
    data = recipe.data
    if of_run is not None:
        manifest = resumed_manifest(data, Manifest.load(of_run, data.store), served=served, left_out=left_out)
    elif data.manifest:
        manifest = _offered(data, data.images, data.labels)
        if served:
            listed = index_cases(manifest.images_uri, manifest.labels_uri, data.store, data.pairing).manifest
            manifest = manifest.with_generations(listed)
    else:
        manifest = index_cases(data.images, data.labels, data.store, data.pairing).manifest
    return manifest, dataclasses.replace(recipe, data=resolve(data, manifest, console))


def _offered(data: DataConfig, images: str, labels: str) -> Manifest:
    """The manifest that is given, which must be of these URIs where they are not empty."""
    manifest = Manifest.load(data.manifest or "", data.store)
    for role, given, found in (("images", images, manifest.images_uri), ("labels", labels, manifest.labels_uri)):
        if given and open_store(given).uri != found:
            raise ConfigError(
                f"expected {role} at {given}, found a manifest of {found}; leave --data.{role} out, or "
                "make a manifest of these URIs with `voxflux index`"
            )
    return manifest


def resumed_manifest(
    data: DataConfig, of_run: Manifest, *, served: bool = False, left_out: Indices | None = None
) -> Manifest:
    """A run's manifest with the places and generations that its objects have now; see `open_data`.

    Raises:
        ManifestError: other cases lie in the places that are given.
        ConfigError: no other place is given, and the one that the run read is gone.
    """
    places = (of_run.images_uri, of_run.labels_uri)
    images, labels = (
        "" if not given or open_store(given).uri == old else given
        for given, old in zip((data.images, data.labels), places, strict=True)
    )
    there = None
    if data.manifest:
        there = _offered(data, images, labels)
        there = None if (there.images_uri, there.labels_uri) == places else there
    elif images or labels or served:
        there = index_cases(images or places[0], labels or places[1], data.store, data.pairing).manifest
    if there is not None:
        return of_run.moved_to(there, left_out)
    if _as_listed(data, of_run, left_out):
        return of_run
    listed = [list_objects(open_store(uri, data.store)) for uri in places]
    return of_run.with_current(*listed)


def _as_listed(data: DataConfig, manifest: Manifest, left_out: Indices | None) -> bool:
    """Whether the first and the last case have the generations that the manifest has.

    Raises:
        ConfigError: the place is gone.
    """
    kept = np.setdiff1d(np.arange(len(manifest)), np.zeros(0, np.int64) if left_out is None else left_out)
    cases = cases_of(manifest.take(kept[[0, -1]])) if len(kept) else []
    same = True
    for role, uri in (("image", manifest.images_uri), ("label", manifest.labels_uri)):
        store = open_store(uri, data.store)
        try:
            for case in cases:
                meta: ObjectMeta = getattr(case, role)
                now = next((found for found in store.list(meta.name) if found.name == meta.name), None)
                same = same and now is not None and meta.generation in (None, now.generation)
            if not same and next(iter(store.list()), None) is None:
                raise PlaceNotFoundError(f"{uri} holds no object")
        except PlaceNotFoundError as error:
            raise ConfigError(
                f"expected the run's {role}s in {uri}, found that they are gone ({error}); put them back, or, if the "
                "data has moved, give --data.images and --data.labels of where it is now, or its --data.manifest"
            ) from error
    return same


def resumed_held_out(data: DataConfig, split: Split) -> Split:
    """A resumed run's split, with its evaluation set where `eval_images` and `eval_labels` are now.

    Raises:
        ManifestError: other cases lie there.
    """
    if not data.eval_images:
        return split
    second = dataclasses.replace(data, images=data.eval_images, labels=data.eval_labels, manifest=None)
    return dataclasses.replace(split, held_out=resumed_manifest(second, split.held_out))


def keep_changes(
    run_dir: str, changes: Sequence[Change], manifest: Manifest, split: Split, held_out: Manifest
) -> list[str]:
    """Record what is other than before in a resumed run: its settings, and the places of its cases.

    Args:
        run_dir: the run's folder or gs:// place.
        changes: of its settings.
        manifest: of all cases, where they are now.
        split: of them; its held-out cases are kept with the run too.
        held_out: the held-out cases as the run's folder has them, in the places where they were.

    Returns:
        Each change in words, with its step.
    """
    before = Manifest.load(f"{run_dir}/{MANIFEST_FILE}")
    moved = _moved("data.", before, manifest)
    if held_out.images_uri != before.images_uri:
        moved += _moved("data.eval_", held_out, split.held_out)
    # The events first: after a crash in between, the next start finds the same changes again.
    lines = record(run_dir, [*changes, *moved], read_position(run_dir).step)
    if not (before.table.equals(manifest.table) and held_out.table.equals(split.held_out.table) and not moved):
        manifest.save(f"{run_dir}/{MANIFEST_FILE}")
        save_held_out(run_dir, split)
    return lines


def _moved(prefix: str, before: Manifest, now: Manifest) -> list[str]:
    """The places that changed, in words."""
    pairs = (("images", before.images_uri, now.images_uri), ("labels", before.labels_uri, now.labels_uri))
    return [f"{prefix}{role} {old} -> {new}" for role, old, new in pairs if old != new]


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
