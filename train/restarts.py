"""Tells the run's monitor of each failure, in one line, with what follows from it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import ray.exceptions
from ray.train import PreemptionError, WorkerGroupError

from ingest.errors import IngestError
from ingest.unwrap import own_error

from .checkpoint import read_position
from .flag import count_failure, given_up
from .memory_killed import killed_for_memory
from .monitor import Monitor

LONGEST = 500  # characters of an error's words


class Restarts:
    """Counts the restarts of a run as Ray counts them. Ray's controller calls it (`ray_compat.FailureCallback`)."""

    def __init__(
        self,
        run_dir: str,
        max_failures: int,
        monitor: Monitor | None,
        flag: Any | None,
        named: Callable[[BaseException], IngestError | None] = own_error,
        before: int = 0,
    ) -> None:
        """Take what the lines are made of.

        Args:
            run_dir: the run's folder or gs:// place; says from which step the ranks start again.
            max_failures: restarts that the run is allowed; -1 for any number.
            monitor: is told; None where nobody is.
            flag: the run's stop flag, which knows why starting again would not help.
            named: finds the error of ours in one of Ray's controller; those of ranks have been through it there.
            before: failures of the run before this controller of Ray's.
        """
        self._run_dir, self._max_failures = run_dir, max_failures
        self._monitor, self._flag, self._named = monitor, flag, named
        self._restarts = before
        self._said = ""
        self._over = False

    @property
    def left(self) -> int:
        """Failures that a new controller of Ray's may survive; -1 for any number."""
        return -1 if self._max_failures < 0 else max(0, self._max_failures - self._restarts)

    def __call__(self, error: BaseException, goes_on: bool) -> None:
        """Tell of one failure.

        Args:
            error: Ray's.
            goes_on: whether Ray starts the ranks again.
        """
        counts = controller_died(error) or (isinstance(error, WorkerGroupError) and not _taken_away(error))
        if goes_on and counts:
            self._restarts += 1
        if self._monitor is None or self._over:  # what a restart would meet again comes anew from Ray's controller
            return
        with contextlib.suppress(ray.exceptions.RayError):
            self._over = not goes_on or given_up(self._flag) is not None
        if counts and not self._over:
            count_failure(self._flag)
        line = f"{failure_in_words(error, goes_on, self._named)}; {self._then(goes_on, counts)}"
        if line != self._said:  # ranks that cannot start fail again every minute
            # Waited for, so that it is there when the run ends.
            self._monitor.ask("event", "fault", line)
        self._said = line

    def _then(self, goes_on: bool, counts: bool) -> str:
        if self._over:
            if goes_on:
                return "the run ends, since a restart would meet the same"
            allowed = f", as --trainer.max-failures is {self._max_failures}" if counts else ""
            return f"the run ends{allowed}"
        if not counts:
            return f"restarting{self._from()}; this does not count as a failure"
        if self._max_failures < 0:
            return f"restarting{self._from()}, restart {self._restarts} without a limit"
        return f"restarting{self._from()}, {self._restarts} of {self._max_failures}"

    def _from(self) -> str:
        try:
            return f" from step {read_position(self._run_dir).step}"
        except (IngestError, OSError):  # the restart itself will say so
            return ""


def failure_in_words(
    error: BaseException,
    goes_on: bool = False,
    named: Callable[[BaseException], IngestError | None] = own_error,
) -> str:
    """Who failed and why, in one line.

    Args:
        error: Ray's `TrainingFailedError`.
        goes_on: whether Ray starts the ranks again.
        named: as of `Restarts`.
    """
    if isinstance(error, PreemptionError):
        ranks = sorted(error.preemption_info.preempted_ranks)
        return f"the node of {_ranks(ranks)} is taken away"
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {}
    if failures:
        # One that says why comes first: where one rank fails, others lose their connection to it.
        first = min(failures, key=lambda rank: (own_error(failures[rank]) is None, not _died(failures[rank]), rank))
        others = f" (with {_ranks(sorted(set(failures) - {first}))})" if len(failures) > 1 else ""
        return f"rank {first} failed{others}: {in_words(failures[first])}"
    if controller_died(error):
        return in_words(error)
    cause = getattr(error, "controller_failure", error)
    who = "the ranks could not start" if goes_on else "the controller of the run failed"
    return f"{who}: {in_words(named(cause) or cause)}"


def in_words(error: BaseException) -> str:
    """An error in one line; of a process that died, which one it was."""
    ours = own_error(error)
    if ours is not None:
        return _first_line(str(ours)) or type(ours).__name__
    killed = killed_for_memory(error)
    if killed is not None:
        return killed.words[:LONGEST]
    inner = getattr(error, "health_check_failure", error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    if isinstance(inner, ray.exceptions.ActorDiedError):
        about = dict(line.split(": ", 1) for line in lines if line.count(": ") == 1)
        made = re.search(r"ray::(\w+)", lines[0])  # of an actor whose making failed
        name = about.get("name") or about.get("class_name") or (made[1] if made is not None else "an actor")
        pid = f", pid {about['pid']}" if "pid" in about else ""
        return f"the process of {name} died{pid}: {_why(lines[-1])}"[:LONGEST]
    if isinstance(inner, ray.exceptions.RayTaskError) and lines:
        return lines[-1][:LONGEST]  # of a traceback as text
    return _without_guesses(": ".join([type(inner).__name__, *lines[:1]]))[:LONGEST]


def process_died(error: BaseException, run_dir: str) -> IngestError | None:
    """What to end a run with whose controller or ranks were killed; None where it failed otherwise.

    Args:
        error: that `fit` raised.
        run_dir: the run's folder, to go on with.
    """
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {0: error}
    if not all(_died(each) for each in failures.values()):
        return None
    who = failure_in_words(error) if isinstance(error, WorkerGroupError) else in_words(error)
    return IngestError(
        f"expected the processes of the run to live, found that {who}; look for what killed it (where memory ran out, "
        f"`dmesg` says so), then go on with --trainer.resume {run_dir}; with --trainer.max-failures N, ranks and their "
        "controller are started again without being asked"
    )


def controller_died(error: BaseException) -> bool:
    """Whether the process of Ray's controller died: Ray starts only ranks again, never their controller."""
    return isinstance(error, ray.exceptions.ActorDiedError) and "TrainController" in str(error)


def _died(error: BaseException) -> bool:
    return isinstance(getattr(error, "health_check_failure", error), ray.exceptions.RayActorError)


def _taken_away(error: WorkerGroupError) -> bool:
    """Whether Ray counts it as a node that was taken away, of which `max_failures` knows nothing."""
    inner = (getattr(each, "health_check_failure", each) for each in error.worker_failures.values())
    return any(isinstance(each, ray.exceptions.RayActorError) and each.preempted for each in inner)


def _why(line: str) -> str:
    return _without_guesses(line.partition("Worker exit detail: ")[2] or line)


def _without_guesses(line: str) -> str:
    """Ray's words without its list of what it might have been."""
    for guesses in (" Some common causes", " Potential causes include"):
        head, found, _ = line.partition(guesses)
        line = head.rstrip(".") if found else line
    return line


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:LONGEST]


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"ranks {shown}"
