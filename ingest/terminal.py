"""The output of a command: characters that it cannot show, streams that are closed or go away, and text as it is."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import logging
import os
import select
import signal
import sys
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

PLAIN_ERRORS = "voxflux.plain"
"""Name of the codec error handler that writes characters plainly which an encoding lacks."""

_PLAIN = {"³": "^3", "²": "^2", "\u00d7": "x", "µ": "u", "…": "..."}
_DESCRIPTORS = {"stdout": 1, "stderr": 2}


class _Lost:
    """Whether the command goes on when its output is gone, as a training run does."""

    goes_on = False


def literal(text: str) -> Text:
    """Return text that rich prints as it is. In a table's cells and titles, rich takes `[...]` for markup otherwise."""
    return Text(text)


def plain_console(*, width: int | None = None) -> Console:
    """Return a console that prints text as it is: no markup, no names of emoji, no lines cut at the width."""
    return Console(markup=False, emoji=False, soft_wrap=True, width=width)


def log_to_stderr(level: int) -> None:
    """Print log messages on standard error, as they are."""
    console = Console(stderr=True, markup=False, emoji=False)
    handler = RichHandler(console=console, show_time=False, show_path=False)
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])


def settle(*, goes_on: bool = False) -> None:
    """Prepare standard input, output and error for any terminal, pipe or closed descriptor.

    Characters that the encoding lacks are written plainly, such as 64^3 for 64³, or as escapes. A closed stream becomes
    the null device, because the next file that is opened would take its descriptor.

    Args:
        goes_on: what happens when a pipe is closed, or a disk full, in the middle of the output. True drops the rest
            of the output. False ends the command.
    """
    _Lost.goes_on = goes_on
    codecs.register_error(PLAIN_ERRORS, _plainly)
    _open_closed()
    for name, descriptor in _DESCRIPTORS.items():
        stream = getattr(sys, name)
        # A test's capture is left as it is, except for what it does about characters.
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # it is no file
                if stream.fileno() == descriptor:
                    setattr(sys, name, _guarded(stream, descriptor))
                    continue
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PLAIN_ERRORS)


def flush() -> None:
    """Write what is buffered, so that a failure is met here and not at the interpreter's end."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def drop_lost_output() -> None:
    """Send further output nowhere, where a terminal or a pipe is gone."""
    for descriptor in _DESCRIPTORS.values():
        poll = select.poll()
        poll.register(descriptor, 0)  # these three are reported unasked
        if any(found & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, found in poll.poll(0)):
            _to_null(descriptor)


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    plain = (_PLAIN.get(char) or char.encode("ascii", "backslashreplace").decode("ascii") for char in lacking)
    return "".join(plain), error.end


def _open_closed() -> None:
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            _to_null(descriptor)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))


def _to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
    os.set_inheritable(descriptor, True)


def _guarded(stream: io.TextIOWrapper, descriptor: int) -> io.TextIOWrapper:
    """Return another stream on a descriptor, like the given one, that bears the loss of its output."""
    stream.flush()
    output = _Output(descriptor)
    buffered: Any = output if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(output)
    return io.TextIOWrapper(
        buffered,
        encoding=stream.encoding,
        errors=PLAIN_ERRORS,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Output(io.FileIO):
    """A standard stream whose reader, terminal or disk may go away."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._descriptor = descriptor

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            _to_null(self._descriptor)
            # A terminal that is gone also sends SIGHUP, which ends the command in its own way.
            if _Lost.goes_on or self._descriptor == 2 or error.errno == errno.EIO:
                return len(memoryview(data).cast("B"))
            if error.errno != errno.EPIPE:
                reason = f"expected to write to standard output, found {error.strerror}; free space, or write elsewhere"
                print(f"error: {reason}", file=sys.stderr)
                raise SystemExit(1) from None
            # As SIGPIPE ends other programs; Python ignores it. rich would turn a BrokenPipeError into status 1.
            raise SystemExit(128 + signal.SIGPIPE) from None
