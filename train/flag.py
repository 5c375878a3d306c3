"""The stop flag of a run: an actor that knows whether to stop, what the ranks read, and why not to start again.

It imports no torch, so that it starts fast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
import ray.exceptions

from ingest.actors import started_again
from ingest.errors import IngestError, UnreachableError
from ingest.unwrap import own_error


class Plan(NamedTuple):
    """What the data of a start were planned from: the ranks must go by the same.

    Attributes:
        checkpoint: that the start goes on from; None at the run's start.
        first_read: the first epoch whose data are read. Which one it is depends on the quarantine of that instant.
        failure: why nothing could be planned; the ranks of the start fail with it. None where all is planned.
    """

    checkpoint: str | None
    first_read: int
    failure: UnreachableError | None = None


class _Flag:
    """The actor: one a run, on no CPU."""

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self._stop = False
        if tell is not None and started_again():
            tell("the run's stop flag died and was started again; whoever asked the run to stop asks it anew")
        self._reason: IngestError | None = None
        self._plan: Plan | None = None
        self._failures = 0

    def count_failure(self) -> None:
        self._failures += 1

    def failures(self) -> int:
        return self._failures

    def note_plan(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self) -> Plan | None:
        return self._plan

    def give_up(self, reason: IngestError) -> None:
        self._reason = self._reason or reason

    def reason(self) -> IngestError | None:
        return self._reason

    def set(self) -> None:
        self._stop = True

    def is_set(self) -> bool:
        return self._stop


def make_flag(tell: Callable[[str], None] | None = None) -> Any:
    """The run's stop flag, to be handed to the ranks.

    A flag that died is started again and knows nothing: `follow.following` sets it anew, and a rank that meets an error
    again notes it again.

    Args:
        tell: is told, in the actor, when it had to be started again. Pickles.
    """
    # Ray repeats a call that the actor's death cut off. No call does harm when it is made twice.
    return ray.remote(_Flag).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote(tell)


def give_up(flag: Any | None, error: BaseException) -> None:
    """Note an error that starting again would only meet again, so that `max_failures` are kept for those that pass.

    Of our own errors only a server that cannot be reached may pass; what is not ours may.
    """
    reason = own_error(error)
    if flag is not None and reason is not None and not isinstance(reason, UnreachableError):
        with contextlib.suppress(ray.exceptions.RayError):  # it ended with the driver: the error itself goes on
            ray.get(flag.give_up.remote(reason))


def given_up(flag: Any | None) -> IngestError | None:
    """The first error that was noted by `give_up`."""
    reason: IngestError | None = None if flag is None else ray.get(flag.reason.remote())
    return reason


def count_failure(flag: Any | None) -> None:
    """Count a failure after which the run goes on: a controller that is started again must know of those before."""
    if flag is not None:
        with contextlib.suppress(ray.exceptions.RayError):  # it ended with the driver
            ray.get(flag.count_failure.remote())


def counted_failures(flag: Any | None) -> int:
    """The failures after which the run went on. A flag that died has forgotten them, so that more are allowed."""
    failures: int = 0 if flag is None else ray.get(flag.failures.remote())
    return failures


def note_plan(flag: Any | None, plan: Plan) -> None:
    """Keep what a start's data are planned from."""
    if flag is not None:
        ray.get(flag.note_plan.remote(plan))


def noted_plan(flag: Any | None) -> Plan | None:
    """What the data of this start were planned from; None where that is not known."""
    plan: Plan | None = None if flag is None else ray.get(flag.plan.remote())
    return plan
