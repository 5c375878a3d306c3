"""Ends a command in order when SIGTERM or SIGHUP comes, as Ctrl-C does, until the command has handlers of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from .terminal import drop_lost_output

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class _Came:
    """The signal that is ending the command of this process; 0 while there is none."""

    number = 0


def came() -> int:
    """Return the number of the SIGTERM or SIGHUP that is ending the command; 0 if there was none."""
    return _Came.number


def ending_signals() -> tuple[signal.Signals, ...]:
    """Return SIGTERM, and SIGHUP unless this process was started with SIGHUP ignored, as `nohup` does."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return (signal.SIGTERM,)
    return (signal.SIGTERM, signal.SIGHUP)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    if _Came.number:
        return  # a closed terminal sends several: the clean-up after the first goes on
    _Came.number = number
    drop_lost_output()
    raise KeyboardInterrupt


def _forget_in_child() -> None:
    """Let signals end a forked child at once: it has nothing of ours to clean up."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first SIGTERM or SIGHUP, which `came` then names; later ones change nothing.

    It is not an exception of its own because Ray lets nothing but KeyboardInterrupt and SystemExit out of its waits.
    Outside the main thread, signals are left as they are.
    """
    _Came.number = 0
    with handling(dict.fromkeys(ending_signals(), _interrupt)):
        yield


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put back this process's own handlers of SIGTERM and SIGHUP afterwards.

    `ray.init` replaces them by one that ends the process without a word. Where the process has none, Ray's stays.
    Outside the main thread, where Ray sets none, nothing is done.
    """
    own = {number: handler for number in ending_signals() if callable(handler := signal.getsignal(number))}
    with handling(own):
        yield


@contextlib.contextmanager
def handling(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Handle signals so, and put back afterwards how they were handled.

    Outside the main thread, which alone may set handlers, signals are left as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None stands for a handler that was not set from Python, and which Python cannot set.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
