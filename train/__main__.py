"""`python -m train`: run a recipe."""

from __future__ import annotations

import logging
import sys

import tyro
from rich.console import Console
from rich.logging import RichHandler

from ingest.errors import IngestError

from .recipes import RECIPES

USAGE = """usage: python -m train run RECIPE [--run-dir DIR] [overrides], or run RECIPE --help

recipes:
"""


def usage() -> str:
    """How to call it, and the recipes."""
    width = max(map(len, RECIPES))
    return USAGE + "\n".join(f"  {name:<{width}}  {about}" for name, (about, _) in RECIPES.items())


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 for an error it explains, 2 for one in the options."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_time=False, show_path=False)],
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    command, *rest = arguments
    if command != "run":
        print(f"expected the command run, found {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    return run_recipe(rest)


def run_recipe(arguments: list[str]) -> int:
    """`python -m train run RECIPE [overrides]`."""
    recipe = tyro.extras.overridable_config_cli(RECIPES, prog="python -m train run", args=arguments)
    name = next(argument for argument in arguments if argument in RECIPES)
    console = Console(soft_wrap=True)
    from .launch import run  # Ray and torch load here, so that --help answers at once

    try:
        outcome = run(recipe, name, console)
    except IngestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    scored = [row for row in outcome.rows if row["mean_dice"] is not None]
    if scored:
        last = scored[-1]
        console.print(
            f"mean Dice on {last['scored']} held-out cases after epoch {last['epoch']}: {last['mean_dice']:.4f}"
        )
    console.print(f"checkpoint: {outcome.checkpoint}")
    console.print(f"metrics:    {outcome.run_dir}/metrics.json")
    for picture in outcome.pictures:
        console.print(f"picture:    {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
