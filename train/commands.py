"""The commands `run` and `audit`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import tyro

from ingest.errors import ConfigError
from ingest.terminal import plain_console

from .config import Recipe, from_json
from .plain_json import is_figure
from .recipes import RECIPES


def chosen_recipe(arguments: list[str]) -> tuple[Recipe, str]:
    """The recipe that is named, or saved in a file, with its overrides; and its name.

    Raises:
        ConfigError: the file cannot be read, or holds no recipe.
    """
    if not arguments or not arguments[0].startswith("--config"):
        recipe = tyro.extras.overridable_config_cli(RECIPES, prog="voxflux run", args=arguments)
        return recipe, next(argument for argument in arguments if argument in RECIPES)
    parser = argparse.ArgumentParser(prog="voxflux run", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--name", default=None)
    given, overrides = parser.parse_known_args(arguments)
    try:
        text = Path(given.config).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a saved recipe in {given.config}, found none ({error}); check --config") from error
    recipe = tyro.cli(Recipe, prog="voxflux run", default=from_json(text), args=overrides)
    return recipe, given.name or Path(given.config).stem


def run_recipe(arguments: list[str]) -> int:
    """`voxflux run RECIPE [overrides]`, or `run --config FILE [--name NAME] [overrides]`."""
    recipe, name = chosen_recipe(arguments)
    console = plain_console()
    from .best import reached
    from .launch import run  # Ray and torch load here, so that --help answers at once

    outcome = run(recipe, name, console)
    if outcome.signal_number is not None:
        if outcome.page is not None:
            console.print(f"page:       {outcome.page}")
        console.print(f"stopped and saved; go on with --trainer.resume {outcome.run_dir}")
        return 128 + outcome.signal_number
    scored = [row for row in outcome.rows if is_figure(row["mean_dice"])]
    if scored:
        last = scored[-1]
        console.print(
            f"mean Dice on {last['scored']} held-out cases after epoch {last['epoch'] + 1}: {last['mean_dice']:.4f}"
        )
    threshold = recipe.trainer.quality_threshold
    if threshold is not None:
        row = reached(outcome.rows, threshold, recipe.trainer.epochs)
        said = (
            f"not reached in {recipe.trainer.epochs} epochs"
            if row is None
            else f"reached after epoch {row['epoch'] + 1}"
        )
        console.print(f"quality threshold {threshold:g}: {said}")
    console.print(f"checkpoint: {outcome.checkpoint}")
    best = max(scored, key=lambda row: (row["mean_dice"], -row["epoch"]), default=None)
    if best is not None:
        console.print(
            f"best:       {outcome.run_dir}/best (epoch {best['epoch'] + 1}, mean Dice {best['mean_dice']:.4f})"
        )
    console.print(f"metrics:    {outcome.run_dir}/metrics.json")
    if outcome.page is not None:
        console.print(f"page:       {outcome.page}")
    for picture in outcome.pictures:
        console.print(f"picture:    {picture}")
    return 0


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """Hold a run's ledger against its checkpoints; exit status 1 if a case is lost or doubled."""

    run_dir: tyro.conf.Positional[str]
    """The run's folder."""

    ledger: str | None = None
    """Its ledger's folder; None takes the one that the run was started with."""


def audit_run(arguments: list[str]) -> int:
    """`voxflux audit RUN_DIR`."""
    from .audit import audit, audit_table

    config = tyro.cli(AuditConfig, prog="voxflux audit", args=arguments)
    found = audit(config.run_dir, config.ledger)
    console = plain_console()
    console.print(audit_table(found))
    for problem in found.problems:
        console.print(f"problem: {problem}")
    lost, doubled = (sum(len(getattr(epoch, kind)) for epoch in found.epochs) for kind in ("never", "more"))
    console.print(f"lost {lost}, doubled {doubled}, problems {len(found.problems)}")
    return 0 if found.passed else 1
