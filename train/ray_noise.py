"""Keeps a line of Ray off the terminal that reads as a fault and is none."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

MARK = b"has constructor arguments in the object store and max_restarts > 0"
"""Ray prints this as an error whenever Ray Data starts an actor (ray-project/ray issue 57733). It warns that an actor
cannot be restarted once its arguments are gone. Ray Data holds these arguments for as long as its actors live."""

JOIN_S = 5.0  # a process that was started meanwhile may hold the pipe open


@contextlib.contextmanager
def without_actor_warning() -> Iterator[None]:
    """Pass on what this process writes to stderr, in C++ code too, without lines that have MARK.

    Ray logs the line from C++, and only its environment variable RAY_BACKEND_LOG_LEVEL would silence it, with the
    errors of all of Ray's processes in their log files.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed: nothing can be printed
        yield
        return
    reading, writing = os.pipe()

    def pass_on() -> None:
        with open(reading, "rb") as lines:  # noqa: PTH123  a descriptor, no path
            for line in lines:
                if MARK not in line:
                    with contextlib.suppress(OSError):  # who reads stderr has gone
                        os.write(stderr, line)

    thread = threading.Thread(target=pass_on, name="pass-on-stderr", daemon=True)
    os.dup2(writing, 2)
    os.close(writing)
    thread.start()
    try:
        yield
    finally:
        os.dup2(stderr, 2)  # also ends the pipe, whose only writer was descriptor 2
        thread.join(JOIN_S)
        if not thread.is_alive():
            os.close(stderr)
