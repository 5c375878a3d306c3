"""A cancelled task leaves its process usable: Ray interrupts the main thread, and gives the process other tasks."""

from __future__ import annotations

import functools
import gc
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from ingest import shield
from ingest.shield import shielded

INSTANTS = int(os.environ.get("VOXFLUX_INTERRUPTS", "6"))
CALLS = 26_000  # about as many as the task makes: imports of NumPy and SciPy, and four blocks


def in_a_process(calls: int) -> tuple[str, str]:
    command = [sys.executable, "-m", "tests.interrupted", str(calls)]
    first, second = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return first, second


def test_the_next_task_gives_the_same_samples_whenever_the_one_before_was_interrupted():
    undisturbed, again = in_a_process(10**9)
    assert undisturbed == again
    draw = random.Random(7)
    found = [in_a_process(draw.randrange(1, CALLS)) for _ in range(INSTANTS)]
    assert [second for _, second in found] == [undisturbed] * INSTANTS
    assert "interrupted" in {first for first, _ in found}


def counted(items: int, log: list[str]) -> Iterator[int]:
    try:
        for item in range(items):
            log.append(threading.current_thread().name)
            yield item
    finally:
        log.append("closed")


LOG: list[str] = []


def counted_here(items: int) -> Iterator[int]:
    return counted(items, LOG)


@pytest.fixture(autouse=True)
def _fresh_log() -> None:
    LOG.clear()


def test_every_step_runs_on_the_tasks_own_thread():
    assert list(shielded(pickle.dumps(functools.partial(counted_here, 3)))) == [0, 1, 2]
    assert LOG == ["voxflux-task"] * 3 + ["closed"]


def test_a_task_that_is_left_early_is_closed_before_the_next_begins():
    items = shielded(pickle.dumps(functools.partial(counted_here, 3)))
    assert next(items) == 0
    items.close()
    assert list(shielded(pickle.dumps(functools.partial(counted_here, 1)))) == [0]
    assert LOG == ["voxflux-task", "closed"] * 2


def fails_after(items: int) -> Iterator[int]:
    yield from range(items)
    raise ValueError("a bad case")


def test_an_error_comes_out_as_it_was_raised():
    items = shielded(pickle.dumps(functools.partial(fails_after, 2)))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="a bad case"):
        next(items)


def test_a_process_that_cannot_load_what_a_fresh_one_can_ends():
    code = (
        "import pickle, sys, types\n"
        "payload = pickle.dumps(__import__('fractions').Fraction)\n"
        "sys.modules['fractions'] = types.ModuleType('fractions')  # as an interrupted import may leave it\n"
        "from ingest.shield import shielded\n"
        "next(shielded(payload))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == shield.UNUSABLE
    assert "cannot load a task" in done.stderr


def test_a_task_that_no_process_can_load_is_an_error_and_ends_no_process():
    payload = pickle.dumps(functools.partial(counted_here, 1)).replace(b"counted_here", b"nowhere_here")
    with pytest.raises(AttributeError):
        next(shielded(payload))


LOCK = threading.RLock()
CLOSED = threading.Event()


def closed_under_the_lock(items: int) -> Iterator[int]:
    try:
        yield from range(items)
    finally:
        with LOCK:
            CLOSED.set()


def test_a_dropped_task_that_the_collector_finds_does_not_wait_for_a_lock_of_its_finder():
    """Ray loads a task under a lock which the end of the task before may need, to find an actor."""

    def drop() -> None:
        with LOCK:
            items = shielded(pickle.dumps(functools.partial(closed_under_the_lock, 3)))
            assert next(items) == 0
            cycle = [items]
            cycle.append(cycle)
            del items, cycle
            gc.collect()

    CLOSED.clear()
    finder = threading.Thread(target=drop, daemon=True)
    finder.start()
    finder.join(60)
    assert not finder.is_alive()
    assert CLOSED.wait(60)  # all the same, its generator is closed
