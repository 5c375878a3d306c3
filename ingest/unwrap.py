"""Finds the error of ours inside the ones that Ray wraps around it."""

from __future__ import annotations

from .errors import IngestError


def own_error(error: BaseException) -> IngestError | None:
    """The error of ours that Ray's errors wrap, if there is one."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, IngestError):
            return _plain(current)
        waiting += [current.__cause__, current.__context__]
        for attribute in ("cause", "controller_failure", "_base_exc"):
            inner = getattr(current, attribute, None)
            if isinstance(inner, BaseException):
                waiting.append(inner)
        failures = getattr(current, "worker_failures", None)
        if isinstance(failures, dict):
            waiting += [failure for failure in failures.values() if isinstance(failure, BaseException)]
    return None


def _plain(error: IngestError) -> IngestError:
    """Without the remote traceback that Ray's mixed-in class prints as the message."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, IngestError) else error
