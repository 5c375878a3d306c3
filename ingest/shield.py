"""Runs the work of a Ray task on a thread of its own, where the interrupt of a cancelled task cannot reach it.

Ray cancels a task by raising KeyboardInterrupt in the main thread of its worker, wherever that thread is, and then
gives the same process other tasks. Python delivers the interrupt to the main thread only. An import, a client or a
lock that is interrupted half-way stays broken: `scipy.ndimage`, for one, cannot be imported again in that process. So
the main thread only waits, and everything that a task sets up is set up on a thread that ends its step first.
"""

from __future__ import annotations

import functools
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_CHECK_S = 120.0  # longest time for a fresh interpreter to load what this one cannot
_CHECK = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
UNUSABLE = 66
"""Exit status of a worker process that cannot load what a fresh process can."""


_ENDING: list[threading.Event] = []  # of dropped tasks that may not have ended yet


def _wait_for_dropped_tasks() -> None:
    for ended in list(_ENDING):
        ended.wait()
        _ENDING.remove(ended)


def shielded(payload: bytes, *arguments: Any) -> Iterator[Any]:
    """Yield the items of a pickled generator function, each made on another thread than this one.

    Args:
        payload: the pickled function. It is loaded on the other thread too, because loading imports modules.
        arguments: what the function is called with.

    Raises:
        KeyboardInterrupt: the task was cancelled in the middle of a step. The step has ended by then, and its generator
            is closed. A task that is dropped between two steps is closed before the next one begins.
        Exception: whatever the function raises.
    """
    steps: queue.SimpleQueue[bool] = queue.SimpleQueue()
    answers: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    ended = threading.Event()
    thread = threading.Thread(
        target=_serve, args=(payload, arguments, steps, answers, ended), name="voxflux-task", daemon=True
    )
    _wait_for_dropped_tasks()
    waits = True
    try:
        thread.start()
        while True:
            steps.put(True)
            kind, value = answers.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
            del value  # a block is large, and the next one is made before this name is bound again
    except GeneratorExit:
        # The task was dropped between two steps, often by the garbage collector, which may run while this thread holds
        # a lock that the end of the other thread needs: Ray loads functions and actors under one lock. So the next task
        # waits for that end, and this thread does not.
        waits = False
        _ENDING.append(ended)
        raise
    finally:
        steps.put(False)
        while waits and thread.is_alive() and not ended.is_set():
            try:
                ended.wait()
            except KeyboardInterrupt:  # noqa: PERF203  waiting costs more
                continue  # the task is being cancelled already; the next one must not begin beside this one


def _serve(
    payload: bytes,
    arguments: tuple[Any, ...],
    steps: queue.SimpleQueue[bool],
    answers: queue.SimpleQueue[tuple[str, Any]],
    ended: threading.Event,
) -> None:
    """Make an item for each step that is asked for, until one is refused or the items end."""
    items: Iterator[Any] | None = None
    try:
        while steps.get():
            if items is None:
                items = _loaded(payload)(*arguments) if arguments else _load(payload)()
            try:
                item = next(items)
            except StopIteration:
                answers.put(("end", None))
                return
            answers.put(("item", item))
            del item
    except BaseException as error:  # noqa: BLE001  raised again on the thread that waits
        answers.put(("error", error))
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()
        ended.set()


def _load(payload: bytes) -> Callable[..., Iterator[Any]]:
    """The function of a payload.

    A process that cannot load it though a fresh one can was left broken by an interrupt before this thread began. It
    ends, and Ray runs the task elsewhere. Where a fresh process fails as well, the error is the code's, and is raised.
    """
    try:
        function: Callable[..., Iterator[Any]] = pickle.loads(payload)  # noqa: S301  made by the driver of this run
    except Exception as error:
        if _loads_in_a_fresh_process(payload):
            sys.stderr.write(f"voxflux: this process cannot load a task ({error!r}) that a fresh one can: it ends\n")
            sys.stderr.flush()
            os._exit(UNUSABLE)
        raise
    return function


# A map function is called once a block, with the same payload each time; it is small.
_loaded = functools.lru_cache(maxsize=8)(_load)


def _loads_in_a_fresh_process(payload: bytes) -> bool:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHECK], input=payload, env=environment, capture_output=True, timeout=_CHECK_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
