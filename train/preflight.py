"""What would go wrong later is found before anything starts, and said with the numbers that decide it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import ray
import torch
from ray._private.state import available_resources_per_node

from ingest import set_checks
from ingest.errors import ConfigError
from ingest.manifest import Manifest
from ingest.plan import Indices

from .best import BEST_FOLDER
from .checkpoint import FOLDER_PREFIX, STATE_FILE
from .config import Recipe
from .derive import derive, with_cpus
from .nodes import Node, check_readers, labelled
from .unet3d import UNet3D, check_patch

# A checkpoint holds the weights and, for each, up to two moments of the optimiser.
CHECKPOINT_COPIES = {"sgd": 2, "adamw": 3}
FREE_WITHIN_S = 5.0


def check_model(recipe: Recipe) -> None:
    """The patch and the sliding window against the network."""
    recipe = derive(recipe)
    check_patch(recipe.model, recipe.data.crop.patch)
    check_patch(recipe.model, recipe.window.shape)
    if recipe.model.in_channels != recipe.data.decode.channels:
        raise ConfigError(
            f"expected a network for {recipe.data.decode.channels} image channels, found one for "
            f"{recipe.model.in_channels}; leave --model.in-channels out, or set --data.decode.channels"
        )
    if recipe.model.num_classes != recipe.data.decode.num_classes:
        raise ConfigError(
            f"expected a network for {recipe.data.decode.num_classes} classes, found one for "
            f"{recipe.model.num_classes}; leave --model.num-classes out, or set --data.decode.num-classes"
        )
    demo, patch = recipe.demo, recipe.data.crop.patch
    makes_data = demo is not None and not recipe.data.images and not recipe.data.manifest
    if demo is not None and makes_data and any(have < want for have, want in zip(demo.shape, patch, strict=True)):
        raise ConfigError(
            f"expected demo cases that hold a patch of {patch}, found --demo.shape {demo.shape}; give a larger shape, "
            "or a smaller --data.crop.patch"
        )


def check_cpus(recipe: Recipe, cpus: float) -> None:
    """Trainers must leave CPUs for reading: otherwise Ray Data would wait for half an hour without a word.

    Args:
        recipe: the run.
        cpus: of the whole cluster.
    """
    recipe = with_cpus(recipe, cpus)
    trainers = recipe.trainer.num_workers * recipe.trainer.rank_cpus
    left = cpus - trainers
    if left + 1e-6 < recipe.data.read_cpus:
        raise ConfigError(
            f"expected at least {recipe.data.read_cpus:g} CPUs for reading and transforming beside the trainers, "
            f"found {max(left, 0):g}: the cluster has {cpus:g} and {recipe.trainer.num_workers} trainers take "
            f"{trainers:g}; lower --trainer.cpus-per-worker, --trainer.num-workers or --data.task-cpus, "
            "or add data workers"
        )


def check_gpus(recipe: Recipe, gpus: float) -> bool:
    """Whether each rank takes a GPU.

    Args:
        recipe: the run.
        gpus: of the whole cluster, now. A cluster that is still starting has fewer than it will have, so some GPUs but
            too few never mean CPUs.

    Raises:
        ConfigError: there are too few GPUs for ranks that take one, or some but too few where `use_gpu` is None.
    """
    wanted, ranks = recipe.trainer.use_gpu, recipe.trainer.num_workers
    if wanted is False or (wanted is None and gpus == 0):
        return False
    if gpus < ranks:
        fewer = f"--trainer.num-workers {int(gpus)} takes those that are there; " if gpus >= 1 else ""
        raise ConfigError(
            f"expected a GPU for each of {ranks} ranks, found {gpus:g} in the cluster; add GPU nodes, or wait until "
            f"they have joined; {fewer}--trainer.use-gpu False trains on CPUs; --trainer.no-check-resources with "
            "--trainer.use-gpu True has the run wait for GPUs"
        )
    return True


def gpus_unchecked(recipe: Recipe, gpus: float) -> bool:
    """Whether each rank takes a GPU where resources are not checked: whether it asks for one and waits.

    Args:
        recipe: the run.
        gpus: of the whole cluster, now. A single one means GPUs, since more may come.

    Raises:
        ConfigError: `use_gpu` is None and there is no GPU, from which nothing follows for a cluster that grows.
    """
    if recipe.trainer.use_gpu is not None:
        return recipe.trainer.use_gpu
    if gpus == 0:
        raise ConfigError(
            "expected --trainer.use-gpu True or False beside --trainer.no-check-resources (submit --no-check), "
            "since a cluster that grows on demand may have GPUs later, found neither, and no GPU now; give True to "
            "wait for GPUs, or False to train on CPUs"
        )
    return True


def check_amount(recipe: Recipe, train_cases: int, held_out: int) -> None:
    """At least one whole batch for every rank, and a case to score where scoring is asked for."""
    if held_out == 0 and recipe.trainer.evaluate_every:
        raise ConfigError(
            "expected held-out cases to score, found --data.holdout-fraction 0; raise it, name the cases with "
            "--data.holdout-cases or --data.eval-images, or give --trainer.evaluate-every 0"
        )
    wanted = recipe.trainer.least_step_cases
    if wanted > train_cases:
        raise ConfigError(
            f"expected at least {wanted} training cases, one step of {recipe.trainer.step_batch} for each of "
            f"{recipe.trainer.num_workers} ranks, found {train_cases}; lower --trainer.batch-size or "
            "--trainer.accumulate, or add cases"
        )


def check_foreground(recipe: Recipe, manifest: Manifest, left_out: Indices | None = None) -> str | None:
    """Refuse a data set whose labels are all empty, or warn; see `ingest.set_checks.check_foreground`."""
    return set_checks.check_foreground(manifest, recipe.data.store, recipe.data.seed, left_out)


def check_smallest(
    recipe: Recipe, manifest: Manifest, candidates: Indices | None = None, quarantined: Indices | None = None
) -> str | None:
    """Refuse volumes that hold no patch, or say which go into quarantine; see `ingest.set_checks.check_smallest`."""
    data = recipe.data
    wanted = set_checks.Wanted(patch=data.crop.patch, decode=data.decode, store=data.store, bad=data.bad)
    return set_checks.check_smallest(manifest, wanted, candidates, quarantined)


def checkpoint_bytes(recipe: Recipe) -> int:
    """About what one checkpoint takes."""
    with torch.device("meta"):
        parameters: int = sum(math.prod(p.shape) for p in UNet3D(recipe.model).parameters())
    return 4 * parameters * CHECKPOINT_COPIES.get(recipe.optimizer.name, 3)


def run_folder_bytes(recipe: Recipe, run_dir: str) -> int:
    """Bytes that a run still needs in a local run folder: room for one checkpoint at least.

    The folder holds the checkpoints that are kept, the best one, and the one that is being written. Those that are
    there already need no more room.
    """
    one, kept = checkpoint_bytes(recipe), recipe.trainer.checkpoints_kept + 1
    folders = [*Path(run_dir).glob(f"{FOLDER_PREFIX}*"), Path(run_dir) / BEST_FOLDER]
    there = sum(file.stat().st_size for folder in folders for file in folder.glob(STATE_FILE))
    return one * (kept + 1) - min(there, one * kept)


def check_space(recipe: Recipe, run_dir: str) -> None:
    """Room for the checkpoints that are kept, the best one and the one being written; local folders only."""
    if "://" in run_dir:
        return
    folder = Path(run_dir)
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"expected a folder to keep the run in, found the file {folder}; choose another --run-dir")
    needed = run_folder_bytes(recipe, run_dir)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"expected {math.ceil(needed / 2**20)} MiB for checkpoints in {run_dir}, found {free // 2**20} MiB free; "
            "choose another --run-dir or lower --trainer.checkpoints-kept"
        )


def check_cluster(recipe: Recipe, nodes: Sequence[Node]) -> bool:
    """CPUs and GPUs of the cluster that Ray is connected to, and of its nodes; whether each rank takes a GPU.

    Those that another job holds count as missing: Ray would wait for them without a word and without end.

    Raises:
        ConfigError: there are too few of them, too few free within FREE_WITHIN_S; or they are not checked, and
            `use_gpu` has to be given (`gpus_unchecked`).
    """
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if not recipe.trainer.check_resources:
        return gpus_unchecked(recipe, resources.get("GPU", 0.0))
    check_cpus(recipe, resources.get("CPU", 0.0))
    use_gpu = check_gpus(recipe, resources.get("GPU", 0.0))
    check_readers(recipe, nodes, use_gpu=use_gpu)
    check_free(recipe, nodes, use_gpu)
    return use_gpu


def check_free(recipe: Recipe, nodes: Sequence[Node], use_gpu: bool) -> None:
    """What the run needs must be free, or become so: a run that has just ended frees it within seconds."""
    trainer, selector = recipe.trainer, recipe.data.label_selector or {}
    need = {"CPU": trainer.num_workers * trainer.rank_cpus + recipe.data.read_cpus}
    if use_gpu:
        need["GPU"] = float(trainer.num_workers)
    rank = {"CPU": trainer.rank_cpus} | ({"GPU": 1.0} if use_gpu else {}) | (trainer.resources_per_worker or {})
    readers = [node.node_id for node in nodes if node.has(selector)]
    deadline = time.monotonic() + FREE_WITHIN_S
    while True:
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        short = [
            (amount, f"{kind}s", free.get(kind, 0.0), "")
            for kind, amount in need.items()
            if free.get(kind, 0.0) + 1e-6 < amount
        ]
        by_node: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
        # A rank takes all that it takes on one node.
        rooms = [min(have.get(kind, 0.0) / amount for kind, amount in rank.items()) for have in by_node.values()]
        room = sum(int(room + 1e-6) for room in rooms)
        if not short and room < trainer.num_workers:
            each = " and ".join(f"{amount:g} {kind}" for kind, amount in rank.items())
            short.append((trainer.num_workers, f"places for ranks with {each}", room, ""))
        if selector:
            cpus = sum(by_node.get(node, {}).get("CPU", 0.0) for node in readers)
            if cpus + 1e-6 < recipe.data.read_cpus:
                short.append((recipe.data.read_cpus, "CPUs", cpus, f" on nodes labelled {labelled(selector)}"))
        if not short:
            return
        if time.monotonic() > deadline:
            amount, kind, found, where = short[-1]
            raise ConfigError(
                f"expected {amount:g} free {kind}{where}, found {found:g}: other jobs hold the rest; wait for them or "
                "stop them, or give --trainer.no-check-resources to have the run wait"
            )
        time.sleep(0.2)
