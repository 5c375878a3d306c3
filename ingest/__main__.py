"""`python -m ingest`: prepare, index, inspect, digest and serve data sets."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro
from rich.console import Console
from rich.logging import RichHandler

from . import commands
from .clean import CleanConfig, clean
from .errors import IngestError
from .prepare import PrepareConfig, prepare

T = TypeVar("T")


def _prepare(arguments: list[str], console: Console) -> int:
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
    return commands.index(_parse(commands.IndexConfig, "index", arguments), console)


def _inspect(arguments: list[str], console: Console) -> int:
    return commands.inspect(_parse(commands.InspectConfig, "inspect", arguments), console)


def _digest(arguments: list[str], console: Console) -> int:
    return commands.digest(_parse(commands.DigestConfig, "digest", arguments), console)


def _serve(arguments: list[str], console: Console) -> int:  # noqa: ARG001  all commands have one signature
    command: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, command = arguments[:at], arguments[at + 1 :]
    return commands.serve(_parse(commands.ServeConfig, "serve", arguments), command)


def _clean(arguments: list[str], console: Console) -> int:
    return clean(_parse(CleanConfig, "clean", arguments), console)


COMMANDS: dict[str, tuple[str, Callable[[list[str], Console], int]]] = {
    "prepare": ("make paired .npy cases out of KiTS19 or the MNI152 template", _prepare),
    "index": ("list and pair a data set once, and save the manifest", _index),
    "inspect": ("say what a data set holds and how it would be read", _inspect),
    "digest": ("print the fingerprint of all samples of some epochs", _digest),
    "clean": ("delete the composites that killed processes left in a bucket", _clean),
    "serve": ("serve a folder as buckets, on the embedded GCS server", _serve),
}


def _parse(kind: type[T], name: str, arguments: list[str]) -> T:
    return tyro.cli(kind, prog=f"python -m ingest {name}", args=arguments)


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (about, _) in COMMANDS.items()]
    return "\n".join(["usage: python -m ingest COMMAND [OPTIONS], or COMMAND --help", "", *lines])


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for an error it explains, 2 for one in the options."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_time=False, show_path=False)],
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"expected one of {', '.join(COMMANDS)}, found {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name][1](rest, Console(markup=False, soft_wrap=True))
    except IngestError as error:
        # Settings of a data set stand under `data` in training, and at the top here.
        print(f"error: {str(error).replace('--data.', '--')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
