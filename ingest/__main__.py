"""The commands of `voxflux` that are about data, from `prepare` to `serve`; also `python -m ingest`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro
from rich.console import Console

from .command import run_command
from .terminal import log_to_stderr, plain_console

T = TypeVar("T")

# Each command imports its own modules when it is called, so that a list of the commands is printed at once.


def _prepare(arguments: list[str], console: Console) -> int:
    from . import commands
    from .prepare import PrepareConfig, prepare

    config = _parse(PrepareConfig, "prepare", arguments)
    result = prepare(config)
    console.print(
        f"made {result.made} cases and {result.copied} copies, {result.already_there} were there already\n"
        f"images: {result.images_uri}\nlabels: {result.labels_uri}",
        markup=False,  # names may have brackets
    )
    if config.manifest is None:
        return 0
    index = commands.IndexConfig(images=result.images_uri, labels=result.labels_uri, output=config.manifest, boxes=True)
    return commands.index(index, console)


def _index(arguments: list[str], console: Console) -> int:
    from . import commands

    return commands.index(_parse(commands.IndexConfig, "index", arguments), console)


def _inspect(arguments: list[str], console: Console) -> int:
    from . import commands

    return commands.inspect(_parse(commands.InspectConfig, "inspect", arguments), console)


def _digest(arguments: list[str], console: Console) -> int:
    from . import commands

    return commands.digest(_parse(commands.DigestConfig, "digest", arguments), console)


def _serve(arguments: list[str], console: Console) -> int:  # noqa: ARG001  all commands have one signature
    from . import commands

    command: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, command = arguments[:at], arguments[at + 1 :]
    return commands.serve(_parse(commands.ServeConfig, "serve", arguments), command)


def _clean(arguments: list[str], console: Console) -> int:
    from .clean import CleanConfig, clean

    return clean(_parse(CleanConfig, "clean", arguments), console)


COMMANDS: dict[str, tuple[Callable[[list[str], Console], int], str, str]] = {
    "prepare": (_prepare, "--source KIND --output URI", "make paired .npy cases out of KiTS19 or the MNI152 template"),
    "index": (_index, "--images URI --labels URI --output URI", "list and pair a data set once, and save the manifest"),
    "inspect": (_inspect, "--images URI --labels URI", "say what a data set holds and how it would be read"),
    "digest": (_digest, "--images URI --labels URI", "print the fingerprint of all samples of some epochs"),
    "clean": (_clean, "gs://BUCKET", "delete the composites that killed processes left in a bucket"),
    "serve": (_serve, "--data DIR [-- COMMAND]", "serve a folder as buckets, on the embedded GCS server"),
}
"""Name: function that takes the rest of the arguments and returns the exit status, its arguments, what it does."""


def _parse(kind: type[T], name: str, arguments: list[str]) -> T:
    return tyro.cli(kind, prog=f"voxflux {name}", args=arguments)


def command_lines() -> dict[str, str]:
    """Return how each command is called, and what it does."""
    return {f"{name} {arguments}": about for name, (_, arguments, about) in COMMANDS.items()}


def usage() -> str:
    """Return the commands, a line each."""
    calls = command_lines()
    width = max(map(len, calls))
    lines = [f"  {call:<{width}}  {about}" for call, about in calls.items()]
    return "\n".join(["usage: voxflux COMMAND ..., or COMMAND --help", "", *lines])


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for an error it explains, 2 for one in the options."""
    given = sys.argv[1:] if arguments is None else arguments
    # Settings of a data set stand under `data` in training, and at the top here.
    return run_command(lambda: _run(given), in_words=lambda text: text.replace("--data.", "--"))


def _run(arguments: list[str]) -> int:
    log_to_stderr(logging.INFO)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"expected one of {', '.join(COMMANDS)}, found {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    return COMMANDS[name][0](rest, plain_console())


if __name__ == "__main__":
    sys.exit(main())
