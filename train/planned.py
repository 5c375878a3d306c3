"""What a run's ranks read, planned from where the run stands.

Ray's controller calls this at each start, in a process of its own: what this module imports, every start waits for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import ray.data

from ingest.errors import UnreachableError
from ingest.manifest import Manifest
from ingest.pipeline import training_dataset, warm_reader
from ingest.plan import Indices, epochs_together

from .ahead import TURNS
from .flag import Plan, given_up, note_plan, noted_plan
from .holdout import HELD_OUT

if TYPE_CHECKING:
    from .config import Recipe
    from .loop import LoopJob

DatasetMaker: TypeAlias = "ray.data.Dataset | Callable[[], ray.data.Dataset]"


def datasets_of(job: LoopJob, manifest: Manifest, train: Indices) -> dict[str, DatasetMaker]:
    """What the ranks read, made anew at each start; of neither is anything read before the ranks iterate it."""
    turns = TURNS[: len(job.executions(0))]  # one execution needs no second data set
    datasets: dict[str, DatasetMaker] = {
        name: functools.partial(planned_dataset, job, manifest, train, turn) for turn, name in enumerate(turns)
    }
    if job.recipe.trainer.evaluate_every:
        datasets[HELD_OUT] = job.holdout.dataset
    return datasets


def planned_dataset(job: LoopJob, manifest: Manifest, train: Indices, turn: int = 0) -> ray.data.Dataset:
    """The training data from where the run stands; Ray's controller calls it at each start and restart.

    Args:
        job: the run.
        manifest: of all its cases.
        train: indices to train on.
        turn: 0 for the first execution and every second one after it, 1 for the others.

    Raises:
        IngestError: why the last start failed, if that does not pass by starting again: Ray then ends the run.
    """
    if (reason := given_up(job.stop_flag)) is not None:
        raise reason
    if turn == 0:
        warm_reader(job.recipe.data.label_selector)
    trainer = job.recipe.trainer
    # Where the ranks, or the good cases, are not known beforehand, Ray's equal split cuts what ranks cannot share: to
    # cut it here too would leave out up to a step twice.
    known = ranks_are_known(job.recipe)
    multiple = trainer.least_step_cases if known else 1
    noted = noted_plan(job.stop_flag) if turn else None
    consumed = None
    if noted is None:
        try:
            position, noted = job.planned()
            consumed = position.before.indices if noted.first_read == position.epoch else None
        except UnreachableError as error:
            if job.stop_flag is None:
                raise
            # An error from here ends the run for good, though a server may answer again. A failure of ranks is counted,
            # and they are started again as often as the run allows.
            noted = Plan(None, 0, error)
        note_plan(job.stop_flag, noted)
    first = noted.first_read
    executions = job.executions(first)
    return training_dataset(
        manifest,
        job.recipe.data,
        # Where none is left for it, a data set is made and never executed.
        executions=executions[turn :: len(TURNS)] or [range(first, first + 1)],
        consumed=consumed if turn == 0 else None,
        multiple=multiple,
        batch=trainer.step_batch,
        ranks=trainer.num_workers if known else 1,
        quarantine=job.quarantine,
        record=job.monitor,
        candidates=train,
    )


def ranks_are_known(recipe: Recipe) -> bool:
    """Whether the plan can share out every epoch itself: no rank may come or go, and no case turn out bad."""
    return recipe.trainer.max_workers is None and not recipe.data.bad.quarantines


def most_together(recipe: Recipe, manifest: Manifest, train: Indices) -> int:
    """Epochs that one execution of Ray Data reads at the most; what else ends one is for `ahead.executions_of`."""
    return epochs_together(manifest.case_bytes()[train], recipe.data.shards) if ranks_are_known(recipe) else 1
