"""`python -m benchmarks`: throughput, utilization, listing, scale, stages, metrics and quality."""

from __future__ import annotations

import importlib
import logging
import sys

import tyro

from ingest.command import run_command
from ingest.terminal import plain_console

COMMANDS = {
    "throughput": ("samples/s, client CPU and memory of voxflux, its peers and the floor", "ThroughputConfig"),
    "utilization": ("how busy emulated accelerators are kept by the real pipeline (AU)", "UtilizationConfig"),
    "listing": ("plain against parallel listing of a bucket, and what auto chooses", "ListingConfig"),
    "scale": ("planning, memory and cost a sample against the number of cases", "ScaleConfig"),
    "stages": ("where a sample's time goes", "StagesConfig"),
    "quality": ("a finished run's held-out Dice by class and epoch, as a table and a curve", "QualityConfig"),
    "metrics": ("what a run's own metrics cost a sample", "MetricsConfig"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; the exit status is 0, 1 for an error it explains, 2 for one in the options."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(lambda: _run(given))


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help") or arguments[0] not in COMMANDS:
        lines = [f"  {name:<12} {about}" for name, (about, _) in COMMANDS.items()]
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        usage = "\n".join(["usage: python -m benchmarks COMMAND [OPTIONS], or COMMAND --help", "", *lines])
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    name, *rest = arguments
    module = importlib.import_module(f".{name}", __package__)
    config = tyro.cli(getattr(module, COMMANDS[name][1]), prog=f"python -m benchmarks {name}", args=rest)
    status: int = module.run(config, plain_console())
    return status


if __name__ == "__main__":
    sys.exit(main())
