"""The book of bad cases as an actor, so that every process of a run writes into one."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .actors import started_again
from .errors import IngestError
from .plan import Indices
from .quarantine import BadCaseConfig, QuarantineBook, QuarantineEntry, over_budget
from .unwrap import own_error

WAITING = 100
"""Reports that can wait for one write together."""


@dataclasses.dataclass(frozen=True)
class QuarantineHandle:
    """A `Quarantine` that any process of the run may use: pickles as plain values, and finds the actor by its name.

    The actor ends with the handle that `start_quarantine` gave; copies that were pickled do not keep it.

    Attributes:
        name: of the actor.
        namespace: of Ray's, that it is in.
        run_dir: where quarantine.parquet lies.
        keeper: what keeps the actor alive; None in copies.
    """

    name: str
    namespace: str
    run_dir: str
    keeper: Any = dataclasses.field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[QuarantineHandle], tuple[str, str, str]]:
        return QuarantineHandle, (self.name, self.namespace, self.run_dir)

    def report(self, *entries: QuarantineEntry) -> None:
        """See `Quarantine.report`."""
        self._ask("report", *entries)

    def entries(self) -> list[QuarantineEntry]:
        """See `Quarantine.entries`."""
        found: list[QuarantineEntry] = self._ask("entries")
        return found

    def indices(self) -> Indices:
        """See `Quarantine.indices`."""
        found: Indices = self._ask("indices")
        return found

    def _ask(self, method: str, *arguments: object) -> Any:
        try:
            actor = self.keeper or ray.get_actor(self.name, namespace=self.namespace)
        except ValueError as error:
            raise IngestError(
                f"expected the run's quarantine, the actor {self.name} in namespace {self.namespace}, found none; the "
                "process that started the run has ended: start it again with --trainer.resume"
            ) from error
        try:
            return ray.get(getattr(actor, method).remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            ours = own_error(error)
            if ours is not None:
                raise ours from error
            raise


class _Book(QuarantineBook):
    """The book in an actor. It reports its own restart."""

    def __init__(self, run_dir: str, budget: int, tell: Callable[[str], None] | None) -> None:
        super().__init__(run_dir, budget)
        if tell is not None and started_again():
            tell("the run's quarantine died and was started again, with all cases that were put into it")


def start_quarantine(
    run_dir: str, config: BadCaseConfig, cases: int, tell: Callable[[str], None] | None = None
) -> QuarantineHandle:
    """Start the run's quarantine, with the entries that the run's folder holds from before.

    The actor takes no CPU, runs on this node where it can (a local `run_dir` is here), starts again if it dies,
    and then reads the folder anew. Keep the handle for as long as the run goes on.

    Args:
        run_dir: the run's folder or gs:// place.
        config: says the budget.
        cases: of the whole data set.
        tell: called with a message, in the actor, when Ray has started the actor again. It must pickle.

    Raises:
        QuarantineBudgetError: the folder holds more entries than the budget allows.
        ManifestError: it holds a quarantine.parquet that is none.
        StoreError: the folder cannot be read.
    """
    context = ray.get_runtime_context()
    name = f"voxflux-quarantine-{uuid.uuid4().hex[:12]}"
    budget = config.budget(cases)
    keeper = (
        ray.remote(_Book)
        .options(
            name=name,
            namespace=context.namespace,
            num_cpus=0,
            max_concurrency=WAITING,
            max_restarts=-1,
            max_task_retries=-1,  # all that it is asked may be asked twice
            scheduling_strategy=NodeAffinitySchedulingStrategy(context.get_node_id(), soft=True),
        )
        .remote(run_dir, budget, tell)
    )
    handle = QuarantineHandle(name, context.namespace, run_dir, keeper)
    found = handle.entries()
    if len(found) > budget:
        raise over_budget(found, budget)
    return handle
