"""Finds the error of ours inside the ones that Ray wraps around it."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import IngestError


def wrapped(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its causes and contexts, and the errors that Ray's errors wrap."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__cause__, current.__context__]
        for attribute in ("cause", "controller_failure", "_base_exc"):
            inner = getattr(current, attribute, None)
            if isinstance(inner, BaseException):
                waiting.append(inner)
        failures = getattr(current, "worker_failures", None)
        if isinstance(failures, dict):
            waiting += [failure for failure in failures.values() if isinstance(failure, BaseException)]


def own_error(error: BaseException) -> IngestError | None:
    """Return the IngestError that Ray's errors wrap; None if there is none."""
    return next((_plain(each) for each in wrapped(error) if isinstance(each, IngestError)), None)


# Ray Data adds advice on its retries to the message of what a map raises.
_ADVICE = "\nFailed to apply UDF transform"


def _plain(error: IngestError) -> IngestError:
    """As it was raised: without the remote traceback of Ray's mixed-in class, and without Ray's advice."""
    cause = getattr(error, "cause", None)
    ours = cause if isinstance(cause, IngestError) else error
    if ours.args and isinstance(ours.args[0], str):
        ours.args = (ours.args[0].partition(_ADVICE)[0], *ours.args[1:])
    return ours
