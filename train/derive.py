"""Derives settings from others: a recipe leaves out whatever follows from its patch, its data, epochs or CPUs.

A setting that is left out is None, or a share in place of a number of epochs. A run derives it once, prints it, and
saves it in its recipe.json.
"""

from __future__ import annotations

import dataclasses
import math

from .config import Recipe
from .optimizer import in_epochs

LEAST_CPUS = 0.25  # that a rank or a read task gets; with fewer for each, starting them takes longer than their work


def derive(recipe: Recipe) -> Recipe:
    """Return the recipe with all settings that follow from its others. CPUs follow from the cluster: see `with_cpus`.

    Raises:
        ConfigError: what follows cannot work.
    """
    window, model, optimizer, decode = recipe.window, recipe.model, recipe.optimizer, recipe.data.decode
    return dataclasses.replace(
        recipe,
        window=dataclasses.replace(window, roi=recipe.data.crop.patch if window.roi is None else window.roi),
        model=dataclasses.replace(
            model,
            in_channels=decode.channels if model.in_channels is None else model.in_channels,
            num_classes=decode.num_classes if model.num_classes is None else model.num_classes,
        ),
        optimizer=in_epochs(optimizer, recipe.trainer.epochs),
    )


def cpu_shares(cpus: float, processes: int, of_process: float | None, of_task: float | None) -> tuple[float, float]:
    """CPUs that each of some processes reserves, and those of a read task beside them.

    What is not given is 1. If that does not fit, a read task takes half of a single CPU, and the processes share
    what it leaves.

    Args:
        cpus: of the whole cluster.
        processes: their number.
        of_process: what is given for each; None if nothing is.
        of_task: what is given for a read task; None if nothing is.

    Returns:
        Both numbers, not below LEAST_CPUS where they are derived. They may still not fit.
    """
    if of_task is None:
        left = cpus / 2 if of_process is None else cpus - processes * of_process
        of_task = max(LEAST_CPUS, min(1.0, left))
    if of_process is None:
        share = math.floor(100 * (cpus - of_task) / processes) / 100  # Ray counts in ten-thousandths
        of_process = max(LEAST_CPUS, min(1.0, share))
    return of_process, of_task


def with_cpus(recipe: Recipe, cpus: float) -> Recipe:
    """Return the recipe with the CPUs of a rank and of a read task.

    Args:
        recipe: the run.
        cpus: of the whole cluster. They decide nothing where resources are not checked: more may come.
    """
    trainer, data = recipe.trainer, recipe.data
    of_rank, of_task = trainer.rank_cpus, data.read_cpus
    if trainer.check_resources:
        of_rank, of_task = cpu_shares(cpus, trainer.num_workers, trainer.cpus_per_worker, data.task_cpus)
    return dataclasses.replace(
        recipe,
        trainer=dataclasses.replace(trainer, cpus_per_worker=of_rank),
        data=dataclasses.replace(data, task_cpus=of_task),
    )


def derived_line(given: Recipe, found: Recipe, cpus: float) -> str | None:
    """Say in one line what a run derived.

    Args:
        given: the recipe before.
        found: the recipe with all that follows.
        cpus: of the cluster.

    Returns:
        The line; None if nothing was left to derive.
    """
    said = []
    if given.window.roi is None:
        said.append(f"windows of {' x '.join(map(str, found.window.shape))} (the patch)")
    if given.model.in_channels is None or given.model.num_classes is None:
        channels, classes = found.model.channels, found.model.classes
        said.append(f"a network of {channels} channel{'s' if channels > 1 else ''} and {classes} classes (the data's)")
    after = found.optimizer.lr_decay_epochs
    if given.optimizer.lr_decay_epochs != after:
        named = f"{' and '.join(f'{epoch:g}' for epoch in after)} of {found.trainer.epochs}"
        said.append(f"learning rate x {found.optimizer.lr_decay_factor:g} after epoch {named}")
    cpus_of = []
    if given.trainer.cpus_per_worker is None:
        cpus_of.append(f"{found.trainer.rank_cpus:g} a rank")
    if given.data.task_cpus is None:
        cpus_of.append(f"{found.data.read_cpus:g} a read task")
    if cpus_of:
        said.append(f"CPUs: {' and '.join(cpus_of)}, of {cpus:g}")
    return f"derived: {'; '.join(said)}" if said else None


def warm_up_warning(recipe: Recipe) -> str | None:
    """Warn of a run that ends before its learning rate has warmed up."""
    warmup, epochs = recipe.optimizer.warmup_epochs, recipe.trainer.epochs
    if warmup <= epochs:
        return None
    return (
        f"warning: expected a warm-up that ends within {epochs} epochs, found one of {warmup:g}: the learning rate "
        f"never reaches {recipe.optimizer.learning_rate:g}; give fewer --optimizer.warmup-epochs"
    )
