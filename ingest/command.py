"""Runs a command of any of the packages: its output, the signals that end it, its errors and its exit status."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from . import proxies, signals, terminal
from .errors import IngestError


def run_command(work: Callable[[], int], *, goes_on: bool = False, in_words: Callable[[str], str] = str) -> int:
    """Run a command, and say on standard error what ended it.

    Args:
        work: the command; returns its exit status.
        goes_on: whether it goes on when its output is gone; see `terminal.settle`.
        in_words: changes the text of an error for the command's user.

    Returns:
        The exit status: that of `work`; 1 for an error that it explains; 128 + N where signal N ended it.

    Raises:
        SystemExit: an option is wrong, or the output is gone.
    """
    terminal.settle(goes_on=goes_on)
    proxies.bypass_for_loopback()
    with signals.interrupted_by_signals():
        status = _status_of(work, in_words)
        if signals.came() and status == 128 + signal.SIGINT:
            status = 128 + signals.came()
            print(f"ended by {signal.Signals(signals.came()).name}", file=sys.stderr)
        terminal.flush()
    return status


def _status_of(work: Callable[[], int], in_words: Callable[[str], str]) -> int:
    try:
        return work()
    except IngestError as error:
        print(f"error: {in_words(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if not signals.came():
            print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit as error:
        # Ray's own handler, which it sets within `ray.init`, exits with the number of the signal.
        if error.code != signal.SIGTERM:
            terminal.flush()
            raise
        print(f"ended by {signal.SIGTERM.name}", file=sys.stderr)
        return 128 + signal.SIGTERM
