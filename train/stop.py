"""Ends a run in order: the first signal asks every rank to stop after its step and save, the second ends at once."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import ray
import torch
import torch.distributed

from ingest.signals import ending_signals, handling
from ingest.terminal import drop_lost_output

T = TypeVar("T")
POLL_S = 0.5


class StopWatch:
    """Asks for the flag now and then, in the background, so that a step never waits for it."""

    def __init__(self, flag: Any | None, device: torch.device) -> None:
        self._flag = flag
        self._device = device
        self._asked = False
        self._done = threading.Event()
        if flag is not None:
            threading.Thread(target=self._poll, name="stop-watch", daemon=True).start()

    def _poll(self) -> None:
        while not self._done.wait(POLL_S) and not self._asked:
            if not self._look():
                return

    def _look(self) -> bool:
        """Look at the flag; False where it is gone with the run's driver, and can no longer be set."""
        try:
            self._asked = bool(ray.get(self._flag.is_set.remote()))  # type: ignore[union-attr]
        except ray.exceptions.ActorUnavailableError:
            return True  # it is being started again
        except ray.exceptions.RayError:
            return False
        return True

    @property
    def asked(self) -> bool:
        """Whether this rank knows that the run is to stop; the others may not yet."""
        return self._asked

    def agreed(self, *, finite: bool = True) -> tuple[bool, bool]:
        """What all ranks agree on after a step, in one exchange: the same answers on every rank.

        Args:
            finite: whether this rank's step was.

        Returns:
            Whether to stop after this step, since one of them was asked to; and whether the step was finite on all.
        """
        if not torch.distributed.is_initialized():
            return self._asked, finite
        votes = torch.tensor([float(self._asked), float(not finite)], device=self._device)
        torch.distributed.all_reduce(votes)
        asked, broken = votes.tolist()
        return asked > 0, broken == 0

    def close(self) -> None:
        """End the asking."""
        self._done.set()


class Stopped:
    """What ended a run before its time.

    Attributes:
        signal_number: of the first signal; None while there was none.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None


@contextlib.contextmanager
def on_signals(ask: Callable[[], None]) -> Iterator[Stopped]:
    """Call `ask` at the first SIGINT, SIGTERM or SIGHUP, and raise KeyboardInterrupt at the second.

    A second SIGHUP changes nothing, because a terminal that is closed sends several. Under `nohup`, SIGHUP is ignored.
    Must be entered on the main thread; elsewhere signals are left as they are.
    """
    stopped = Stopped()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stopped.signal_number is not None:
            if number == signal.SIGHUP:
                return
            raise KeyboardInterrupt
        stopped.signal_number = number
        drop_lost_output()  # so that `ask` may print
        ask()

    with handling(dict.fromkeys((signal.SIGINT, *ending_signals()), handle)):
        yield stopped


def in_thread(work: Callable[[], T], look: Callable[[], None] = lambda: None) -> T:
    """Run `work` on another thread, so that the main one is free for signals; its result or its exception.

    Args:
        work: to be done.
        look: called all the while; what it raises is raised here at once, and `work` is left to itself.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  it is raised again below, on the thread that waits
            errors.append(error)

    thread = threading.Thread(target=target, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        look()
        time.sleep(0.1)  # join() would keep signal handlers from running until it returns
    if errors:
        raise errors[0]
    return results[0]
